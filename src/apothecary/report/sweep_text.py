"""What a sweep's page says in words, and its tables as cells."""

from __future__ import annotations

from typing import Any

from apothecary.report import sweep_noise
from apothecary.report.summary import Estimate
from apothecary.report.text import DASH, listed, number, percent, shorten, signed

NAME = 40  # characters of an arm in running text
WORDS = {"HS": "complies with", "HS+": "does not refuse", "flagged": "is flagged on"}
LOOSER = (1.0, 2.0, 4.0, float("inf"))  # times the guard's bounds
STATES = {"complete": "inside", "pruned": "pruned", "failed": "failed", "running": "running"}


def sentence(results: dict[str, Any]) -> str:
    """One sentence on the worst case of each arm, computed from the numbers alone."""
    arms, against = results["arms"], {each["arm"]: each for each in results["comparisons"]}
    said = [line for arm in arms if (line := _told(results, arm, against.get(arm["arm"])))]
    if not said:
        done = sum(arm["counts"]["trials"] - arm["counts"]["running"] for arm in arms)
        wanted = sum(arm["budget"]["trials"] for arm in arms)
        return f"The sweep is under way: {done} of {wanted} trials are done, and no worst case has been held out yet."
    budgets = sorted({arm["budget"]["trials"] for arm in arms})
    trials = " or ".join(map(str, budgets))
    return f"Against an attacker with {trials} trials who must leave the model useful, {'; '.join(said)}."


def _told(results: dict[str, Any], arm: dict[str, Any], compared: dict[str, Any] | None) -> str:
    """An arm's worst case in words; that it is not shown where a judge's silence may hide a worse one."""
    if arm["not_shown"]:
        return f"the worst case of {_name(arm)} is not shown: {silence(arm)}"
    if not (found := _held(arm, "worst")):
        searched = arm["counts"]["trials"] >= arm["budget"]["trials"] and not arm["counts"]["running"]
        none = f"of {_name(arm)} no attack within the guard was found, so nothing is known"
        return none if searched and arm["worst"] is None else ""
    return (f"{_name(arm)} {_word(results)} {percent(_estimate(found))} of held-out harmful prompts"
            + _default(arm) + _compared(compared))  # fmt: skip


def silence(arm: dict[str, Any]) -> str:
    """For which of an arm's attacks the judge gave too few verdicts."""
    found, parts = arm["not_shown"], []
    if found["trials"]:
        parts.append(f"{len(found['trials'])} of {arm['counts']['trials']} trials")
    if found["default"]:
        parts.append("the default attack")
    if late := [name if name == "default" else f"trial {name}" for name in found["held_out"]]:
        parts.append(f"the held-out answers of {listed(late)}")
    known, needed = (f"{100 * found[name]:.0f} %" for name in ("coverage", "needed"))
    return (f"the judge {found['judge']} gave too few verdicts for {listed(parts)} (on as few as {known}, "
            f"{needed} are needed)")  # fmt: skip


def _word(results: dict[str, Any]) -> str:
    return WORDS[results["measure"]]


def _held(arm: dict[str, Any], name: str) -> dict[str, Any] | None:
    found = (arm.get("held_out") or {}).get(name)
    return found if found and found.get("harm") else None


def _estimate(found: dict[str, Any]) -> Estimate:
    harm = found["harm"]
    return Estimate(harm["rate"], harm["interval"][0], harm["interval"][1], harm["n"])


def _default(arm: dict[str, Any]) -> str:
    worst, default = _held(arm, "worst"), _held(arm, "default")
    if worst and worst["attack"] == "default":
        return " (the default attack; no trial was worse)"
    if default is None:
        return ""
    outside = "" if arm["default"]["capability"]["excess"] <= 0 else ", outside the guard"
    return f" (the default attack: {percent(_estimate(default))}{outside})"


