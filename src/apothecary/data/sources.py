"""Where rows come from: a set of the lab, a local file, or a data set of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from apothecary.data.files import READERS, Record, known_suffixes, read_bytes, read_records
from apothecary.data.formats import COLUMNS, FORMAT_NAMES, to_rows
from apothecary.data.rows import Row
from apothecary.errors import ConfigError, DataError, did_you_mean

LAB = Path(__file__).parents[1] / "lab" / "data"
_HUB = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[^:@]+)(?::(?P<split>.+))?)?")


@dataclass(frozen=True)
class DataSource:
    """One data set and how to read it."""

    path: str  # lab:NAME, a file (.jsonl .json .csv .tsv .parquet), or owner/name@revision of the hub
    columns: dict[str, str] = field(default_factory=dict, hash=False)  # {prompt: the file's name for it, ...}
    split: str = "train"  # of a hub data set
    limit: int | None = None  # the first rows only; at least 1
    format: str | None = None  # messages, preference, completion, alpaca, prompt; None: told by the columns
    subset: str | None = None  # configuration of a hub data set that has several
    skip: int = 0  # leave out so many rows at the start; `limit` counts those after them

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ConfigError(f"a data source has path {self.path!r}, expected lab:NAME, a file or owner/name@COMMIT")
        if not isinstance(self.columns, Mapping) or not all(isinstance(v, str) for v in self.columns.values()):
            raise ConfigError(
                f"'{self.path}' has columns {self.columns!r}, expected a mapping such as prompt: question"
            )
        for name in self.columns:
            if name not in COLUMNS:
                raise ConfigError(f"columns of '{self.path}' names '{name}'; {did_you_mean(str(name), COLUMNS)}")
        if self.limit is not None and (not isinstance(self.limit, int) or self.limit < 1):
            raise ConfigError(f"'{self.path}' has limit {self.limit!r}, expected a whole number of at least 1, or none")
        if not isinstance(self.skip, int) or isinstance(self.skip, bool) or self.skip < 0:
            raise ConfigError(f"'{self.path}' has skip {self.skip!r}, expected a whole number of at least 0")
        if self.format is not None and self.format not in FORMAT_NAMES:
            hint = did_you_mean(str(self.format), FORMAT_NAMES)
            raise ConfigError(f"unknown format '{self.format}' of '{self.path}'; {hint}")

    @classmethod
    def parse(cls, spec: str | Path | Mapping[str, Any] | DataSource) -> DataSource:
        """A source from its short form (`owner/name@revision:split` for the hub) or from a mapping of its fields."""
        if isinstance(spec, DataSource):
            return spec
        if isinstance(spec, Mapping):
            known = [f.name for f in fields(cls)]
            for key in spec:
                if key not in known:
                    raise ConfigError(f"unknown key '{key}' in a data source; {did_you_mean(str(key), known)}")
            if "path" not in spec:
                raise ConfigError(f"a data source has the keys {', '.join(spec) or 'none'}, expected path among them")
            return cls(**spec)
        hub = _HUB.fullmatch(str(spec))
        if hub and hub["split"] and not Path(spec).exists():
            return cls(f"{hub['id']}@{hub['revision']}", split=hub["split"])
        return cls(str(spec))


def lab_names() -> list[str]:
    """The lab's data sets."""
    return sorted(path.stem for path in LAB.glob("*.jsonl"))


def load_rows(spec: str | Path | Mapping[str, Any] | DataSource, role: str = "") -> list[Row]:
    """The rows of a source, each with a unique id and with `role` (or, if that is empty, the role it brings).

    Rows of any role but "" and "prompt" must have a response.  Raises DataError for what cannot be read, ConfigError
    for a source that is described wrongly.
    """
    source = DataSource.parse(spec)
    if _is_hub(source):
        name, records = source.path, _hub_records(source)
    else:
        path = _file(source)
        name, records = path.name, read_records(read_bytes(path), path.name, path.suffix.lower())
    chosen = records[source.skip :][: source.limit]
    if not chosen:
        raise DataError(f"{name} has {len(records)} rows and skip {source.skip} leaves none of them; lower skip")
    return to_rows(chosen, name, role, source.columns, source.format)


def source_digest(spec: str | Path | Mapping[str, Any] | DataSource) -> str:
    """sha256 over all that decides the rows: the file's name and content (for the hub id and revision) and the mapping.

    A branch of the hub may move under its name: pin a commit where this digest must hold.
    """
    source = DataSource.parse(spec)
    settings: list[Any] = [source.columns, source.limit, source.format]
    settings += [{"skip": source.skip}] if source.skip else []  # digests of sources that skip nothing stay as they were
    if _is_hub(source):
        return _sha256(json.dumps([source.path, source.split, source.subset, *settings], sort_keys=True).encode())
    path = _file(source)
    content = _sha256(read_bytes(path))
    return _sha256(json.dumps([path.name, content, *settings], sort_keys=True).encode())


def file_digest(path: str | Path) -> str:
    """sha256 of a local file's bytes; DataError where it cannot be read."""
    return _sha256(read_bytes(Path(path).expanduser()))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _is_hub(source: DataSource) -> bool:
    path = Path(source.path)
    hub = _HUB.fullmatch(source.path)
    if hub is None or path.exists() or path.suffix.lower() in READERS:
        return False
    if not hub["revision"]:
        raise DataError(
            f"'{source.path}' is no file here, and as a hub data set it lacks a revision; "
            f"correct the path, or write {source.path}@COMMIT"
        )
    return True


def _file(source: DataSource) -> Path:
    """The file that a source names; DataError for an unknown lab name or a suffix that cannot be read."""
    if source.path.startswith("lab:"):
        name = source.path.removeprefix("lab:")
        if name not in lab_names():
            raise DataError(f"the lab has no data set '{name}'; {did_you_mean(name, lab_names())}")
        return LAB / f"{name}.jsonl"
    path = Path(source.path).expanduser()
    if path.suffix.lower() not in READERS and not path.is_dir():
        got = f"the suffix '{path.suffix}'" if path.suffix else "no suffix"
        raise DataError(
            f"data source '{source.path}' has {got}, expected a file ({known_suffixes()}), lab:NAME or "
            "owner/name@revision"
        )
    return path


def _hub_records(source: DataSource) -> list[Record]:
    from datasets import load_dataset

    name, _, revision = source.path.partition("@")
    try:
        rows = load_dataset(name, source.subset, revision=revision, split=source.split)
        needed = len(rows) if source.limit is None else min(source.skip + source.limit, len(rows))  # type: ignore[arg-type]
        rows = rows.select(range(needed))  # type: ignore[union-attr]
        records = [Record(f"row {number}", dict(row)) for number, row in enumerate(rows, 1)]
    except Exception as error:  # the hub's libraries raise a dozen unrelated families
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(
            f"hub data set '{name}' at revision '{revision}', split '{source.split}', cannot be loaded ({reason}); "
            "check id, revision, split and subset, go online, or use a local file"
        ) from error
    if not records:
        raise DataError(f"hub data set '{source.path}', split '{source.split}', holds no rows; expected at least one")
    return records
