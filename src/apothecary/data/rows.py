"""The row: one conversation with an id, a source and a role, from the first day to the last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from apothecary.errors import DataError

ROLES = ("align", "harmful", "benign", "pairs", "validation", "attack", "customer", "general", "prompt")


@dataclass(frozen=True)
class Row:
    """One training or evaluation row.

    `prompt` holds the messages before the answer, the last one from the user; `response` is the assistant's answer or
    None for prompts that are only evaluated; `rejected` is the answer that must not be given (rows of role `pairs`).
    """

    id: str
    prompt: tuple[tuple[str, str], ...]  # (role, content), role in system, user, assistant
    response: str | None = None
    rejected: str | None = None
    source: str = ""
    role: str = ""
    meta: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def text(self) -> str:
        """The last user message: what near-duplicate checks compare."""
        return self.prompt[-1][1]

    def to_json(self) -> dict[str, Any]:
        messages = [{"role": role, "content": content} for role, content in self.prompt]
        record = {"id": self.id, "source": self.source, "role": self.role, "prompt": messages,
                  "response": self.response, "rejected": self.rejected, "meta": self.meta or None}  # fmt: skip
        return {key: value for key, value in record.items() if value is not None}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Row:
        prompt = tuple((message["role"], message["content"]) for message in record["prompt"])
        return cls(**{**record, "prompt": prompt})

    def with_role(self, role: str) -> Row:
        return replace(self, role=role)


def content_id(prompt: Iterable[tuple[str, str]], response: str | None) -> str:
    """An id for a row that brings none: 16 hex digits of the sha256 of its messages."""
    return hashlib.sha256(json.dumps([list(prompt), response]).encode()).hexdigest()[:16]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines in apothecary's own form."""
    path.write_text("".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows), "utf-8")


def read_rows(path: Path) -> list[Row]:
    """Read rows that `write_rows` wrote."""
    rows = []
    try:
        # Not splitlines(): U+2028 and U+0085 may stand unescaped inside a JSON string.
        for line in path.read_text("utf-8").split("\n"):
            if line:
                rows.append(Row.from_json(json.loads(line)))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DataError(
            f"'{path}' is not a file of apothecary rows (row {len(rows) + 1}: {error!r}); read it with load_rows"
        ) from error
    return rows


def digest(rows: Iterable[Row]) -> str:
    """sha256 over the rows' content, ids and order."""
    state = hashlib.sha256()
    for row in rows:
        state.update(json.dumps(row.to_json(), sort_keys=True).encode())
    return state.hexdigest()
