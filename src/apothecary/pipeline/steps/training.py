"""Stages that train or score: curate, align, prepare, finetune."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from apothecary.config import build
from apothecary.curate.keep import keep
from apothecary.data.rows import RowFile, write_rows
from apothecary.evals.ranking import planted, ranking
from apothecary.pipeline.steps import chain
from apothecary.registry import lookup
from apothecary.train.config import TrainConfig

if TYPE_CHECKING:
    from apothecary.pipeline.stage import Job


def _method(job: Job) -> Any:
    kind, name = job.config["kind"], job.config["method"]
    return build(lookup(kind, name), job.config["fields"], kind)


def curate(job: Job) -> Mapping[str, Any]:
    """scores.json and rows.jsonl: the share of the pool that the selector ranks highest."""
    rows = RowFile(job.inputs["rows"].path("rows.jsonl"))  # the pool need not fit in memory
    scores = _method(job).score(chain.bench(job), rows)
    kept = keep(scores, rows, job.config["keep"], job.config["seed"])
    (job.folder / "scores.json").write_text(json.dumps(scores, indent=0) + "\n", "utf-8")
    write_rows(job.folder / "rows.jsonl", kept)
    kinds = planted(rows)
    known = {"ranking": ranking(scores, kinds)} if kinds else {}
    return {"rows": len(kept), "pool": len(rows), "work": float(len(rows)), **known}


def prepare(job: Job) -> Mapping[str, Any]:
    """prepared/: what the method's training starts from, such as security vectors."""
    folder = job.folder / "prepared"
    folder.mkdir()
    found = _method(job).prepare(chain.bench(job), folder) or {}
    return {**found, "work": float(sum(len(job.rows(name)) for name in job.inputs if name.startswith("aux.")))}


def train(job: Job) -> Mapping[str, Any]:
    """adapter/ or weights/: the model after alignment or fine-tuning; the loss of each logged step in logs/."""
    from apothecary.train.fit import fit

    config = build(TrainConfig, job.config["train"], f"{job.config['kind']}.train")
    single = job.config.get("adapter") == "single"
    start = job.inputs["align"].path("adapter") if single else None
    rows = job.rows("rows")
    result = fit(chain.bench(job, aligned=not single), _method(job), rows, config, job.folder, start=start)
    logs = job.folder / "logs"
    logs.mkdir(exist_ok=True)
    (logs / "history.json").write_text(json.dumps(result.history, default=str) + "\n", "utf-8")
    seen = config.max_steps * config.batch_size if config.max_steps > 0 else len(rows) * config.epochs
    return {**result.metrics, "work": float(seen)}
