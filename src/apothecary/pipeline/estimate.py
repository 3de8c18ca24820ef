"""What a run will cost, for --dry-run: from earlier runs of the same kind of stage, else from a rule of thumb.

Rule of thumb, right within a factor of several: a row has 64 tokens; training takes 6 floating-point operations per
parameter and token, generating 2; a CPU does 5e10 of them in a second and a GPU 1e14.  Memory: the weights at their
precision plus 16 bytes (weight, gradient, Adam's two moments in fp32) per trained parameter, and on a CPU the loaded
libraries; activations not counted.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from apothecary.config import build
from apothecary.data.sources import load_rows
from apothecary.models.digest import resolve
from apothecary.models.settings import LoraSettings, ModelConfig
from apothecary.pipeline.plan import Plan
from apothecary.pipeline.stage import Executor, Stage
from apothecary.pipeline.store import Store

TOKENS_PER_ROW = 64
CPU_FLOPS, GPU_FLOPS = 5e10, 1e14
ROWS_SECONDS = 0.1  # a stage that works on rows alone
LIBRARIES_MB = 500  # Python with torch and transformers, resident


@dataclass(frozen=True)
class Estimate:
    """A planned stage; seconds and memory are None where nothing can be said (a model that is not downloaded)."""

    kind: str
    label: str
    key: str
    cached: bool
    seconds: float | None
    memory_mb: float | None
    basis: str  # cached, earlier runs, rule of thumb or unknown


def estimate(plan: Plan, store: Store) -> list[Estimate]:
    """One entry for each stage of a plan; reads sources to count rows, runs nothing, writes nothing."""
    executor = Executor(store)
    stages = plan.stages().values()
    manifests = {kind: store.manifests(kind) for kind in {stage.kind for stage in stages}}
    count = cache(lambda stage: _rows(stage, store, count))
    found = []
    for stage in stages:
        if executor.state(stage) == "fresh":
            found.append(Estimate(stage.kind, stage.label, stage.key, True, 0.0, None, "cached"))
        else:
            found.append(_one(stage, manifests[stage.kind], count))
    return found


def _one(stage: Stage, manifests: list[dict[str, Any]], count: Callable[[Stage], float]) -> Estimate:
    work, seconds, memory, basis = _work(stage, count), None, None, "unknown"
    like = _alike(stage, manifests)
    if like:
        seconds = median(m["seconds"] / m["metrics"]["work"] for m in like) * work
        memory, basis = max(m["peak_memory_mb"] for m in like), "earlier runs"
    elif "model" not in stage.config:
        seconds, basis = ROWS_SECONDS, "rule of thumb"
    elif parameters := parameter_count(build(ModelConfig, stage.config["model"])):
        speed = GPU_FLOPS if _gpu(stage.config["model"]) else CPU_FLOPS
        passes = 2 if stage.kind == "evaluate" else 6
        seconds = passes * parameters * TOKENS_PER_ROW * work / speed
        memory, basis = _memory(stage.config, parameters), "rule of thumb"
    return Estimate(stage.kind, stage.label, stage.key, False, seconds, memory, basis)


def _alike(stage: Stage, manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Earlier results of the same kind for the same model, of the same method if there are any."""
    model = stage.config.get("model", {}).get("path")
    usable = [m for m in manifests if m["metrics"].get("work") and m["config"].get("model", {}).get("path") == model]
    return [m for m in usable if m["config"].get("method") == stage.config.get("method")] or usable


def _work(stage: Stage, count: Callable[[Stage], float]) -> float:
    """Rows x epochs for training, prompts for evaluating, rows for the rest: what the stage's metrics call work."""
    if stage.kind == "evaluate":
        suites = [count(source) for name, source in stage.inputs.items() if name.startswith("suite.")]
        limit = stage.config["limit"]
        return sum(suites if limit is None else [min(limit, rows) for rows in suites])
    if stage.kind == "prepare":
        return sum(count(source) for name, source in stage.inputs.items() if name.startswith("aux."))
    if "rows" not in stage.inputs:
        return 1.0
    rows, train = count(stage.inputs["rows"]), stage.config.get("train")
    if train is None:
        return rows
    return train["max_steps"] * train["batch_size"] if train["max_steps"] > 0 else rows * train["epochs"]


def _rows(stage: Stage, store: Store, count: Callable[[Stage], float]) -> float:
    """How many rows a stage has made, or would make."""
    found = store.find(stage.kind, stage.key)
    if found is not None:
        return found.manifest["metrics"]["rows"]
    if stage.kind == "data":
        return len(load_rows(stage.config["source"], stage.config["role"]))
    if stage.kind == "curate":
        return round(stage.config["keep"] * count(stage.inputs["rows"]))
    return stage.config["fields"].get("n") or sum(count(source) for source in stage.inputs.values())


def _memory(config: Mapping[str, Any], parameters: int) -> float:
    model, train = config["model"], config.get("train") or _warm_up(config)
    wide = model["path"] == "lab" or model["dtype"] == "float32" or (model["dtype"] == "auto" and not _gpu(model))
    weight = 0.5 if model["quantization"] else 4 if wide else 2
    if train is None:
        total = weight * parameters
    elif train["parameters"] == "full":
        total = 16 * parameters
    else:  # a layer's square matrix of width d has d^2 weights and 2 r d in its adapter
        rank, width = build(LoraSettings, train["lora"]).rank, max(parameters / 150, 1) ** 0.5
        total = parameters * (weight + 16 * min(2 * rank / width, 1))
    return total / 2**20 + (0 if _gpu(model) else LIBRARIES_MB)


def _warm_up(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The training among a selector's settings, if it has one."""
    parts = (value for value in config.get("fields", {}).values() if isinstance(value, Mapping))
    return next((part for part in parts if "parameters" in part), None)


@cache
def parameter_count(config: ModelConfig) -> int | None:
    """Numbers in a model's safetensors files, read from their headers; None for a model that is not on this machine."""
    folder = Path(resolve(config))
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(config.path, "config.json", revision=config.revision)
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for dimension in tensor["shape"]:
                    size *= dimension
                total += size
    return total or None


def _gpu(model: Mapping[str, Any]) -> bool:
    return model["device"] == "cuda" or (model["device"] == "auto" and Path("/proc/driver/nvidia/version").exists())
