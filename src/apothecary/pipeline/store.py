"""The content-addressed store: one folder per stage result, with a manifest, promoted by one atomic rename.

    <root>/<kind>/<key[:20]>/           manifest.json, payload, events.jsonl
    <root>/<kind>/<key[:20]>.partial/   work in progress; its checkpoints survive a kill
    <root>/<kind>/<key[:20]>.lock       held by the process that works on the key
    <root>/cache/                       answers of judges that are costly to ask again; may be deleted at any time

The *content digest* of a result covers its payload only: no manifest, events, logs, timings or checkpoints.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from apothecary.errors import ApothecaryError, StoreError

KEY_LENGTH = 20
MANIFEST, EVENTS = "manifest.json", "events.jsonl"
_ASIDE = {"checkpoints", "logs"}  # folders that are no payload
_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_FULL_TEXTS = ("No space left", "File too large", "Disk quota exceeded", "PytorchStreamWriter failed writing")


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def payload_files(folder: Path) -> list[str]:
    """Sorted relative paths of the files that are content."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        name.as_posix()
        for name in names
        if name.as_posix() not in (MANIFEST, EVENTS) and name.parts[0] not in _ASIDE and name.suffix != ".log"
    )


def content_digest(payload: Mapping[str, Mapping[str, Any]]) -> str:
    """sha256 over the sorted (path, sha256) pairs of a payload."""
    lines = (f"{path}\0{payload[path]['sha256']}\n" for path in sorted(payload))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class Artifact:
    """A finished result: a folder with a manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def manifest(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / MANIFEST).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise self._altered(MANIFEST, "is missing or unreadable") from error

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def key(self) -> str:
        return self.manifest["key"]

    @property
    def digest(self) -> str:
        """The content digest."""
        return self.manifest["digest"]

    def path(self, name: str) -> Path:
        """A payload file or folder; StoreError if it is not there."""
        path = self.folder / name
        if not path.exists():
            raise self._altered(name, "is missing")
        return path

    def verify(self) -> Artifact:
        """Check every payload file against the manifest; StoreError names the first that differs and the way out."""
        try:
            recorded, digest, key = (self.manifest[name] for name in ("payload", "digest", "key"))
        except KeyError as error:
            raise self._altered(MANIFEST, f"lacks {error}") from error
        if content_digest(recorded) != digest or not key.startswith(self.folder.name):
            raise self._altered(MANIFEST, "was altered (its digest does not fit)")
        present = payload_files(self.folder)
        for name in sorted(set(recorded) | set(present)):
            if name not in recorded:
                raise self._altered(name, "was added by hand")
            if name not in present:
                raise self._altered(name, "is missing")
            if sha256(self.folder / name) != recorded[name]["sha256"]:
                raise self._altered(name, "was altered (its sha256 does not fit)")
        return self

    def _altered(self, name: str, what: str) -> StoreError:
        return StoreError(
            f"{self.folder / name} {what}, expected the artifact as it was written; "
            f"delete the folder {self.folder} to rebuild it"
        )


class Store:
    """Results by kind and key under one root folder."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.cache = self.root / "cache"

    def folder(self, kind: str, key: str) -> Path:
        return self.root / kind / key[:KEY_LENGTH]

    def find(self, kind: str, key: str) -> Artifact | None:
        """The finished result of a key, unverified, or None."""
        folder = self.folder(kind, key)
        return Artifact(folder) if folder.is_dir() else None

    def manifests(self, kind: str) -> list[dict[str, Any]]:
        """Readable manifests of all finished results of a kind."""
        found = []
        for path in sorted((self.root / kind).glob(f"*/{MANIFEST}")):
            if path.parent.suffix == "":
                try:
                    found.append(json.loads(path.read_text("utf-8")))
                except (OSError, ValueError):
                    continue
        return found

    @contextmanager
    def lock(self, kind: str, key: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold the key's OS lock, which the system releases if the process dies.

        `waiting` is called about once a second while another process holds it; what it raises ends the wait.
        """
        path = self.folder(kind, key).with_suffix(".lock")
        with writing("the store", self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path)
            while True:
                try:
                    lock.acquire(timeout=1)
                    break
                except Timeout:
                    waiting()
        try:
            yield
        finally:
            lock.release()

    def draft(self, kind: str, key: str) -> Path:
        """The folder to work in, empty but for the checkpoints, logs and events of an earlier attempt."""
        folder = self.folder(kind, key).with_suffix(".partial")
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.name not in (*_ASIDE, EVENTS):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return folder

    def commit(self, kind: str, key: str, manifest: Mapping[str, Any]) -> Artifact:
        """Finish the draft: digest the payload, write the manifest, flush everything to disk, rename the folder."""
        draft, folder = self.folder(kind, key).with_suffix(".partial"), self.folder(kind, key)
        shutil.rmtree(draft / "checkpoints", ignore_errors=True)
        names = payload_files(draft)
        payload = {name: {"sha256": sha256(draft / name), "size": (draft / name).stat().st_size} for name in names}
        if not payload:
            raise StoreError(
                f"the stage '{kind}' wrote nothing into {draft}, expected at least one file; mend the method"
            )
        full = {"kind": kind, "key": key, "digest": content_digest(payload), **manifest, "payload": payload}
        (draft / MANIFEST).write_text(json.dumps(full, indent=1, ensure_ascii=False) + "\n", "utf-8")
        files = [draft / name for name in (*names, MANIFEST)]
        for path in [*files, *sorted({file.parent for file in files}, reverse=True)]:
            _flush(path)
        draft.rename(folder)
        _flush(folder.parent)
        return Artifact(folder)

    def set_aside(self, kind: str, key: str) -> None:
        """Move a result whose inputs have been rebuilt differently out of the way."""
        folder = self.folder(kind, key)
        aside = folder.with_suffix(".stale")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Replace a file's content in one step, so that a reader or a kill never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, "utf-8")
        _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def append_event(path: Path, event: str, stage: str, detail: Mapping[str, Any]) -> None:
    """Append one line {time, event, stage, detail} to an events.jsonl."""
    with path.open("a", encoding="utf-8") as file:
        file.write(
            json.dumps({"time": now(), "event": event, "stage": stage, "detail": dict(detail)}, default=str) + "\n"
        )


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Turn the errors of a full disk or an unwritable folder into one sentence; half-done work stays a draft."""
    try:
        yield
    except ApothecaryError:
        raise
    except Exception as error:
        if _is_full(error):
            raise StoreError(
                f"the disk is full, or a file would exceed the size limit, while writing {what} in {folder}; free some "
                "space and run the same command again (finished work is kept)"
            ) from error
        if isinstance(error, OSError) and error.errno in _UNWRITABLE and str(error.filename).startswith(str(folder)):
            raise StoreError(f"cannot write {what} in {folder} ({error.strerror}); choose a writable folder") from error
        raise


def _is_full(error: BaseException | None) -> bool:
    """Whether a full disk is at the root of an error; safetensors and torch hide the OSError in their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(text in str(error) for text in _FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False
