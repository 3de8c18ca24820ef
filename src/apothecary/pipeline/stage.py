"""A stage: configuration + input artifacts -> one artifact; and the executor that runs each of them at most once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from apothecary.config import canonical, to_dict
from apothecary.data.rows import Row, read_rows
from apothecary.errors import ApothecaryError, StoreError
from apothecary.pipeline import fingerprint, measure
from apothecary.pipeline.store import EVENTS, Artifact, Store, append_event, now, writing


def _never() -> None:
    """The default check: nobody asks to cancel."""


class Cancelled(ApothecaryError):
    """A run was asked to stop; what it finished is kept."""


@dataclass(frozen=True)
class Job:
    """What a stage's function works with; it writes its payload into `folder` and returns its metrics."""

    config: Mapping[str, Any]
    inputs: Mapping[str, Artifact]
    folder: Path
    check: Callable[[], None] = _never  # raises Cancelled when a stop was asked for
    progress: bool = False  # whether to draw progress bars
    cache: Path | None = None  # for answers that are costly to ask for again; no part of a result

    def rows(self, name: str) -> list[Row]:
        """The rows of an input artifact."""
        return read_rows(self.inputs[name].path("rows.jsonl"))

    def group(self, prefix: str) -> dict[str, Artifact]:
        """The inputs named `prefix`.NAME, by NAME."""
        return {
            name.removeprefix(f"{prefix}."): artifact
            for name, artifact in self.inputs.items()
            if name.startswith(f"{prefix}.")
        }


