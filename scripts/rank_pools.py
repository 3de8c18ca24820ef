"""Rank pools that share no row, one for each seed of a recipe, and store how the selectors did and differ.

    python scripts/rank_pools.py recipes/curation_ranking.yaml --out recipes/results/curation_ranking.json

Seed s ranks `data.align.limit` rows from s times as many on; nothing is trained on what is kept.  A pool whose results
lie under --work is not ranked again.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from apothecary.config import load_yaml
from apothecary.data.rows import read_rows
from apothecary.evals.ranking import GOOD, planted
from apothecary.pipeline.combined import text
from apothecary.pipeline.recipe import load_recipe
from apothecary.pipeline.results import RESULTS, Result, load_result
from apothecary.pipeline.run import run
from apothecary.pipeline.store import Store
from apothecary.stats import auc_difference

LABEL = re.compile(r"curate \S+ \S+: (?P<arm>.+) \(seed (?P<seed>\d+)\)")
REFERENCES = ("pharmacist", "pharmacist score", "post_attack_match", "post_attack_match LoRA")
Sides = tuple[list[float], list[float]]


def rank(recipe: Path, work: Path) -> list[Result]:
    """One run for each seed, ended after the selections."""
    written = load_yaml(recipe)
    size, done = written["data"]["align"]["limit"], []
    for seed in written["seeds"]:
        folder = work / f"pool_{seed}"
        if not (folder / RESULTS).exists():
            settings = load_recipe(recipe, [f"data.align.skip={seed * size}", f"seeds=[{seed}]"])
            run(settings, store=work / "store", out=folder, until="curate", bars=True)
        done.append(load_result(folder))
    return done


def planted_in(found: Result) -> dict[str, str]:
    """What each row of the pool is, by id."""
    pool = next(s for s in found.results["stages"] if s["kind"] == "data" and s["label"].startswith("align rows"))
    return planted(read_rows(_path(_store(found), pool, "rows.jsonl")))


def stages(found: Result) -> Iterator[dict[str, Any]]:
    """Each selection with its metrics, and `against`: [AUC less the reference's, its standard error over the rows]."""
    kinds, store = planted_in(found), _store(found)
    ranked = {stage["label"]: stage for stage in found.results["stages"] if stage["kind"] == "curate"}
    sides = {_named(label)["arm"]: _sides(store, stage, kinds) for label, stage in ranked.items()}
    for label, stage in ranked.items():
        named = _named(label)
        others = (name for name in REFERENCES if name in sides and name != named["arm"])
        against = {name: auc_difference(sides[named["arm"]], sides[name]) for name in others}
        metrics = {name: stage["metrics"][name] for name in ("rows", "pool", "ranking")}
        yield {"kind": "curate", "arm": named["arm"], "seed": int(named["seed"]), "cpu_seconds": stage["cpu_seconds"],
               "metrics": _rounded(metrics), "against": _rounded(against)}  # fmt: skip


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(part) for part in value]
    return int(value) if isinstance(value, float) and value == int(value) else round(value, 6)


def _store(found: Result) -> Store:
    return Store(found.folder / found.results["store"])


def _named(label: str) -> dict[str, str]:
    named = LABEL.fullmatch(label)
    assert named is not None, label
    return named.groupdict()


def _path(store: Store, stage: Mapping[str, Any], name: str) -> Path:
    artifact = store.find(stage["kind"], stage["key"])
    assert artifact is not None, f"the store lacks {stage['label']}"
    return artifact.path(name)


def _sides(store: Store, stage: Mapping[str, Any], kinds: Mapping[str, str]) -> Sides:
    scores = json.loads(_path(store, stage, "scores.json").read_text("utf-8"))
    sides: Sides = ([], [])
    for name, kind in kinds.items():
        sides[kind != GOOD].append(scores[name])
    return sides


def stored(runs: Sequence[Result]) -> dict[str, Any]:
    first = runs[0].results
    full = first["recipe"]
    pool = {**full["data"]["align"], "skip": "seed * limit"}
    recipe = {"model": full["model"], "data": {**full["data"], "align": pool},
              "seeds": [seed for found in runs for seed in found.results["recipe"]["seeds"]],
              "arms": [{"name": arm["name"], "curate": arm["curate"]} for arm in full["arms"]]}  # fmt: skip
    created = max(found.results["created"] for found in runs)
    pools = {str(seed): Counter(planted_in(found).values()) for seed, found in zip(recipe["seeds"], runs, strict=True)}
    return {"name": first["name"], "created": created, "versions": first["versions"], "disjoint_pools": pools,
            "recipe": recipe, "stages": [stage for found in runs for stage in stages(found)]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("apothecary-runs/curation-ranking"))
    asked = parser.parse_args()
    asked.out.write_text(text(stored(rank(asked.recipe, asked.work))), "utf-8")


if __name__ == "__main__":
    main()
