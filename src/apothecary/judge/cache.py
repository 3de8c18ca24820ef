"""Verdicts kept by content in one SQLite file; the key is the sha256 of the judge's identity, prompt and response.

A missing verdict is not kept: it is asked for again.  Several processes may share a file, and a killed one leaves it
whole, with every chunk of verdicts that it had finished.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apothecary.config import canonical
from apothecary.errors import StoreError
from apothecary.judge.base import Judge, Verdict, sha256
from apothecary.judge.text import Label

FILE = "verdicts.sqlite"
CHUNK = 64  # verdicts written at once: as many can be lost to a kill
WAIT = 60.0  # seconds for another process that writes
_SELECTED = 500  # keys of one query; SQLite takes 999 at least


def kept(judge: Judge, folder: Path | None) -> Judge:
    """`judge` with its verdicts kept in `folder`; itself where asking again costs nothing, or there is no folder."""
    return judge if folder is None or judge.cheap_proxy or judge.name == "human" else Cached(judge, folder)


class Cached(Judge):
    """A judge whose verdicts are looked up before they are asked for; in all else it is the judge that it wraps."""

    def __init__(self, judge: Judge, folder: Path) -> None:
        """`folder` is made on the first write."""
        for name in ("name", "cheap_proxy", "threshold"):
            object.__setattr__(self, name, getattr(judge, name))
        object.__setattr__(self, "judge", judge)
        object.__setattr__(self, "path", Path(folder) / FILE)

    judge: Judge
    path: Path

    def __getattr__(self, name: str) -> Any:
        """Whatever the contract does not name, such as the policy: what is read of a judge must not change with it."""
        if name == "judge":  # before it is set, as in a copy: there is nothing to ask
            raise AttributeError(name)
        return getattr(self.judge, name)

    def label(self, response: str) -> Label:
        return self.judge.label(response)

    def identity(self) -> dict[str, Any]:
        return self.judge.identity()

    def verdicts(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        pairs = list(zip(prompts, responses, strict=True))
        digest = self.digest()
        keys = [sha256(canonical([digest, *pair])) for pair in pairs]
        known = self._read(keys) if self.path.exists() else {}
        new = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in known}
        asked = list(new)
        for start in range(0, len(asked), CHUNK):
            chunk = asked[start : start + CHUNK]
            found = self.judge.verdicts([new[key][0] for key in chunk], [new[key][1] for key in chunk])
            fresh = dict(zip(chunk, found, strict=True))
            self._write({key: verdict for key, verdict in fresh.items() if verdict.probability is not None})
            known |= fresh
        return [known[key] for key in keys]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=WAIT)) as database, database:  # one transaction
                database.execute("create table if not exists verdicts (key text primary key, verdict text not null)")
                yield database
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"the cache of verdicts {self.path} cannot be used ({error}); expected a SQLite file that may be "
                "written: remove it, or name another folder"
            ) from error

    def _read(self, keys: Sequence[str]) -> dict[str, Verdict]:
        found: dict[str, Verdict] = {}
        with self._open() as database:
            for start in range(0, len(keys), _SELECTED):
                part = keys[start : start + _SELECTED]
                places = ",".join("?" * len(part))
                rows = database.execute(f"select key, verdict from verdicts where key in ({places})", part)
                for key, text in rows:
                    fields = json.loads(text)
                    found[key] = Verdict(**{**fields, "categories": tuple(fields["categories"])})
        return found

    def _write(self, verdicts: dict[str, Verdict]) -> None:
        if verdicts:
            with self._open() as database:
                rows = [(key, json.dumps(asdict(verdict))) for key, verdict in verdicts.items()]
                database.executemany("insert or replace into verdicts values (?, ?)", rows)
