"""One page over many runs and sweeps: a row for each defence, attack, share of harmful rows and judge, with its budget.

Rows carry intervals and make no comparison: models, prompts, judges and budgets differ between studies, and the paired
tests of a study stand on its own page.  The page is complete without its script, which sorts and filters.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apothecary.errors import StoreError
from apothecary.pipeline.results import misread
from apothecary.pipeline.store import write_atomic, writing
from apothecary.registry import entries
from apothecary.report import exams, page
from apothecary.report.coverage import coverage, least
from apothecary.report.summary import Estimate, Group, Summary, recipe_arms, summarise
from apothecary.report.tables import group_seconds, seconds
from apothecary.report.text import listed

HERE = Path(__file__).parent
SCRIPTS = ("sweep_sort.js", "leaderboard.js")
KINDS = ("curate", "align", "finetune")


@dataclass(frozen=True)
class Row:
    """A line of the page; what was not measured is None."""

    study: str
    arm: str
    model: str
    defence: str  # its methods, "none" for plain training
    attack: str
    p: float | None
    judge: str
    proxy: bool  # whether the judge reads the opening alone
    harm: Estimate | None
    reason: str  # why harm is not shown
    plus: Estimate | None
    accuracy: Estimate | None
    overrefusal: Estimate | None
    worst: Estimate | None  # worst case of a sweep, on held-out prompts
    trials: int | None
    seeds: int
    prompts: int
    seconds: float | None
    cost: str  # passes of the defence's methods


def read(paths: Iterable[Path], strict: bool = True) -> tuple[list[dict[str, Any]], list[Path]]:
    """The contents of runs' and sweeps' JSON files, and the paths of those that are neither.

    Raises StoreError for a file that cannot be read or shown and, if `strict`, for one that is neither.
    """
    found, others = [], []
    for path in paths:
        names = [path / name for name in ("results.json", "sweep.json")] if path.is_dir() else [path]
        file = next((name for name in names if name.exists()), names[0])
        try:
            content = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or error
            raise StoreError(f"{file} cannot be read ({reason}); give folders or files of runs and sweeps") from error
        if isinstance(content, dict) and ("models" in content or content.get("kind") == "sweep"):
            if fault := _misread(content):
                raise StoreError(f"{file} cannot be shown: {fault}; leave it out, or write it again")
            found.append(content)
        elif strict:
            raise StoreError(f"{file} holds neither the models of a run nor the arms of a sweep; leave it out")
        else:
            others.append(path)
    return found, others


def _misread(content: Mapping[str, Any]) -> str:
    """Why the rows of a run or a sweep cannot be made; empty where they can."""
    if content.get("kind") == "sweep":
        arms = content.get("arms")
        if not isinstance(arms, list) or not all(isinstance(arm, dict) and "arm" in arm for arm in arms):
            got = "none" if arms is None else json.dumps(arms)[:40]
            return f"its arms are {got}, expected a list of the arms of a sweep, each with its name"
    elif fault := misread(content):
        return fault
    try:
        rows([content])
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        return f"its scores do not have the form that runs and sweeps write ({type(error).__name__}: {error})"
    return ""


def rows(results: Iterable[Mapping[str, Any]]) -> list[Row]:
    """All rows, study by study, those of a study by rising share of harmful rows and harm."""
    found = []
    for each in results:
        made = list(_of_sweep(each) if each.get("kind") == "sweep" else _of_run(each))
        found += sorted(made, key=lambda row: (row.p or 0.0, row.harm.value if row.harm else 2.0))
    return found


def examined(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the exam of each judge showed, a sentence for each; with the studies where a name is several judges."""
    said: dict[str, dict[str, list[str]]] = {}
    for each in results:
        judged = {"models": _held_models(each)} if each.get("kind") == "sweep" else dict(each)
        for name, sentence in exams.said(summarise(judged)).items():
            said.setdefault(name, {}).setdefault(sentence, []).append(str(each.get("name") or "unnamed"))
    return [sentence if len(found) == 1 else f"{sentence[:-1]} (in {listed(dict.fromkeys(studies))})."
            for found in said.values() for sentence, studies in found.items()]  # fmt: skip


