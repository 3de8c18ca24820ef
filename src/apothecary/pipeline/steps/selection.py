"""The stage that curates: a selector scores a pool, and the best share of it stays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from apothecary.curate.keep import dropped, keep
from apothecary.data.rows import RowFile, write_rows
from apothecary.evals.ranking import planted, ranking
from apothecary.pipeline.steps import chain

if TYPE_CHECKING:
    from apothecary.pipeline.stage import Job


def curate(job: Job) -> Mapping[str, Any]:
    """scores.json and rows.jsonl: the share of the pool that the selector ranks highest."""
    rows = RowFile(job.inputs["rows"].path("rows.jsonl"))  # the pool need not fit in memory
    scores = chain.method(job).score(chain.bench(job), rows)
    kept = keep(scores, rows, job.config["keep"], job.config["seed"])
    (job.folder / "scores.json").write_text(json.dumps(scores, indent=0) + "\n", "utf-8")
    write_rows(job.folder / "rows.jsonl", kept)
    kinds = planted(rows)
    known = {"ranking": ranking(scores, kinds)} if kinds else {}
    counts = {"rows": len(kept), "pool": len(rows), "dropped": dropped(scores.values())}
    return {**counts, "work": float(len(rows)), **known}
