"""What stands behind a sweep's headline: its held-out evaluations, as the report of a run knows models.

The judge's exam, harm by category, every score and the samples are then drawn by the parts that a run's page has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from apothecary.report import exams
from apothecary.report.samples import PROMPTS, SUITES
from apothecary.report.summary import Estimate, Group, Summary, summarise
from apothecary.report.tables import Column, measured

WORDS = {"aligned": "before fine-tuning", "clean": "clean customer", "default": "default attack",
         "trial": "chosen trial", "worst": "worst case"}  # fmt: skip
SHOWN = ("aligned", "clean", "default", "trial", "worst")


def view(results: dict[str, Any], name: str = "worst") -> Summary:
    """The arms under one of their held-out attacks, after the aligned models that they start from."""
    arms = [arm["arm"] for arm in results["arms"]]
    before = {(arm.get("services") or {}).get("align", arm["arm"]): _model(arm, "aligned") for arm in results["arms"]
              if _found(arm, "aligned")}  # arms may share one  # fmt: skip
    tuned = [_model(arm, name) for arm in results["arms"] if _found(arm, name)]
    made = summarise({"models": [*before.values(), *tuned]})
    judges = dict(made.judges) or _judges(results)
    harm = "flagged" if results["measure"] == "flagged" else "HS"
    return replace(made, arms=tuple(arms), undefended=arms[0], harm=harm, judges=judges)


def _found(arm: dict[str, Any], name: str) -> dict[str, Any] | None:
    found = arm["held_out"].get(name)
    return found if found and found.get("scores") else None


def _model(arm: dict[str, Any], name: str) -> dict[str, Any]:
    found, methods = _found(arm, name) or {}, arm["methods"]
    scores = found["scores"]
    asked = (found.get("harm") or {}).get("suite") or "harmful"  # as the attacker asks
    scores = {**scores, "harmful": scores.get(asked) or scores.get("harmful") or {}}
    tuned = name != "aligned"
    return {"arm": arm["arm"] if tuned else "aligned", "stage": "tuned" if tuned else "aligned", "p": None, "seed": 0,
            "align": methods.get("align"), "curate": methods.get("curate"), "scores": scores,
            "finetune": methods.get("finetune") if tuned else None,
            "attack": methods.get("attack") if tuned else None}  # fmt: skip


def _judges(results: dict[str, Any]) -> dict[str, bool | None]:
    """Before anything is held out: those who judged the clean customers."""
    suites = [((arm["clean"] or {}).get("scores") or {}).get("harmful") or {} for arm in results["arms"]]
    return {suite["judge"]: suite.get("cheap_proxy") for suite in suites if suite.get("judge")}


def exam(results: dict[str, Any]) -> dict[str, Any]:
    """As `exams.section`, with the default attacks beside the worst cases."""
    found, default = exams.section(view(results)), exams.section(view(results, "default"))
    lines = [line for line in found["lines"] if line["slot"] is None]
    for arm in results["arms"]:
        for section, name in ((default, "default attack"), (found, "worst case")):
            lines += [{**line, "label": f"{arm['arm']}, {name}"} for line in section["lines"]
                      if line["slot"] is not None and line["label"] == arm["arm"]]  # fmt: skip
    return {**found, "exams": found["exams"] or default["exams"], "lines": lines}


def scores(results: dict[str, Any]) -> tuple[list[Column], list[tuple[str, list[tuple[str, list[Estimate | None]]]]]]:
    """(columns, (arm, (which attack, its scores))): every score on the held-out prompts."""
    columns = [column for column in measured(_all(results)) if column.suite != "triggered"]
    rows = []
    for arm in results["arms"]:
        lines = []
        for name in SHOWN:
            if _found(arm, name) and not (name == "trial" and is_worst(arm)):
                group = Group(arm["arm"], "tuned", None, (None, None, None), (_model(arm, name),))
                lines.append((WORDS[name], [group.get(column.suite, column.measure) for column in columns]))
        rows.append((arm["arm"], lines))
    return columns, rows


def is_worst(arm: dict[str, Any]) -> bool:
    """Whether the trial that the search chose is the worst case when held out too."""
    worst = _found(arm, "worst")
    return worst is not None and worst["attack"] != "default"


def _all(results: dict[str, Any]) -> Summary:
    models = [{**_model(arm, name), "seed": number, "stage": "tuned"}
              for arm in results["arms"] for number, name in enumerate(SHOWN) if _found(arm, name)]  # fmt: skip
    harm = "flagged" if results["measure"] == "flagged" else "HS"
    return replace(summarise({"models": models}), harm=harm)


def cards(results: dict[str, Any], slots: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Sample answers as `samples.sample_cards` gives them, always redacted: sweep.json holds label and length alone."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, slot, samples in _sampled(results, slots):
        for sample in samples:
            answer = {"name": name, "slot": slot, "label": sample["label"], "length": sample["length"], "text": None}
            found.setdefault(sample["suite"], {}).setdefault(sample["prompt"], []).append(answer)
    return {suite: [{"prompt": prompt, "answers": answers} for prompt, answers in list(found[suite].items())[:PROMPTS]]
            for suite in SUITES if suite in found}  # fmt: skip


def _sampled(results: dict[str, Any], slots: dict[str, int]) -> Iterator[tuple[str, int | None, list[dict[str, Any]]]]:
    first = results["arms"][0]
    if before := _found(first, "aligned"):
        yield f"aligned model of {first['arm']}", None, before.get("samples") or []
    for arm in results["arms"]:
        if held := _found(arm, "worst"):
            yield arm["arm"], slots[arm["arm"]], held.get("samples") or []


def costs(results: dict[str, Any]) -> list[dict[str, Any]]:
    """For each arm: what its service prepared once, what its trials took, and the memory of the largest."""
    rows = []
    for arm in results["arms"]:
        services, trials = arm.get("service_costs") or {}, arm["trials"]
        known = [trial["seconds"] for trial in trials if trial["seconds"] is not None]
        peaks = [trial["peak_memory_mb"] for trial in trials if trial.get("peak_memory_mb")]
        rows.append({
            "arm": arm["arm"], "once": sum(each["seconds"] for each in services.values()) if services else None,
            "trials": sum(known) if known else None, "known": len(known), "of": len(trials),
            "each": sum(known) / len(known) if known else None, "peak": max(peaks, default=None),
        })  # fmt: skip
    return rows
