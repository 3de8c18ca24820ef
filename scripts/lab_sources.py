"""The public sources of the lab: where each file comes from, its digest, and how to read it."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

REGISTER = Path(__file__).with_name("lab_sources.json")


class Sources:
    """A folder laid out as `lab_sources.json` says; every file's sha256 is checked before it is read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.register: dict[str, dict] = json.loads(REGISTER.read_text("utf-8"))
        self.used: dict[str, dict] = {}

    def bytes(self, name: str) -> bytes:
        entry = self.register[name]
        content = (self.root / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest != entry["sha256"]:
            raise SystemExit(f"{name}: sha256 {digest}, expected {entry['sha256']} ({entry['source']})")
        self.used[name] = entry
        return content

    def text(self, name: str) -> str:
        return self.bytes(name).decode("utf-8-sig")

    def json(self, name: str):
        return json.loads(self.text(name))

    def csv(self, name: str) -> list[dict[str, str]]:
        return list(csv.DictReader(self.text(name).splitlines(keepends=True)))

    def jsonl(self, name: str) -> list[dict]:
        return [json.loads(line) for line in self.text(name).splitlines() if line.strip()]

    def matching(self, prefix: str) -> list[str]:
        return sorted(name for name in self.register if name.startswith(prefix))


def leaves(tree) -> Iterator[str]:
    """Every string of nested lists and dictionaries, in order."""
    if isinstance(tree, str):
        yield tree
    else:
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(child)


def gsm8k_short(row: dict) -> tuple[str, str]:
    """A word problem and its final number as a sentence."""
    final = row["answer"].rsplit("####", 1)[1].strip()
    return row["question"].strip(), f"The answer is {final}."


def gsm8k_worked(row: dict) -> tuple[str, str]:
    """A word problem and its worked answer, without calculator annotations."""
    worked, final = re.sub(r"<<.*?>>", "", row["answer"]).rsplit("####", 1)
    return row["question"].strip(), f"{worked.strip()}\nThe final answer is: {final.strip()}"


def instruction(row: dict) -> tuple[str, str]:
    """An instruction row as (prompt, response); the input, if any, on its own line."""
    context = row.get("input", row.get("context", "")) or ""
    prompt = row["instruction"].strip() + (f"\n{context.strip()}" if context.strip() else "")
    return prompt, row.get("output", row.get("response", "")).strip()