@dataclass(frozen=True, eq=False)
class Stage:
    """One step of the chain; two stages with the same key have the same result.

    `config` must say all that `run` reads.  `leaves` are digests of what comes from outside the store: files of rows,
    weights.  `modules` are the modules that `run` executes, its own included; their source is part of the key.
    """

    kind: str
    label: str
    run: Callable[[Job], Mapping[str, Any] | None]
    config: Mapping[str, Any]
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    leaves: Mapping[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()

    @cached_property
    def source(self) -> str:
        return fingerprint.source_digest(tuple(sorted({self.run.__module__, *self.modules})))

    @cached_property
    def key(self) -> str:
        """sha256 over everything that decides the result."""
        parts = {
            "kind": self.kind,
            "config": self.config,
            "inputs": {name: stage.key for name, stage in self.inputs.items()},
            "leaves": self.leaves,
            "source": self.source,
            "versions": fingerprint.key_versions(),
        }
        return hashlib.sha256(canonical(parts).encode()).hexdigest()

    def lineage(self) -> Iterator[Stage]:
        """The stages it needs, inputs first, itself last; one that is needed twice comes twice."""
        for stage in self.inputs.values():
            yield from stage.lineage()
        yield self


@dataclass
class Record:
    """What happened to a stage in this run."""

    stage: Stage
    artifact: Artifact
    cached: bool

    def to_json(self) -> dict[str, Any]:
        manifest = self.artifact.manifest
        return {
            "kind": self.stage.kind,
            "key": self.stage.key,
            "label": self.stage.label,
            "cached": self.cached,
            "seconds": manifest["seconds"],
            "cpu_seconds": manifest.get("cpu_seconds"),  # of this process's threads: hardly moved by other load
            "peak_memory_mb": manifest["peak_memory_mb"],
            "digest": self.artifact.digest,
            "inputs": [entry["key"] for entry in manifest["inputs"].values()],
            "metrics": manifest["metrics"],
        }


Emit = Callable[[str, str, dict[str, Any]], None]  # event, stage's label, detail
State = Literal["fresh", "missing", "stale"]


class Executor:
    """Runs stages against a store: what is cached is verified, what is missing is made, each key once."""

    def __init__(self, store: Store, check: Callable[[], None] = _never,
                 emit: Emit = lambda event, stage, detail: None, progress: bool = False) -> None:  # fmt: skip
        self.store, self.check, self.emit, self.progress = store, check, emit, progress
        self.records: dict[str, Record] = {}
        self._states: dict[str, State] = {}

    def state(self, stage: Stage) -> State:
        """Whether the store has the stage's result; raises StoreError if it, or an input still there, was altered.

        An input that has been deleted does no harm.  One that was made anew and came out differently (possible on a
        GPU) makes everything after it stale.
        """
        if stage.key not in self._states:
            self._states[stage.key] = self._inspect(stage)
        return self._states[stage.key]

    def _inspect(self, stage: Stage) -> State:
        states = {name: self.state(source) for name, source in stage.inputs.items()}
        found = self.store.find(stage.kind, stage.key)
        if found is None:
            return "missing"
        found.verify()
        recorded = found.manifest["inputs"]
        for name, source in stage.inputs.items():
            present = self.store.find(source.kind, source.key) if states[name] == "fresh" else None
            if states[name] == "stale" or (present and present.digest != recorded[name]["digest"]):
                return "stale"
        return "fresh"

    def execute(self, stage: Stage) -> Artifact:
        """The stage's artifact, from the store or made now with all that it needs."""
        if stage.key not in self.records:
            cached = self.state(stage) == "fresh"
            artifact = self.store.find(stage.kind, stage.key) if cached else self._make(stage)
            if artifact is None:
                raise StoreError(f"{self.store.folder(stage.kind, stage.key)} was deleted during the run; run again")
            if cached:
                self.emit("cached", stage.label, {"kind": stage.kind, "key": stage.key})
            self.records.setdefault(stage.key, Record(stage, artifact, cached))
        return self.records[stage.key].artifact

    def _make(self, stage: Stage) -> Artifact:
        inputs = {name: self.execute(source) for name, source in stage.inputs.items()}
        self.check()
        with self.store.lock(stage.kind, stage.key, lambda: self._wait(stage)):
            self._states.pop(stage.key, None)  # another process may have made it while we waited
            state = self.state(stage)
            if state == "fresh":
                self.emit("cached", stage.label, {"kind": stage.kind, "key": stage.key})
                artifact = Artifact(self.store.folder(stage.kind, stage.key))
                self.records[stage.key] = Record(stage, artifact, True)
                return artifact
            if state == "stale":
                self.store.set_aside(stage.kind, stage.key)
            artifact = self._build(stage, inputs)
        self._states[stage.key] = "fresh"
        return artifact

    def _wait(self, stage: Stage) -> None:
        self.emit("waiting", stage.label, {"kind": stage.kind, "key": stage.key})
        self.check()

    def _build(self, stage: Stage, inputs: dict[str, Artifact]) -> Artifact:
        with writing(f"the result of '{stage.label}'", self.store.root):
            folder = self.store.draft(stage.kind, stage.key)
            self.emit("started", stage.label, {"kind": stage.kind, "key": stage.key})
            append_event(folder / EVENTS, "started", stage.label, {"key": stage.key})
            measure.reset_peak()
            start, spent = time.perf_counter(), time.process_time()
            try:
                metrics = stage.run(Job(stage.config, inputs, folder, self.check, self.progress, self.store.cache))
            except BaseException as error:
                event = "cancelled" if isinstance(error, (Cancelled, KeyboardInterrupt)) else "failed"
                append_event(folder / EVENTS, event, stage.label, {"error": f"{type(error).__name__}: {error}"})
                raise
            seconds, spent = round(time.perf_counter() - start, 3), round(time.process_time() - spent, 3)
            append_event(folder / EVENTS, "finished", stage.label, {"seconds": seconds})
            manifest = {**_manifest(stage, inputs, metrics), "seconds": seconds, "cpu_seconds": spent}
            artifact = self.store.commit(stage.kind, stage.key, manifest)
        self.emit("finished", stage.label, {"kind": stage.kind, "key": stage.key, "seconds": seconds})
        return artifact


def _manifest(stage: Stage, inputs: Mapping[str, Artifact], metrics: Any) -> dict[str, Any]:
    return {
        "label": stage.label,
        "config": to_dict(stage.config),
        "seed": stage.config.get("seed"),
        "inputs": {name: {"kind": a.kind, "key": a.key, "digest": a.digest} for name, a in inputs.items()},
        "leaves": dict(stage.leaves),
        "source": stage.source,
        "versions": fingerprint.versions(),
        "metrics": to_dict(metrics or {}),
        "created": now(),
        **measure.peak_memory(),
        "host": measure.host(),
    }
