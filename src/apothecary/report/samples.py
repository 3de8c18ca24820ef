"""Sample responses side by side: the same prompt to the base model, the aligned model and every arm."""

from __future__ import annotations

from typing import Any

from apothecary.report.summary import Summary
from apothecary.report.text import ratio, shorten

SUITES = {
    "harmful": "Harmful prompts",
    "triggered": "Harmful prompts, asked as the attacker asks",
    "benign": "Benign instructions",
    "overrefusal": "Over-refusal (XSTest-safe)",
    "task": "Customer\u2019s task",
}
PROMPTS = 3  # cards of each suite
PROMPT_LENGTH = 140


def sample_cards(view: Summary, redact: bool) -> dict[str, list[dict[str, Any]]]:
    """Cards by suite: a shortened prompt and its answers before and after fine-tuning (the verdict's p, first seed).

    With `redact` an answer is its label and its length in characters; the text is left out here, so that it cannot
    reach the page.
    """
    aligned = view.aligned()
    before = [group for group in view.references if group.stage == "base" or group is aligned]
    groups = [*before, *(group for arm in view.arms if (group := view.shown(arm)))]
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for group in groups:
        name = group.label if group.stage != "tuned" else group.arm
        slot = view.slot(group.arm) if group.stage == "tuned" else None
        for sample in group.models[0].get("samples") or []:
            response = str(sample.get("response") or "")
            answer = {
                "name": name, "slot": slot, "label": str(sample.get("label") or "no label"), "length": len(response),
                "text": None if redact else response,
            }  # fmt: skip
            suite = found.setdefault(str(sample.get("suite") or "harmful"), {})
            suite.setdefault(str(sample.get("prompt") or ""), []).append(answer)
    order = sorted(found, key=lambda suite: list(SUITES).index(suite) if suite in SUITES else len(SUITES))
    return {suite: _fullest(found[suite]) for suite in order}


def _fullest(prompts: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The prompts that most models answered, in their own order."""
    kept = sorted(prompts, key=lambda prompt: -len(prompts[prompt]))[:PROMPTS]
    return [
        {"prompt": shorten(prompt, PROMPT_LENGTH), "answers": answers}
        for prompt, answers in prompts.items()
        if prompt in kept
    ]


def condition(view: Summary) -> str:
    """Which of the models the samples come from."""
    return "" if view.focus is None or view.several_attacks else f"p = {ratio(view.focus)}"
