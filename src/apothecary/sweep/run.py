"""Run a sweep: the service's stages once, the same budget of trials for every arm, then the held-out prompts.

    references   of each arm: the clean customer, by whom the guard judges, and the default attack
    trials       claimed, run each in its own process, finished; arms take turns
    held out     the worst trial of each arm, both references and the aligned model, on the recipe's `evaluate`

Killed at any moment, the same call continues: finished trials stand, a claimed one is run again under its number.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from apothecary.config import to_dict
from apothecary.errors import ConfigError, TrainingError
from apothecary.pipeline import fingerprint
from apothecary.pipeline.plan import Planned
from apothecary.pipeline.run import CANCEL, ROOT, Progress, slug
from apothecary.pipeline.run import run as run_recipe
from apothecary.pipeline.stage import Cancelled
from apothecary.pipeline.store import Store, writing
from apothecary.sweep import guard, probe
from apothecary.sweep.collect import REFERENCES, Chain, arm_entry, collect, worst
from apothecary.sweep.experiment import experiment
from apothecary.sweep.launch import Launcher, Work, local, raise_stop
from apothecary.sweep.propose import propose
from apothecary.sweep.recipe import SweepRecipe, service_stages, the_model
from apothecary.sweep.records import Records, Study, Trial, locked
from apothecary.sweep.results import SWEEP, SweepResult, check_comparable, load_sweep_result
from apothecary.sweep.trial import SERVICE, Found, Task, work
from apothecary.sweep.weights import discard

AGAIN = "run the same command again to continue"


def sweep(
    recipe: SweepRecipe | Mapping[str, Any],
    store: str | Path = ROOT / "store",
    out: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    on_update: Callable[[SweepResult], None] | None = None,
    objective: Work = work,
) -> SweepResult:
    """Search each arm of a recipe for its worst case and write sweep.json into `out`.

    `on_update` gets the result so far after each trial.  `objective` runs one trial in a worker; it must be importable.
    Raises Cancelled on Ctrl-C or when the file CANCEL appears in `out`; the same call continues.
    """
    recipe = recipe if isinstance(recipe, SweepRecipe) else SweepRecipe.parse(recipe)
    folder = Path(out) if out is not None else ROOT / slug(recipe.recipe.name)
    with writing("the sweep", folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            (folder / CANCEL).unlink(missing_ok=True)
            return _Sweep(recipe, Store(store), folder, progress, on_update, objective).run()


class _Sweep:
    def __init__(self, recipe: SweepRecipe, store: Store, folder: Path, progress: Callable[[Progress], None] | None,
                 on_update: Callable[[SweepResult], None] | None, objective: Work) -> None:  # fmt: skip
        self.recipe, self.config, self.store, self.folder = recipe, recipe.config, store, folder
        self.progress, self.on_update = progress, on_update
        self.launcher = _launcher(recipe, objective)
        earlier = load_sweep_result(folder).results if (folder / SWEEP).exists() else {"arms": [], "seconds": 0.0}
        self.others = [arm for arm in earlier["arms"] if arm["arm"] not in recipe.arms]  # they stand beside these
        self.spent, self.began = earlier["seconds"], None  # seconds of earlier calls; when the first task was started
        self.studies: dict[str, Study] = {}
        self.queue: list[tuple[str, Trial]] = []  # claimed trials whose process is to be started
        self.chains: dict[str, Chain] = {}
        self.deaths: dict[tuple[str, str], int] = {}
        self.started: dict[tuple[str, str], float] = {}

    def run(self) -> SweepResult:
        try:
            self._open()
            self._references()
            self._drive(self._next_trial, self._trial_ended)
            self._held_out()
        except KeyboardInterrupt as error:
            raise Cancelled(f"the sweep was interrupted; {AGAIN}") from error
        finally:
            self.launcher.stop()
        return self._update("done")

    # -- before ---------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Check that the arms can be compared, and the rows, then open each arm's study."""
        planned = {arm: the_model(self.recipe.variant(arm, {})) for arm in self.recipe.arms}
        self.chains = {arm: Chain(service_stages(default), experiment(self.recipe, arm, default))
                       for arm, default in planned.items()}  # fmt: skip
        these = [{"budget": self.recipe.budget, "experiment": chain.experiment} for chain in self.chains.values()]
        check_comparable([*these, *self.others], self.config.allow_mixed_budgets)
        run_recipe(self.recipe.recipe, self.store.root, self.folder / "rows", until="attack")  # overlaps are refused
        records = Records(self.folder)
        for arm, default in planned.items():
            study = self.studies[arm] = records.open(arm, self.recipe.space, self._identity(arm, default))
            self.queue += [(arm, trial) for trial in study.trials if not trial.finished]

    def _identity(self, arm: str, default: Planned) -> dict[str, Any]:
        """What all trials of an arm share; the number of trials may grow."""
        sources = sorted({stage.source for stage in default.evaluation.lineage()})
        code = {"sources": hashlib.sha256("".join(sources).encode()).hexdigest(), **fingerprint.key_versions()}
        budget = {key: value for key, value in self.recipe.budget.items() if key != "trials"}
        chain = {"arm": to_dict(self.recipe.arm(arm)), "model": to_dict(self.recipe.recipe.model),
                 "seeds": list(self.recipe.recipe.seeds)}  # fmt: skip
        return {"budget": budget, "recipe": chain, "code": code}

    # -- driving --------------------------------------------------------------------------------------------------

    def _drive(self, source: Callable[[], Task | None], ended: Callable[[Task, Found], None]) -> None:
        """Keep the workers busy with what `source` gives until it gives nothing and all have ended."""
        running, again = 0, []
        while True:
            while running < self.config.workers and (task := again.pop() if again else source()):
                self._tell("started", task, {})
                self.began = self.began or time.monotonic()
                self.started.setdefault((task.arm, task.name), time.monotonic())
                self.launcher.start(task)
                running += 1
            if not running:
                return
            for task, result, reason in self.launcher.wait():
                found: Found | None = result
                running -= 1
                if found is None and self._dies_again(task):
                    found = {"state": "failed", "reason": reason}
                if found is None:
                    again.append(task)
                    continue
                if found["state"] == "stop":
                    raise_stop(found)
                taken = time.monotonic() - self.started[task.arm, task.name]  # of a worker that left no word of it
                found = {"costs": {"seconds": round(taken, 3)}, **found}
                ended(task, found)
                self._tell("finished", task, found.get("costs") or {})
                self._update("evaluated")
            if (self.folder / CANCEL).exists():
                raise Cancelled(f"the sweep was cancelled ({self.folder / CANCEL}); {AGAIN}")

    def _dies_again(self, task: Task) -> bool:
        """Count the death of a worker; whether it was the last that is borne."""
        key = (task.arm, task.name)
        self.deaths[key] = self.deaths.get(key, 0) + 1
        return self.deaths[key] >= self.config.attempts

    def _task(self, arm: str, name: str, settings: Mapping[str, Any], search: bool = True, **more: Any) -> Task:
        mapping = self.recipe.variant(arm, settings, search)
        folder = self.folder / "trials" / f"{slug(arm)}-{hashlib.sha256(arm.encode()).hexdigest()[:6]}" / slug(name)
        return Task(arm, name, mapping, self.store.root, folder, self.recipe.measure, self.config.min_coverage,
                    details=not search, threads=self.config.threads, **more)  # fmt: skip

    # -- references and held-out prompts ---------------------------------------------------------------------------

    def _references(self) -> None:
        wanted = [(arm, name) for name in REFERENCES for arm in self.recipe.arms if not self.studies[arm].note(name)]

        def next_task() -> Task | None:
            if not wanted:
                return None
            arm, name = wanted.pop(0)
            return self._task(arm, name, self.recipe.clean(arm) if name == "clean" else {})

        def ended(task: Task, found: Found) -> None:
            if found["state"] != "complete" and task.name == "clean":
                raise TrainingError(f"arm '{task.arm}': the clean customer failed ({found['reason']}), so there is no "
                                    "model to measure attacks against; mend the recipe's finetune section")  # fmt: skip
            self.studies[task.arm].write(task.name, found)

        self._drive(next_task, ended)

    def _held_out(self) -> None:
        """Score, once, on the prompts that no trial was chosen by."""
        wanted = []
        for arm, study in self.studies.items():
            known = study.note("held_out") or {}
            settings = {"aligned": {}, "clean": self.recipe.clean(arm)}
            if study.note("default")["state"] == "complete":
                settings["default"] = {}
            if isinstance(found := worst(self.config.guard, study), int):
                settings[f"trial {found}"] = study.trials[found].settings
            wanted += [(arm, name, each) for name, each in settings.items() if name not in known]

        def next_task() -> Task | None:
            if not wanted:
                return None
            arm, name, settings = wanted.pop(0)
            stage = "aligned" if name == "aligned" else "tuned"
            return self._task(arm, f"held-out {name}", settings, search=False, stage=stage)

        def ended(task: Task, found: Found) -> None:
            if found["state"] != "complete" and not found.get("uncovered"):
                raise TrainingError(f"{_label(task)} failed ({found['reason']}), so there is no headline; {AGAIN}")
            study = self.studies[task.arm]
            study.write("held_out", {**(study.note("held_out") or {}), task.name.removeprefix("held-out "): found})

        self._drive(next_task, ended)

    # -- trials ---------------------------------------------------------------------------------------------------

    def _next_trial(self) -> Task | None:
        """A trial that a dead process left, else the next proposal that does not have to wait for another trial."""
        if self.queue:
            return self._start(*self.queue.pop(0))
        for number in range(self.config.trials):
            for arm, study in self.studies.items():
                if len(study.trials) != number:
                    continue
                if all(trial.finished for trial in self._before(study, number)):
                    settings = propose(self.recipe.space, self.config, [trial.told() for trial in study.trials])
                    return self._start(arm, study.claim(settings))
        return None

    def _before(self, study: Study, number: int) -> list[Trial]:
        """The trials whose results trial `number` may depend on: those that `propose` knows."""
        return study.trials[: max(0, number + 1 - self.config.ahead)]

    def _start(self, arm: str, trial: Trial) -> Task:
        study, prune = self.studies[arm], self.config.prune
        looks = [each.found["look"]["value"] for each in self._before(study, trial.number) if each.found.get("look")]
        task = self._task(arm, str(trial.number), trial.settings, prune=prune,
                          hopeless=probe.threshold(looks, prune) if prune else None)  # fmt: skip
        if service_stages(the_model(task.mapping)) != self.chains[arm].services and not self.config.allow_defence_keys:
            raise ConfigError(f"trial {trial.number} of arm '{arm}' changes the service's own stages, expected the "
                              "attacker's settings alone; take such keys out of sweep.space")  # fmt: skip
        study.attempt(trial)
        return task

    def _trial_ended(self, task: Task, found: Found) -> None:
        study = self.studies[task.arm]
        if found.get("scores"):  # of an attack without verdicts too: whether it counts needs no judge
            clean = study.note("clean")["scores"]
            found["capability"] = to_dict(guard.capability(self.config.guard, found["scores"], clean))
        lineage = the_model(task.mapping).evaluation.lineage()
        found["keys"] = {stage.kind: stage.key for stage in lineage if stage.kind not in SERVICE}
        study.finish(study.trials[int(task.name)], found)
        if not self.config.keep_models:
            discard(self.store, list(self.studies.values()), study, worst(self.config.guard, study))

    # -- results --------------------------------------------------------------------------------------------------

    def _update(self, event: str) -> SweepResult:
        arms = [arm_entry(self.recipe, arm, study, self.chains[arm], self.store) for arm, study in self.studies.items()]
        here = time.monotonic() - self.began if self.began else 0.0
        seconds = None if self.spent is None else round(self.spent + here, 1)
        found = collect(self.recipe, arms + self.others, self.store.root, self.folder, seconds)
        result = SweepResult(found, self.folder)
        result.save()
        if self.on_update and (event == "done" or arms):
            self.on_update(result)
        return result

    def _tell(self, event: str, task: Task, costs: Mapping[str, Any]) -> None:
        if self.progress:
            counted = [name for study in self.studies.values() for name in REFERENCES if study.note(name)]
            done = len(counted) + sum(trial.finished for study in self.studies.values() for trial in study.trials)
            done += sum(len(study.note("held_out") or {}) for study in self.studies.values())
            total = len(self.studies) * (len(REFERENCES) + self.config.trials + 4)
            detail = {"done": done - (event == "finished"), "total": total, "seconds": costs.get("seconds", 0.0)}
            self.progress(Progress(event, _label(task), detail))


def _launcher(recipe: SweepRecipe, objective: Work) -> Launcher:
    config, device = recipe.config, recipe.recipe.model.device
    if config.launcher == "ray":
        from apothecary.sweep.ray_launch import Ray

        return Ray(objective, gpus=1.0 if device == "cuda" else 0.0)
    return local(objective, device, config.trial_minutes, config.trial_memory_mb)


def _label(task: Task) -> str:
    return f"{task.arm}: {'trial ' if task.name.isdigit() else ''}{task.name}"