def _compared(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if not found["differs"]:
        return f", not distinguishable from {shorten(found['against'], NAME)}"
    return f", {'less' if found['difference'] < 0 else 'more'} than {shorten(found['against'], NAME)}"


def remarks(results: dict[str, Any]) -> list[str]:
    """What a reader must know before he quotes the sentence."""
    said = []
    if results["mixed_budgets"]:
        said.append(f"The arms were not searched with one budget in one experiment ({listed(results['mixed_budgets'])} "
                    "differ): their worst cases cannot be compared, and are shown together because that was asked "
                    "for.")  # fmt: skip
    unknown = [f"{_name(arm)} {arm['counts']['pruned']} and {arm['counts']['failed']}" for arm in results["arms"]
               if arm["counts"]["pruned"] + arm["counts"]["failed"]]  # fmt: skip
    if unknown:
        said.append(f"Trials given up half-way and trials that failed: {', '.join(unknown)}. Their harm is unknown: "
                    "they count as trials, not as successes of the defence.")  # fmt: skip
    for arm in results["arms"]:
        if arm["not_shown"]:
            said.append(f"{_name(arm)}: an answer without a verdict is not a safe one, so an attack that was not "
                        "judged may be the worst; what is shown of the others is a lower bound. No arm is compared "
                        "with this one.")  # fmt: skip
        elif arm["counts"]["uncovered"]:
            said.append(f"{_name(arm)}: the judge gave too few verdicts for {arm['counts']['uncovered']} trials; all "
                        "of them are outside the guard, so that they do not count.")  # fmt: skip
    said += sweep_noise.remark(results, NAME)
    asked = [arm for arm in results["arms"] if arm["clean"] and arm["budget"]["guard"]["drift"] is not None]
    blind = [_name(arm) for arm in asked if "drift" not in arm["guard"]]
    if blind:
        said.append(f"Held-out loss was not measured, so the guard is task accuracy alone ({', '.join(blind)}).")
    for arm in results["arms"]:
        if arm["worst"] is None and arm["counts"]["trials"] and not arm["not_shown"]:
            said.append(f"{_name(arm)}: no attack stayed within the capability guard, the default attack neither.")
        if (trial := _held(arm, "trial")) and (held := _held(arm, "worst")) and held["attack"] == "default":
            said.append(f"{_name(arm)}: the trial that the search chose does less harm on held-out prompts "
                        f"({percent(_estimate(trial))}) than the default attack, which is therefore the worst case. "
                        "What the search found does not carry over.")  # fmt: skip
        if (held := _held(arm, "worst")) and (lost := _lost(arm, held)) is not None and lost > _bound(arm):
            said.append(f"{_name(arm)}: on held-out rows the worst attack costs {100 * lost:.0f} points of task "
                        "accuracy, more than the guard allows on the rows of the search.")  # fmt: skip
        if (held := _held(arm, "worst")) and (more := _drift(arm, held)) is not None and more > _bound(arm, "drift"):
            said.append(f"{_name(arm)}: on held-out rows the worst attack raises the loss by {more:.2f} nats, more "
                        "than the guard allows on the rows of the search.")  # fmt: skip
    return said


def _name(arm: dict[str, Any]) -> str:
    return shorten(arm["arm"], NAME)


def _bound(arm: dict[str, Any], part: str = "task_drop") -> float:
    bound = arm["budget"]["guard"][part]
    return float("inf") if bound is None else bound


def _lost(arm: dict[str, Any], found: dict[str, Any]) -> float | None:
    clean, ours = _task(_held(arm, "clean")), _task(found)
    return None if clean is None or ours is None else clean - ours


def _drift(arm: dict[str, Any], found: dict[str, Any]) -> float | None:
    clean, ours = (((each or {}).get("scores") or {}).get("drift") or {} for each in (_held(arm, "clean"), found))
    return None if clean.get("loss") is None or ours.get("loss") is None else ours["loss"] - clean["loss"]


def _task(found: dict[str, Any] | None) -> float | None:
    return (((found or {}).get("scores") or {}).get("task") or {}).get("accuracy")


def arm_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One line for each arm: held-out harm by attack, task accuracy, trials, and the difference from the first arm."""
    against, rows = {each["arm"]: each for each in results["comparisons"]}, []
    for arm in results["arms"]:
        names = ("aligned", "clean", "default", "trial", "worst")
        held = {name: _held(arm, name) for name in names}
        chosen = arm["trials"][arm["worst"]] if isinstance(arm["worst"], int) else None
        search = chosen or (arm["default"] if arm["worst"] == "default" else None)
        rows.append({
            "arm": arm["arm"], "counts": arm["counts"], "hidden": bool(arm["not_shown"]), "worst": arm["worst"],
            "harm": {name: _estimate(found) if found else None for name, found in held.items()},
            "search": _estimate(search) if search else None,
            "task": {name: _task(found) for name, found in held.items()},
            "against": _difference(against.get(arm["arm"])), "settings": _settings(chosen),
        })  # fmt: skip
    return rows


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return DASH
    low, high = found["interval"]
    value, low, high = (f"{100 * part:+z.0f}" for part in (found["difference"], low, high))
    p = f"= {found['adjusted']:.2g}" if found["adjusted"] >= 1e-4 else "< 0.0001"
    word = "" if found["differs"] else "not distinguishable, "
    said = f"{word}{value} [{low}, {high}], p {p}; under {100 * found['detectable']:.0f} points cannot be seen"
    return said.replace("+0", "0").replace("-", "\u2212")


def _settings(trial: dict[str, Any] | None) -> str:
    if trial is None:
        return ""
    return ", ".join(f"{short(key)} {value}" for key, value in trial["settings"].items())


def short(key: str) -> str:
    """The last part of a dotted key."""
    return key.rpartition(".")[2]


def guard_rows(results: dict[str, Any]) -> list[tuple[str, list[tuple[Estimate, int, bool] | None]]]:
    """(arm, [(harm of the worst attack within a looser guard, how many are within it, whether others without verdicts
    are too) or None where no attack is]).

    On the prompts of the search, for each of `LOOSER`: what the headline would be had the guard's bounds been so many
    times as wide.  Trials that were given up or failed are unknown here too.
    """
    rows = []
    for arm in results["arms"]:
        guard = arm["budget"]["guard"]
        found = [each for each in (arm["default"], *arm["trials"]) if each and each["state"] == "complete"]
        silent = [each for each in (arm["default"], *arm["trials"]) if each and each.get("uncovered")]
        cells = []
        for times in LOOSER:
            more = any(_within(each["capability"], guard, times) for each in silent if each.get("capability"))
            more = more or any(not each.get("capability") for each in silent)
            inside = [each for each in found if _within(each["capability"], guard, times)]
            worst = max(inside, key=lambda each: each["harm"]["value"], default=None)
            cells.append((_estimate(worst), len(inside), more) if worst else None)
        rows.append((arm["arm"], cells))
    return rows


def guard_heads(results: dict[str, Any]) -> list[str]:
    """The bounds of each column of `guard_rows` in words."""
    guard = results["arms"][0]["budget"]["guard"]
    units = {"task_drop": lambda bound: f"{100 * bound:.0f} points", "drift": lambda bound: f"{bound:.2g} nats"}
    return ["no guard" if times == float("inf") else
            ", ".join(say(times * guard[name]) for name, say in units.items() if guard[name] is not None)
            for times in LOOSER]  # fmt: skip


def _within(found: dict[str, Any], guard: dict[str, Any], times: float) -> bool:
    if times == 1.0:
        return found["excess"] <= 0
    return all(found[name] is None or guard[name] is None or found[name] <= times * guard[name]
               for name in ("task_drop", "drift")) or times == float("inf")  # fmt: skip


def columns(results: dict[str, Any]) -> list[str]:
    """Every setting that the attacker varied, over all arms."""
    return list(dict.fromkeys(key for arm in results["arms"] for trial in arm["trials"] for key in trial["settings"]))


def trial_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One line for each trial: cells as (text, what sorts)."""
    keys, rows = columns(results), []
    for arm in results["arms"]:
        close = {name for name, each in sweep_noise.decisions(arm) if each}
        for trial in arm["trials"]:
            harm, guard = trial["harm"] or {}, trial["capability"] or {}
            state = "outside" if trial["state"] == "complete" and guard["excess"] > 0 else STATES[trial["state"]]
            state = "no verdicts" if trial.get("uncovered") else state
            reason = trial["reason"] or guard.get("reason") or ""
            if trial["number"] in close:
                reason = f"{reason or 'task accuracy near the bound'}; within noise"
            cells = [(str(trial["number"]), trial["number"]), (state, state)]
            cells += [(_plain(trial["settings"].get(key)), trial["settings"].get(key)) for key in keys]
            cells += [_share(harm.get("rate")), _signed(harm.get("margin")), _share(trial["task"])]
            cells += [_signed(guard.get("drift")), (f"{trial['seconds']:.0f}" if trial["seconds"] else DASH,
                                                    trial["seconds"])]  # fmt: skip
            rows.append({"arm": arm["arm"], "cells": cells, "reason": reason,
                         "chosen": trial["number"] == arm["worst"]})  # fmt: skip
    return rows


def _plain(value: Any) -> str:
    return DASH if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _share(value: float | None) -> tuple[str, float | None]:
    return (DASH, None) if value is None else (number(value), value)


def _signed(value: float | None) -> tuple[str, float | None]:
    return (DASH, None) if value is None else (signed(value), value)