def _held_models(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a sweep's held-out scores would be in a run: the models of the default and of the worst attack."""
    held = [(arm["arm"], (arm.get("held_out") or {}).get(which) or {}) for arm in results["arms"]
            for which in ("default", "worst")]  # fmt: skip
    return [{"arm": name, "scores": found.get("scores") or {}} for name, found in held]


def _of_run(results: Mapping[str, Any]) -> Iterator[Row]:
    view = summarise(dict(results))
    spent = seconds(view)
    for group in view.tuned + view.repaired:
        short = coverage(group) < least(view)
        scores = (group.models[0].get("scores") or {}).get("harmful") or {}
        if not scores:
            continue
        harm = None if short else group.asked(view.harm)
        yield Row(
            study=str(results.get("name") or "unnamed"), arm=group.label, model=_model(results),
            defence=_defence(group), attack=group.note("attack") or "none", p=group.p,
            judge=str(scores.get("judge") or "unknown"),
            proxy=bool(scores.get("cheap_proxy", view.harm == "HS")), harm=harm,
            reason=f"verdicts on {100 * coverage(group):.0f} % only" if short else "", plus=_plus(view, group, short),
            accuracy=group.get("task", "accuracy"), overrefusal=group.get("overrefusal", "refuses"), worst=None,
            trials=None, seeds=group.seeds, prompts=int(scores.get("n") or 0), seconds=group_seconds(group, spent),
            cost=passes(group.methods),
        )  # fmt: skip


def _plus(view: Summary, group: Group, short: bool) -> Estimate | None:
    return None if short else group.asked("HS+" if view.harm == "HS" else "flagged+")


def _defence(group: Group) -> str:
    named = [name for name in group.methods if name not in (None, "sft")]
    return " + ".join(str(name) for name in named) or "none"


def passes(methods: Sequence[str | None]) -> str:
    """What the registry says that the methods cost, plain training left out."""
    known = entries()
    found = [known.get((kind, str(name).split(" ")[0])) for kind, name in zip(KINDS, methods, strict=True)]
    return "; ".join(entry.brief_cost for entry in found if entry and entry.name != "sft" and entry.brief_cost)


def _model(results: Mapping[str, Any]) -> str:
    told = (results.get("recipe") or {}).get("model") or "unknown"
    return str(told.get("path") if isinstance(told, Mapping) else told)


def _of_sweep(results: Mapping[str, Any]) -> Iterator[Row]:
    recipe = results.get("recipe") or {}
    told = recipe_arms(results)
    for arm in results["arms"]:
        held = arm.get("held_out") or {}
        default, worst = (_held(held.get(name)) for name in ("default", "worst"))
        scores = (held.get("default") or held.get("worst") or {}).get("scores") or {}
        harmful, spec = scores.get("harmful") or {}, told.get(arm["arm"], recipe)
        methods = tuple((spec.get(kind) or {}).get("method") if isinstance(spec.get(kind), Mapping) else None
                        for kind in KINDS)  # fmt: skip
        attack = spec.get("attack") or {}
        one = summarise({"models": [{"arm": arm["arm"], "scores": scores}]}).tuned[0]
        yield Row(
            study=str(results.get("name") or "sweep"), arm=arm["arm"], model=_model(results),
            defence=" + ".join(str(name) for name in methods if name not in (None, "sft")) or "none",
            attack=str(attack.get("method") if isinstance(attack, Mapping) else attack) + ", swept",
            p=_share(attack), judge=str(harmful.get("judge") or "unknown"),
            proxy=bool(harmful.get("cheap_proxy", True)), harm=default,
            reason="" if default else "not held out yet", plus=one.get("harmful", "HS+"),
            accuracy=one.get("task", "accuracy"), overrefusal=one.get("overrefusal", "refuses"), worst=worst,
            trials=(arm.get("budget") or {}).get("trials"), seeds=1, prompts=int(harmful.get("n") or 0),
            seconds=sum(trial.get("seconds") or 0.0 for trial in arm.get("trials") or ()) or None,
            cost=passes(methods),
        )  # fmt: skip


def _held(found: Mapping[str, Any] | None) -> Estimate | None:
    harm = (found or {}).get("harm")
    return Estimate(harm["rate"], harm["interval"][0], harm["interval"][1], harm["n"]) if harm else None


def _share(attack: Any) -> float | None:
    p = attack.get("p") if isinstance(attack, Mapping) else None
    p = p[0] if isinstance(p, (list, tuple)) and len(p) == 1 else p
    return float(p) if isinstance(p, (int, float)) else None


def write_leaderboard(results: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write the page to `path`, in one step, and return it; StoreError if it cannot be written."""
    path = Path(path)
    with writing("the leaderboard", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, render(results))
    return path


def render(results: Sequence[Mapping[str, Any]]) -> str:
    """The page as a string."""
    from markupsafe import Markup

    script = "\n".join((HERE / name).read_text("utf-8") for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    found = rows(results)
    choices = {name: sorted({str(getattr(row, name)) for row in found})
               for name in ("study", "defence", "attack", "judge")}  # fmt: skip
    return page._environment().get_template("leaderboard.html.j2").render(
        rows=found, choices=choices, costs={row.defence: row.cost for row in found if row.cost}, digest=digest,
        script=Markup(script),
        style=Markup((HERE / "style.css").read_text("utf-8")), proxies=sorted({r.judge for r in found if r.proxy}),
        exams=examined(results),
    )  # fmt: skip
