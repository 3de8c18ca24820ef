"""The lazy register of methods: listed by reading source, imported on first use.

A method is a class under `@register(kind, name, paper=...)` in the folder of its kind, or in a module that an entry
point of group `apothecary.plugins` names (entry point name `kind.name`, value `module`).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TypeVar

from apothecary.errors import ConfigError, did_you_mean

KINDS = ("curate", "align", "finetune", "repair", "attack", "judge")
EVIDENCE = ("definition", "reference", "finite_difference", "accumulation", "resume", "two_processes")
FIDELITY = Path(__file__).parent / "fidelity.json"  # method -> evidence that passes; written by the test run
# Rules about rows and words, without maths that a second implementation could check.
UNREFERENCED = ("judge", "attack/backdoor", "attack/benign", "attack/benign_drift", "attack/cipher",
                "attack/harmful_mix", "attack/identity_shift", "attack/style_shift")  # fmt: skip
T = TypeVar("T", bound=type)
_classes: dict[tuple[str, str], type] = {}


@dataclass(frozen=True)
class Entry:
    """What is known of a method without importing it."""

    kind: str
    name: str
    module: str
    paper: str | None = None  # arXiv id
    summary: str = ""  # first sentence of the module's docstring
    cost: str = ""  # its "Cost:" line
    evidence: tuple[str, ...] | None = None  # kinds of tests that pass; None: not ours to test

    @property
    def brief_cost(self) -> str:
        """The cost without its details: whole clauses, until they say something."""
        clauses = re.split(r"(?<=[.;:]) ", self.cost)
        size = next((n for n in range(1, len(clauses)) if sum(map(len, clauses[:n])) >= 30), len(clauses))
        return " ".join(clauses[:size]).rstrip(".;:")

    @property
    def status(self) -> str:
        """The fidelity badge in words."""
        if self.evidence is None:
            return "not tested here"
        words = [kind.replace("_", " ") for kind in self.evidence]
        return ", ".join(words + ["no reference test"] * self.lacks_reference) or "untested"

    @property
    def lacks_reference(self) -> bool:
        """Whether a second, independent implementation should have checked the maths and has not."""
        excused = self.kind in UNREFERENCED or f"{self.kind}/{self.name}" in UNREFERENCED
        return self.evidence is not None and "reference" not in self.evidence and not excused


def register(kind: str, name: str, paper: str | None = None) -> Callable[[T], T]:
    """Class decorator: make a class selectable as `name` among the methods of `kind`."""

    def add(cls: T) -> T:
        cls.kind, cls.name, cls.paper = kind, name, paper
        _classes[kind, name] = cls
        return cls

    return add


def _decorations(tree: ast.Module) -> list[tuple[str, str, str | None]]:
    found = []
    for node in tree.body:
        for call in node.decorator_list if isinstance(node, ast.ClassDef) else ():
            if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "register":
                kind, name = (ast.literal_eval(arg) for arg in call.args)
                paper = next((ast.literal_eval(k.value) for k in call.keywords if k.arg == "paper"), None)
                found.append((kind, name, paper))
    return found


def _read(module: str, source: str, evidence: dict[str, list[str]]) -> list[Entry]:
    tree = ast.parse(source)
    doc = ast.get_docstring(tree) or ""
    summary = re.split(r"(?<=[.])\s+(?=[A-Z])", " ".join(doc.split("\n\n")[0].split()))[0]
    cost = re.search(r"^Cost: (.+?)(?:\n\n|\Z)", doc, re.M | re.S)
    return [
        Entry(kind, name, module, paper, summary, " ".join(cost[1].split()) if cost else "",
              tuple(evidence.get(f"{kind}/{name}", ())))
        for kind, name, paper in _decorations(tree)
    ]  # fmt: skip


@cache
def entries() -> dict[tuple[str, str], Entry]:
    """Every method by (kind, name): those of the package and of installed plugins."""
    found = {}
    evidence = json.loads(FIDELITY.read_text("utf-8"))
    for kind in KINDS:
        for path in sorted((Path(__file__).parent / kind).glob("*.py")):
            module = f"apothecary.{kind}" + ("" if path.stem == "__init__" else f".{path.stem}")
            for entry in _read(module, path.read_text("utf-8"), evidence):
                found[entry.kind, entry.name] = entry
    for point in entry_points(group="apothecary.plugins"):
        kind, _, name = point.name.partition(".")
        found[kind, name] = Entry(kind, name, point.value, summary="plugin")
    return found


def lookup(kind: str, name: str) -> type:
    """The class registered as `name` among the methods of `kind`; imports its module on first use."""
    if (kind, name) not in _classes:
        entry = entries().get((kind, name))
        if entry is None:
            known = [n for k, n in entries() if k == kind]
            others = ", ".join(k for k, n in entries() if n == name)
            where = f" (there is one for {others})" if others else ""
            raise ConfigError(f"unknown {kind} method '{name}'{where}; {did_you_mean(name, known)}")
        import_module(entry.module)
    return _classes[kind, name]
