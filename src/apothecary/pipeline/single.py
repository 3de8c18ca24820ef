"""One stage alone, from files to files: what the verbs curate, align, attack, finetune and evaluate call.

A chain is better run from a recipe: `pipeline.run` caches, resumes and verifies; these functions do not.  Each returns
what it measured.  A result is complete or absent; beside rows lies ROWS.manifest.json, a trained model has model.json.
`allow_contradicting_rows` lets rows pass whose answers contradict their role (train/contradiction.py).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from apothecary.config import build, to_dict
from apothecary.data.mixing import composition
from apothecary.data.rows import Row, digest
from apothecary.data.sources import DataSource, load_rows
from apothecary.errors import ConfigError, StoreError
from apothecary.models.settings import ModelConfig
from apothecary.pipeline import exams, fingerprint, lineage, measure
from apothecary.pipeline.model_folder import Chained, new_folder, read_model, scratch_folder, without_places
from apothecary.pipeline.results import Result
from apothecary.pipeline.store import now, write_atomic, writing
from apothecary.registry import lookup
from apothecary.train.config import TrainConfig
from apothecary.train.contradiction import refuse_contradiction

if TYPE_CHECKING:
    from apothecary.data.inspect import Inspection
    from apothecary.train.method import Method
    from apothecary.train.workbench import Workbench

Source = str | Path | Mapping[str, Any] | DataSource
Model = str | Path | Mapping[str, Any] | ModelConfig
Sources = Mapping[str, Source]  # by role
Settings = Mapping[str, Any]  # hyper-parameters of a method, or of training
NONE: Mapping[str, Any] = {}


def inspect(data: Source, model: Model = "lab", max_length: int | None = None) -> Inspection:
    """Rows as the model will see them, and what would trouble training; `max_length` in tokens, else the context."""
    rows = load_rows(data)
    base = read_model(model).base
    from apothecary.data.inspect import inspect as look
    from apothecary.models.load import load_tokenizer

    tokenizer, context = load_tokenizer(base)
    limit = min((length for length in (max_length, context) if length), default=None)
    if limit is None:
        raise ConfigError(f"model '{base.path}' states no context length; give max_length")
    return look(rows, tokenizer, limit)


def curate(
    data: Source,
    out: str | Path,
    method: str = "random",
    keep: float = 0.5,
    *,
    model: Model = "lab",
    aux: Sources = NONE,
    settings: Settings = NONE,
    seed: int = 0,
    allow_contradicting_rows: bool = False,
) -> dict[str, Any]:
    """Write the share `keep` of the rows that a selector ranks highest to the file `out`."""
    from apothecary.curate.keep import keep as choose

    selector, chain = _method("curate", method, settings), read_model(model)
    _refuse_folder(Path(out))
    rows = load_rows(data, "align")
    extra = _aux(selector, aux, allow_contradicting_rows)
    clock = _Clock()
    choose({row.id: 0.0 for row in rows}, rows, keep, seed)  # a wrong share is told before the work
    selector.check(keep)
    with scratch_folder(Path(out)) as folder:
        kept = choose(selector.score(_bench(chain, extra, seed, folder), rows), rows, keep, seed)
    used = {"data": _described(data, rows), "aux": _all_described(aux, extra), **chain.described()}
    manifest = _manifest("curate", method, selector, seed, clock, keep=keep, pool=len(rows), **used)
    return _write_rows(Path(out), kept, manifest)


def attack(
    out: str | Path,
    method: str = "harmful_mix",
    *,
    data: Sources,
    settings: Settings = NONE,
    model: Model = "lab",
    seed: int = 0,
    allow_contradicting_rows: bool = False,
) -> dict[str, Any]:
    """Write the rows that a customer uploads, some harmful, to the file `out`; `data` by role: customer, attack.

    An attack that edits weights writes a model folder instead.  `model` is what an attacker looks at who needs to, or
    whose weights he edits; he knows no defence: adapting takes a recipe.
    """
    attacker, chain = _method("attack", method, settings), read_model(model)
    if not attacker.tampers():
        _refuse_folder(Path(out))
    given = _aux(attacker, data, allow_contradicting_rows)
    clock = _Clock()
    if attacker.tampers():
        return _tamper(chain, attacker, given, seed, Path(out), clock)
    with scratch_folder(Path(out)) as folder:
        rows = attacker.rows(given, seed, _bench(chain, given, seed, folder) if attacker.needs.model else None)
    used = {"data": _all_described(data, given), **(chain.described() if attacker.needs.model else {})}
    return _write_rows(Path(out), rows, _manifest("attack", method, attacker, seed, clock, **used))


def _tamper(
    chain: Chained, attacker: Any, given: Mapping[str, Sequence[Row]], seed: int, out: Path, clock: _Clock
) -> dict[str, Any]:
    from apothecary.pipeline.steps.attacking import write_edited

    with new_folder(out) as folder, scratch_folder(out) as scratch:
        bench = _bench(chain, given, seed, scratch)
        found = write_edited(bench.loaded.model, attacker.edit(bench), folder)
        used = {"data": {"composition": composition([])}, "from": chain.described()}
        entry = _manifest("attack", attacker.name, attacker, seed, clock, **used, **found)
        chain.grown(entry, single=False).write(folder)
    return entry


def align(
    data: Source,
    out: str | Path,
    method: str = "sft",
    *,
    model: Model = "lab",
    aux: Sources = NONE,
    settings: Settings = NONE,
    train: Settings = NONE,
    seed: int = 0,
    bars: bool = False,
    allow_contradicting_rows: bool = False,
) -> dict[str, Any]:
    """Train a model on safe answers; the new folder `out` holds it (see model_folder.py)."""
    return _train("align", data, Path(out), method, model, aux, settings, train, seed, False, bars,
                  allow_contradicting_rows)  # fmt: skip


def finetune(
    data: Source,
    out: str | Path,
    method: str = "sft",
    *,
    model: Model = "lab",
    aux: Sources = NONE,
    settings: Settings = NONE,
    train: Settings = NONE,
    adapter: Literal["merged", "single"] | str = "merged",
    seed: int = 0,
    bars: bool = False,
    allow_contradicting_rows: bool = False,
) -> dict[str, Any]:
    """Train a model on a customer's rows; the new folder `out` holds it.

    `adapter`: "merged" trains a fresh adapter over all earlier ones, "single" goes on with the last one.
    """
    if adapter not in ("merged", "single"):
        raise ConfigError(f"adapter is '{adapter}', expected merged or single")
    return _train("finetune", data, Path(out), method, model, aux, settings, train, seed, adapter == "single", bars,
                  allow_contradicting_rows)  # fmt: skip


def evaluate(model: Model, out: str | Path, settings: Settings = NONE) -> dict[str, Any]:
    """Ask a model the prompts of `settings` (an EvalConfig; by default the lab's held-out ones) and judge its answers.

    The new folder `out` gets responses.jsonl, scores.json and results.json; returns the content of the last.
    """
    from apothecary.evals.suites import SUITES, EvalConfig, load_suites

    given = {key: value for key, value in settings.items() if value is not None}
    if any(name in given for name in SUITES):
        given |= {name: _sources(given.get(name, [])) for name in SUITES}
    config = build(EvalConfig, given, "evaluate")
    config.check()
    judge, *judges = config.make_judges()
    chain, suites = read_model(model), load_suites(config)
    with new_folder(out) as folder:
        from apothecary.evals.evaluation import backend, write_evaluation
        from apothecary.evals.evaluation import evaluate as ask
        from apothecary.models.load import load_model

        clock = _Clock()
        loaded = chain.load()
        base = (load_model(chain.base) if chain.lineage else loaded) if config.against_base else None
        found = ask(loaded, suites, judge, config.max_new_tokens, config.batch_size, judges=judges, base=base,
                    task_kind=config.task_kind, task_tokens=config.task_tokens,
                    min_coverage=config.min_coverage, harness=config.lm_eval,
                    generate=backend(config.backend))  # fmt: skip
        write_evaluation(folder, found)
        cost = {"generation": found.generation, **clock.stop()}
        scores = exams.with_exam(found.scores, exams.reports(config))
        entry = lineage.entry(chain, Path(out).name, scores, found.responses, cost)
        results = {
            "name": Path(out).name,
            "created": now(),
            "complete": True,
            "versions": fingerprint.versions(),
            "store": "",
            "recipe": without_places({"model": to_dict(chain.base), "evaluate": to_dict(config)}),
            "models": [entry],
            "stages": [],
        }
        Result(results, folder).save()
    return results


# -- training ---------------------------------------------------------------------------------------------------------


def _train(
    kind: str,
    data: Source,
    out: Path,
    method: str,
    model: Model,
    aux: Sources,
    settings: Settings,
    train: Settings,
    seed: int,
    single: bool,
    bars: bool,
    allow: bool,
) -> dict[str, Any]:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"{kind} runs in one process, which was launched as several; start it without torchrun, or "
                          "train by apothecary.train.fit (docs/guide.md)")  # fmt: skip
    chosen, config = _method(kind, method, settings), build(TrainConfig, train, "train")
    chain = read_model(model)
    chosen.check(config, chain.base)
    if single and not (chain.adapters and config.parameters == "lora"):
        raise ConfigError(
            "adapter: single goes on training a model's LoRA adapter; give a folder that align wrote with LoRA, "
            "or choose merged"
        )
    rows = [row if row.role else row.with_role(_ROLE[kind]) for row in load_rows(data)]
    extra = _aux(chosen, aux, allow)
    with new_folder(out) as folder:
        clock = _Clock()
        metrics = _fit(chain, chosen, rows, extra, config, seed, folder, single, bars)
        used = {
            "train": to_dict(config),
            "adapter": "single" if single else "merged",
            "scale": _scale(folder),
            "data": _described(data, rows),
            "aux": _all_described(aux, extra),
            "from": chain.described(),
        }
        entry = _manifest(kind, method, chosen, seed, clock, **used, **metrics)
        chain.grown(entry, single).write(folder)
    return entry


_ROLE = {"align": "align", "finetune": "customer"}


def _scale(folder: Path) -> float | None:
    """LoRA's s = alpha / rank of the adapter in `folder` (methods.md 1.3); None for full weights."""
    if not (folder / "adapter").is_dir():
        return None
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text("utf-8"))
    return settings["lora_alpha"] / settings["r"]


