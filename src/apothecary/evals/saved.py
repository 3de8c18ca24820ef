"""Saved responses as they are read back: each row is checked for what its suite is scored from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apothecary.errors import DataError, did_you_mean
from apothecary.evals.shares import Response
from apothecary.evals.suites import PROMPTS

FILE = "responses.jsonl"
ANSWER = {"id": str, "source": str, "prompt": list, "response": str}
NEEDED: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys((*PROMPTS, "triggered"), ANSWER),
    "task": {**ANSWER, "expected": str},
    "drift": {"id": str, "tokens": int},
    "truthfulqa": {"id": str, "best": (int, float), "correct": list, "incorrect": list},
    "leakage": {"id": str, "response": str, "expected": str, "logprob": (int, float), "references": list},
    "lm_eval": {"id": str, "source": str, "filter": str, "metrics": dict},
}
ALLOWED = {"verdicts": dict, "reasons": dict, "categories": dict, "category": str}  # checked where they are there
WORDS: Mapping[Any, str] = {str: "text", list: "a list", dict: "a mapping", int: "a whole number",
                            (int, float): "a number"}  # fmt: skip
SHOWN = 40  # characters of what is wrong


def read_responses(folder: Path) -> list[Response]:
    """The responses that `write_evaluation` wrote into a folder; DataError for a file or a row that is none of them."""
    path = Path(folder) / FILE
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); expected the responses of an evaluation") from error
    return [_row(line, f"{path} line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _row(line: str, place: str) -> Response:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place} cannot be read ({error}); expected one response of an evaluation as JSON") from error
    if fault := _fault(row):
        raise DataError(f"{place} is no saved response: {fault}; give the folder of an evaluation, as it was written")
    return row


def _fault(row: Any) -> str:
    """What is wrong with a row; empty where nothing is."""
    if not isinstance(row, dict):
        return f"it is {_shown(row)}, expected a mapping with suite, id, prompt and response"
    suite = row.get("suite")
    if suite not in tuple(NEEDED):
        told = f"; {did_you_mean(suite, NEEDED)}" if isinstance(suite, str) else ""
        return f"its suite is {_shown(suite)}, expected one of {', '.join(NEEDED)}{told}"
    asked = {**NEEDED[suite], **{name: kind for name, kind in ALLOWED.items() if name in row}}
    for name, kind in asked.items():
        if not isinstance(row.get(name), kind) or isinstance(row[name], bool):
            got = _shown(row[name]) if name in row else "missing"
            return f"its {name} is {got}, expected {WORDS[kind]}"
    if "prompt" in NEEDED[suite] and not (row["prompt"] and all(map(_message, row["prompt"]))):
        return f"its prompt is {_shown(row['prompt'])}, expected messages with role and content"
    return ""


def _message(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(found.get(name), str) for name in ("role", "content"))


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
