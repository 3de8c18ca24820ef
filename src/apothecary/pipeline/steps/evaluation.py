"""The stage that asks a model the held-out prompts and scores its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apothecary.config import build, to_dict
from apothecary.data.sources import file_digest
from apothecary.evals.evaluation import backend, write_evaluation
from apothecary.evals.evaluation import evaluate as ask
from apothecary.evals.leakage import Leakage
from apothecary.evals.lm_eval import Harness
from apothecary.evals.suites import EvalConfig, asked, likelihood
from apothecary.judge.base import make_judge
from apothecary.judge.cache import kept
from apothecary.pipeline.steps import chain
from apothecary.registry import lookup
from apothecary.train.method import Serving

if TYPE_CHECKING:
    from apothecary.data.rows import Row
    from apothecary.models.load import LoadedModel
    from apothecary.pipeline.stage import Job

PLAIN = ("limit", "min_coverage", "task_kind", "max_new_tokens", "task_tokens", "batch_size", "truthfulqa", "leakage",
         "lm_eval", "against_base", "backend")  # fmt: skip
LATER = ("align", "finetune", "tamper")  # inputs that make a model another one than the base


def settings(config: EvalConfig) -> dict[str, Any]:
    """What decides an evaluation beside the rows: in the stage's configuration, hence in its key.

    A judge is there with its identity, which also tells of files that it reads, such as its policy.
    """
    judges = [{"method": name, "settings": given, "identity": made.identity()}
              for (name, given), made in zip(config.choices(), config.make_judges(), strict=True)]  # fmt: skip
    plain = {name: to_dict(getattr(config, name)) for name in PLAIN}
    return {**plain, "judge": judges[0]["method"], "judges": judges}


def leaves(config: EvalConfig) -> dict[str, str]:
    """Digests of what an evaluation reads beside rows and weights: files that are named, and the harness's version."""
    found = {"truthfulqa": file_digest(config.truthfulqa)} if config.truthfulqa else {}
    if config.lm_eval:
        found["lm_eval"] = version("lm_eval")
        folder = Path(config.lm_eval.folder).expanduser() if config.lm_eval.folder else None
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder else []
        found |= {f"lm_eval/{path.relative_to(folder)}": file_digest(path) for path in files if folder}
    return found


def suites(job: Job) -> dict[str, list[Row]]:
    """The rows of each suite, from all its sources."""
    found: dict[str, list[Row]] = {}
    for name in job.group("suite"):
        found.setdefault(name.split(".")[0], []).extend(job.rows(f"suite.{name}"))
    given = job.config["leakage"]
    leakage = build(Leakage, given, "evaluate.leakage") if given else None
    limit = job.config["limit"]
    return {**asked(found, limit), **likelihood(job.config["truthfulqa"], leakage, limit)}


def evaluate(job: Job) -> Mapping[str, Any]:
    """responses.jsonl and scores.json; the metrics say in which dtype, and how far batches changed the text."""
    import torch

    torch.manual_seed(0)
    prompts, config, loaded = suites(job), job.config, chain.load(job)
    judge, *judges = (kept(make_judge(one["method"], one["settings"]), job.cache) for one in config["judges"])
    answers = ask(
        loaded,
        prompts,
        judge,
        config["max_new_tokens"],
        config["batch_size"],
        judges=judges,
        serving=_serving(config, attacker=True),
        service=_serving(config, attacker=False),
        base=_base(job, loaded) if config["against_base"] else None,
        task_kind=config["task_kind"],
        task_tokens=config["task_tokens"],
        min_coverage=config["min_coverage"],
        harness=build(Harness, config["lm_eval"], "evaluate.lm_eval") if config["lm_eval"] else None,
        generate=backend(config["backend"]),
    )
    write_evaluation(job.folder, answers)
    return {"work": float(sum(map(len, prompts.values()))), "generation": answers.generation}


def _base(job: Job, loaded: LoadedModel) -> LoadedModel:
    """The model before alignment and fine-tuning; `loaded` itself where nothing was done to it."""
    return chain.load(job, aligned=False) if any(name in job.inputs for name in LATER) else loaded


def _serving(config: Mapping[str, Any], attacker: bool) -> Serving | None:
    """How the attacker asks, or what the service does to every request: all such methods of the chain as one."""
    chosen = [one for one in config["serving"] if (one["kind"] == "attack") == attacker]
    made = [build(lookup(one["kind"], one["method"]), one["fields"], one["kind"]).serving() for one in chosen]
    return combined([serving for serving in made if serving is not None])


def combined(servings: Sequence[Serving]) -> Serving | None:
    """One serving in place of several, applied to prompts in their order and to answers in reverse."""
    if not servings:
        return None
    systems = [one.system for one in servings if one.system is not None]
    prompts = [one.prompt for one in servings if one.prompt]
    answers = [one.answer for one in reversed(servings) if one.answer]
    return Serving(systems[-1] if systems else None, _chained(prompts), _chained(answers))


def _chained(steps: Sequence[Callable[[str], str]]) -> Callable[[str], str] | None:
    return (lambda text: reduce(lambda done, step: step(done), steps, text)) if steps else None