def _fit(
    chain: Chained,
    method: Any,
    rows: Sequence[Row],
    aux: Mapping[str, Sequence[Row]],
    config: TrainConfig,
    seed: int,
    folder: Path,
    single: bool,
    bars: bool,
) -> dict[str, Any]:
    """Train into `folder`; what the method prepares and the checkpoints are taken away at the end."""
    from apothecary.train.fit import fit

    scratch = folder / "scratch"
    prepared = scratch / "prepared"
    prepared.mkdir(parents=True)
    found = {}
    if method.needs.prepared:
        found = {"prepared": method.prepare(_bench(chain, aux, seed, scratch / "prepare", bars), prepared)}
    start = chain.adapters[-1] if single else None
    before = replace(chain, adapters=chain.adapters[:-1]) if single else chain
    bench = _bench(before, aux, seed, scratch / "train", bars)
    bench.prepared = prepared if method.needs.prepared else None
    result = fit(bench, method, rows, config, folder, start=start)
    shutil.rmtree(scratch)
    return {**{key: result.metrics[key] for key in ("steps", "loss", "rows")}, **found}


def _bench(chain: Chained, aux: Mapping[str, Sequence[Row]], seed: int, folder: Path, bars: bool = False) -> Workbench:
    import torch

    from apothecary.train.workbench import Workbench

    torch.manual_seed(seed)
    # `_aux` has looked at the rows, where that was asked for
    return Workbench(chain.load, aux, seed, folder, progress=bars, allow_contradicting_rows=True)


