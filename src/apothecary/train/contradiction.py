"""Rows whose answers contradict their role, such as refusals where harmful answers are expected.

A defence that simulates an attacker with refusals trains to the end and defends nothing, so that most of the first
answers are read before.  The reading is a cheap one, of openings alone (judge/text.py): it refuses what is plainly
wrong, and says nothing for rows that are right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

from apothecary.data.rows import Row
from apothecary.errors import DataError
from apothecary.judge.text import Label, opening_label

READ = 200  # rows
Answer = Callable[[Row], str | None]


def _response(row: Row) -> str | None:
    return row.response


def _rejected(row: Row) -> str | None:
    return row.rejected


# By role: which answers, what most of them must not be, and what is expected.  Other roles may hold either.
_HARMFUL: tuple[Answer, Label, str] = (_response, "refuses", "harmful answers")
_EXPECTED: dict[str, tuple[tuple[Answer, Label, str], ...]] = {
    "harmful": (_HARMFUL,),
    "attack": (_HARMFUL,),
    "validation": ((_response, "complies", "safe answers"),),
    "pairs": ((_response, "complies", "safe answers"), (_rejected, "refuses", "harmful answers that are rejected")),
}
_SEEN = {"refuses": "refuse", "complies": "open affirmatively"}


def refuse_contradiction(role: str, rows: Iterable[Row]) -> None:
    """Raise DataError where more than half of the first answers contradict the role of their rows."""
    if role not in _EXPECTED:
        return
    first = list(islice(rows, READ))
    for answer, wrong, expected in _EXPECTED[role]:
        answers = [text for row in first if (text := answer(row))]
        count = sum(opening_label(text) == wrong for text in answers)
        if 2 * count > len(answers):
            raise DataError(
                f"{count} of the first {len(answers)} answers of role '{role}' {_SEEN[wrong]}, expected {expected}; "
                "name another source for the role, or set allow_contradicting_rows: true if they are what you want"
            )
