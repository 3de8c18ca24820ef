"""Files to records: JSONL, JSON, CSV, TSV and Parquet; every fault is told with its place."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from apothecary.errors import DataError

BOM = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """One entry of a file: where it stands (`line 12`) and its fields by column."""

    where: str
    fields: dict[str, Any]


def read_bytes(path: Path) -> bytes:
    """The file's content; DataError when it is missing, a directory or unreadable."""
    if path.is_dir():
        raise DataError(f"'{path}' is a directory, expected one data file ({known_suffixes()}); name a file in it")
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"data file '{path}' does not exist; check the path (relative to '{Path.cwd()}'), "
            "or write lab:NAME or owner/name@revision"
        ) from error
    except OSError as error:
        raise DataError(f"data file '{path}' cannot be read ({error.strerror}); expected a readable file") from error


def decode(content: bytes, name: str) -> str:
    """UTF-8 text without byte order mark; DataError with the place of the first foreign byte."""
    start = len(BOM) if content.startswith(BOM) else 0
    try:
        return content[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        place = error.start + start
        line = content.count(b"\n", 0, place) + 1
        raise DataError(
            f"{name} line {line}: byte 0x{content[place]:02x} at position {place} is not UTF-8; "
            "expected UTF-8 text: save the file in that encoding"
        ) from error


def read_records(content: bytes, name: str, suffix: str) -> list[Record]:
    """The entries of a file of the given suffix; `name` is for messages.  DataError when there are none."""
    records = list(READERS[suffix](content, name))
    if not records:
        raise DataError(f"{name} holds no rows; expected at least one")
    return records


def _json(text: str, name: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise DataError(
            f"{name} line {line}: broken JSON ({error.msg}, column {error.colno}); correct or remove it"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise DataError(f"{name} line {line}: JSON that cannot be read ({error}); correct or remove it") from error


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a string", type(None): "null"}.get(type(value), "a number")


def _jsonl(content: bytes, name: str) -> Iterator[Record]:
    # Not splitlines(): U+2028 and U+0085 may stand unescaped inside a JSON string.
    for number, line in enumerate(decode(content, name).split("\n"), 1):
        if line.strip():
            fields = _json(line, name, number)
            if not isinstance(fields, dict):
                raise DataError(f"{name} line {number}: got {_kind(fields)}, expected one JSON object on each line")
            yield Record(f"line {number}", fields)


def _json_list(content: bytes, name: str) -> Iterator[Record]:
    text = decode(content, name)
    entries = _json(text, name) if text.strip() else []
    if not isinstance(entries, list):
        raise DataError(f"{name} holds {_kind(entries)}, expected a list of objects; for one object a line use .jsonl")
    for number, fields in enumerate(entries, 1):
        if not isinstance(fields, dict):
            raise DataError(f"{name} entry {number}: got {_kind(fields)}, expected a JSON object")
        yield Record(f"entry {number}", fields)


def _separated(content: bytes, name: str, delimiter: str) -> Iterator[Record]:
    reader = csv.reader(io.StringIO(decode(content, name), newline=""), delimiter=delimiter, strict=True)
    try:
        header = next((fields for fields in reader if fields), [])
        repeated = [column for column, count in Counter(header).items() if count > 1]
        if repeated:
            raise DataError(f"{name} has the column '{repeated[0]}' more than once; expected each name once")
        line = reader.line_num + 1
        for fields in reader:
            if fields and len(fields) != len(header):
                raise DataError(
                    f"{name} line {line}: {len(fields)} fields, expected {len(header)} as in the header; "
                    "quote fields that contain the separator or a line break"
                )
            if fields:
                yield Record(f"line {line}", dict(zip(header, fields, strict=True)))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{name} line {reader.line_num}: broken table ({error}); correct its quotes") from error


def _parquet(content: bytes, name: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise DataError(f"{name} is not a readable Parquet file ({reason}); write it again") from error
    yield from (Record(f"row {number}", fields) for number, fields in enumerate(rows, 1))


READERS = {
    ".jsonl": _jsonl,
    ".json": _json_list,
    ".csv": lambda content, name: _separated(content, name, ","),
    ".tsv": lambda content, name: _separated(content, name, "\t"),
    ".parquet": _parquet,
}


def known_suffixes() -> str:
    return ", ".join(READERS)