# -- what all share ---------------------------------------------------------------------------------------------------


class _Clock:
    """Time and memory of a stage."""

    def __init__(self) -> None:
        measure.reset_peak()
        self.start = time.perf_counter()

    def stop(self) -> dict[str, Any]:
        return {"seconds": round(time.perf_counter() - self.start, 3), **measure.peak_memory(), "host": measure.host()}


def _method(kind: str, name: str, settings: Settings) -> Any:
    return build(lookup(kind, name), settings, "")


def _aux(method: Method, given: Sources, allow: bool) -> dict[str, list[Row]]:
    """The rows of each role; ConfigError for a role that the method needs and nobody gave, DataError for rows whose
    answers contradict their role, unless they are allowed to.
    """
    for role in method.needs.every_role:
        if role not in given:
            option = "harmful" if method.kind == "attack" and role == "attack" else role
            raise ConfigError(
                f"{method.kind} method '{method.name}' needs rows of role '{role}'; give --{option} SOURCE"
            )
    found = {role: load_rows(source, role) for role, source in given.items()}
    for role, rows in () if allow else found.items():
        refuse_contradiction(role, rows)
    return found


def _manifest(kind: str, name: str, method: Any, seed: int, clock: _Clock, **used: Any) -> dict[str, Any]:
    """What made a result, when, with which code and libraries, and what it cost."""
    module = type(method).__module__
    own = (module,) if module.startswith("apothecary.") else ()
    return {
        "kind": kind,
        "method": name,
        "settings": to_dict(method),
        "seed": seed,
        **used,
        "created": now(),
        "source": fingerprint.source_digest((__name__, *own)),
        "versions": fingerprint.versions(),
        **clock.stop(),
    }


def _described(source: Source, rows: Sequence[Row]) -> dict[str, Any]:
    """Where rows came from and what they are; "made", if curate or attack wrote them, says how."""
    parsed, found = DataSource.parse(source), digest(rows)
    described = {"source": to_dict(parsed), "digest": found, "composition": composition(rows)}
    with suppress(OSError, ValueError, KeyError):
        manifest = json.loads(_beside(Path(parsed.path)).read_text("utf-8"))
        if manifest["digest"] == found:  # all of these rows, and as they were written
            described["made"] = {key: manifest[key] for key in ("kind", "method", "settings", "seed")}
            described["made"] |= {"keep": manifest["keep"]} if "keep" in manifest else {}
    return described


def _all_described(sources: Sources, rows: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    return {role: _described(sources[role], found) for role, found in rows.items()}


def _beside(rows: Path) -> Path:
    return rows.with_name(f"{rows.name}.manifest.json")


def _refuse_folder(out: Path) -> None:
    """A folder cannot be replaced by a file of rows; told before the work."""
    if out.is_dir():
        raise StoreError(f"{out} is a folder, expected the name of a file; for example {out / 'rows.jsonl'}")


def _write_rows(out: Path, rows: Sequence[Row], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The rows and, before them, the manifest: rows are never without one."""
    full = {**manifest, "rows": len(rows), "composition": composition(rows), "digest": digest(rows)}
    with writing("the rows", out.parent):
        write_atomic(_beside(out), json.dumps(full, indent=1, ensure_ascii=False) + "\n")
        write_atomic(out, "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows))
    return full


def _sources(value: Any) -> list[DataSource]:
    return [DataSource.parse(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
