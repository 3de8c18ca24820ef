"""The model at a point of the chain: base, then what alignment and fine-tuning have made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apothecary.config import build
from apothecary.models.settings import ModelConfig
from apothecary.registry import lookup

if TYPE_CHECKING:
    from apothecary.models.load import LoadedModel
    from apothecary.pipeline.stage import Job
    from apothecary.pipeline.store import Artifact
    from apothecary.train.workbench import Workbench


def parts(inputs: Mapping[str, Artifact]) -> tuple[Path | None, list[Path]]:
    """(weights, adapters) for `load_model`: full weights replace all before them, a single adapter the one before."""
    weights, adapters = None, []
    for name in ("align", "finetune", "tamper"):
        artifact = inputs.get(name)
        if artifact is None:
            continue
        if (artifact.folder / "weights").is_dir():
            weights, adapters = artifact.path("weights"), []
        elif artifact.manifest["config"].get("adapter") == "single":
            adapters = [artifact.path("adapter")]
        else:
            adapters.append(artifact.path("adapter"))
    return weights, adapters


def load(job: Job, aligned: bool = True) -> LoadedModel:
    """The model of a stage's inputs; without the alignment's adapter if not `aligned`."""
    from apothecary.models.load import load_model

    config = build(ModelConfig, job.config["model"], "model")
    weights, adapters = parts(job.inputs if aligned else {})
    if weights is not None:
        config = replace(config, adapter=None)  # full weights already hold it
    return load_model(config, adapters, weights)


def bench(job: Job, aligned: bool = True) -> Workbench:
    """What a method works on, with torch's random state set by the stage's seed."""
    import torch

    from apothecary.train.workbench import Workbench

    torch.manual_seed(job.config["seed"])
    prepared = job.inputs.get("prepared")
    return Workbench(
        source=partial(load, job, aligned),
        aux={role: job.rows(f"aux.{role}") for role in job.group("aux")},
        seed=job.config["seed"],
        folder=job.folder,
        prepared=prepared.path("prepared") if prepared else None,
        stop=job.check,
        progress=job.progress,
        allow_contradicting_rows=job.config.get("allow_contradicting_rows", False),
    )


def method(job: Job) -> Any:
    """The method of a stage with its hyper-parameters."""
    kind = job.config["kind"]
    return build(lookup(kind, job.config["method"]), job.config["fields"], kind)
