"""The row: one conversation with an id, a source and a role, from the first day to the last."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

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


class RowFile(Sequence[Row]):
    """Rows that `write_rows` wrote, parsed when they are asked for: only where each begins is held in memory."""

    def __init__(self, path: Path) -> None:
        self.path, self.starts = path, array("Q")
        start = 0
        with _reading(path), path.open("rb") as file:
            for line in file:  # bytes split at b"\n" alone: U+2028 and U+0085 may stand unescaped in a JSON string
                if line != b"\n":
                    self.starts.append(start)
                start += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> list[Row]: ...
    def __getitem__(self, i: int | slice) -> Row | list[Row]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        start = self.starts[i]
        with _reading(self.path, i), self.path.open("rb") as file:
            file.seek(start)
            return Row.from_json(json.loads(file.readline()))


@contextmanager
def _reading(path: Path, number: int = 0) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DataError(
            f"'{path}' is not a file of apothecary rows (row {number + 1}: {error!r}); read it with load_rows"
        ) from error


@dataclass(frozen=True)
class Chosen(Sequence[Row]):
    """Some of the rows of a sequence, by position, none copied."""

    rows: Sequence[Row]
    positions: Sequence[int]

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> list[Row]: ...
    def __getitem__(self, i: int | slice) -> Row | list[Row]:
        return [self.rows[j] for j in self.positions[i]] if isinstance(i, slice) else self.rows[self.positions[i]]


def by_id(rows: Sequence[Row]) -> Chosen:
    """The rows in the order of their ids: what depends on the order of a pool no longer depends on its file."""
    ids = [row.id for row in rows]
    return Chosen(rows, sorted(range(len(ids)), key=ids.__getitem__))


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines in apothecary's own form."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row.to_json(), ensure_ascii=False) + "\n")


def read_rows(path: Path) -> list[Row]:
    """Read rows that `write_rows` wrote."""
    return list(RowFile(path))


def digest(rows: Iterable[Row]) -> str:
    """sha256 over the rows' content, ids and order."""
    state = hashlib.sha256()
    for row in rows:
        state.update(json.dumps(row.to_json(), sort_keys=True).encode())
    return state.hexdigest()
