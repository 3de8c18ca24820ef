"""Run a recipe: every stage at most once, results after each evaluated model, stoppable and resumable at any moment."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from apothecary.errors import ConfigError
from apothecary.pipeline import preflight
from apothecary.pipeline.estimate import Estimate, estimate
from apothecary.pipeline.plan import KINDS, Plan, plan
from apothecary.pipeline.recipe import Recipe
from apothecary.pipeline.results import Result, collect
from apothecary.pipeline.stage import Cancelled, Executor, Stage
from apothecary.pipeline.store import EVENTS, Store, append_event, writing

ROOT = Path("apothecary-runs")
CANCEL = "CANCEL"  # a file of this name in the run's folder stops the run between two steps


@dataclass(frozen=True)
class Progress:
    """What a run reports while it goes."""

    event: Literal["run", "cached", "waiting", "started", "finished", "evaluated", "cancelled", "failed", "done"] | str
    stage: str  # label
    detail: Mapping[str, Any]  # kind, key, seconds, ...; and done, total: stages so far and in all


def dry_run(recipe: Recipe, store: str | Path = ROOT / "store") -> list[Estimate]:
    """What a run would do: each stage with whether it is cached, and an estimate of time and memory."""
    return estimate(plan(recipe), Store(store))


def run(
    recipe: Recipe | Mapping[str, Any],
    store: str | Path = ROOT / "store",
    out: str | Path | None = None,
    until: str = "evaluate",
    progress: Callable[[Progress], None] | None = None,
    on_update: Callable[[Result], None] | None = None,
    bars: bool = False,
) -> Result:
    """Run all stages that are not in the store yet and write results.json into `out`.

    `until` ends the run early: after all stages of kind curate, align, attack, prepare or finetune and what they need.
    `on_update` gets the result so far after each evaluated model.  `bars` draws training progress.  Raises Cancelled
    when the file CANCEL appears in `out` or on Ctrl-C; the same call continues.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.parse(recipe)
    if until not in KINDS:
        raise ConfigError(f"cannot run until '{until}', expected one of {', '.join(KINDS)}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a recipe runs in one process, which was launched as several; start it without torchrun, or "
                          "train by apothecary.train.fit (docs/guide.md)")  # fmt: skip
    folder = Path(out) if out is not None else ROOT / slug(recipe.name)
    planned = plan(recipe)
    with writing("the run", folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CANCEL).unlink(missing_ok=True)
    return _Run(planned, Store(store), folder, progress, on_update, bars).run(until)


def slug(name: str) -> str:
    """A run's name as a folder's."""
    return re.sub(r"[^\w.-]+", "-", name.lower()).strip("-.") or "run"


class _Run:
    def __init__(self, planned: Plan, store: Store, folder: Path, progress: Callable[[Progress], None] | None,
                 on_update: Callable[[Result], None] | None, bars: bool) -> None:  # fmt: skip
        self.plan, self.folder, self.progress, self.on_update = planned, folder, progress, on_update
        self.executor = Executor(store, self.check, self.emit, bars)
        self.total = len(planned.stages())

    def check(self) -> None:
        if (self.folder / CANCEL).exists():
            raise Cancelled(f"the run was cancelled ({self.folder / CANCEL}); run the same command again to continue")

    def emit(self, event: str, stage: str, detail: dict[str, Any]) -> None:
        with writing("the events", self.folder):
            append_event(self.folder / EVENTS, event, stage, detail)
        if self.progress:
            ended = {source.key for record in self.executor.records.values() for source in record.stage.lineage()}
            self.progress(Progress(event, stage, {**detail, "done": len(ended), "total": self.total}))

    def run(self, until: str) -> Result:
        self.emit("run", self.plan.recipe.name, {"until": until})
        try:
            self.check_overlaps()
            if not self.plan.recipe.allow_contradicting_rows:
                preflight.check_kinds(self.plan.rows_only(), self.executor)
            for stage in self.plan.rows_only():
                self.executor.execute(stage)
            preflight.check(self.needed(until).values(), self.executor)
            for stage in self.plan.of_kind(until) if until != "evaluate" else ():
                self.executor.execute(stage)
            result = self.evaluate() if until == "evaluate" else self.result([])
        except KeyboardInterrupt as error:
            self.emit("cancelled", self.plan.recipe.name, {})
            raise Cancelled("the run was interrupted; run the same command again to continue") from error
        except BaseException as error:
            event = "cancelled" if isinstance(error, Cancelled) else "failed"
            self.emit(event, self.plan.recipe.name, {"error": f"{type(error).__name__}: {error}"})
            raise
        self.emit("done", self.plan.recipe.name, {"results": str(self.folder)})
        return result

    def check_overlaps(self) -> None:
        """Refuse a defence that knows the attacker's prompts, unless that was asked for."""
        for arm, stage in self.plan.overlaps.items():
            metrics = self.executor.execute(stage).manifest["metrics"]
            if metrics["same"] and not self.plan.recipe.allow_same_harmful:
                raise ConfigError(
                    f"arm '{arm}': {metrics['same']} of the attacker's {metrics['attack_rows']} prompts are among the "
                    "defence's harmful rows; use another source, or set allow_same_harmful: true (results show it)"
                )

    def needed(self, until: str) -> dict[str, Stage]:
        """Every stage that the run goes through: those of kind `until` that are not there yet, and their lineage."""
        ends = [stage for stage in self.plan.of_kind(until) if self.executor.state(stage) != "fresh"]
        return {stage.key: stage for end in ends for stage in end.lineage()}

    def evaluate(self) -> Result:
        done = []
        result = Result(collect(self.plan, self.executor, self.folder, done), self.folder)  # nothing worth saving yet
        for model in self.plan.models:
            self.executor.execute(model.evaluation)
            done.append(model)
            result = self.result(done)
            detail = {"arm": model.arm, "stage": model.stage, "p": model.p, "seed": model.seed}
            self.emit("evaluated", model.evaluation.label, detail)
            if self.on_update:
                self.on_update(result)
        return result

    def result(self, done: list[Any]) -> Result:
        result = Result(collect(self.plan, self.executor, self.folder, done), self.folder)
        result.save()
        return result
