"""How far the selectors of a run agree: Spearman's correlation of their rankings of the same pool, seed by seed.

    python scripts/rank_agreement.py RUN [RUN ...] --out recipes/results/NAME_ranks.json

RUN is the folder of a run, whose store must still hold the scores; each pair of its selectors is compared.  What the
file holds of other seeds stays there.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import combinations
from pathlib import Path

from apothecary.errors import ApothecaryError
from apothecary.pipeline.results import Result, load_result
from apothecary.pipeline.store import Store
from apothecary.stats import rank_correlation


def scores(run: Result) -> dict[int, dict[str, dict[str, float]]]:
    """The scores of each selection by seed and arm, the first arm that uses it."""
    store = Store(run.folder / run.results["store"])
    stages = {stage["key"]: stage for stage in run.results["stages"]}
    found: dict[int, dict[str, dict[str, float]]] = {}
    seen = set()
    for model in run.results["models"]:
        for key in stages[model["artifact"]]["inputs"] if model["stage"] == "aligned" else ():
            selection = store.find("curate", key)
            if selection and key not in seen:
                seen.add(key)
                arm = model["arm"].rpartition(", ")[0] or model["arm"]
                scored = json.loads(selection.path("scores.json").read_text("utf-8"))
                found.setdefault(model["seed"], {})[arm] = scored
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    found: dict[str, dict[str, float]] = json.loads(asked.out.read_text("utf-8")) if asked.out.exists() else {}
    for run in asked.runs:
        for seed, ranked in scores(load_result(run)).items():
            for a, b in combinations(ranked, 2):
                found.setdefault(f"{a} | {b}", {})[str(seed)] = round(rank_correlation(ranked[a], ranked[b]), 4)
    lines = ",\n".join(f" {json.dumps(pair)}: {json.dumps(values)}" for pair, values in found.items())
    asked.out.write_text(f"{{\n{lines}\n}}\n", "utf-8")


if __name__ == "__main__":
    try:
        main()
    except ApothecaryError as error:
        sys.exit(f"error: {error}")
