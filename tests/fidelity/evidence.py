"""Tests with evidence, found by reading, and run without pytest: for checks of the tests themselves."""

from __future__ import annotations

import inspect
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
FIXTURES = ("tmp_path", "monkeypatch")


@cache
def load(path: Path) -> ModuleType:
    """A test module under a name of its own."""
    name = "evidence_of_" + "_".join(path.relative_to(TESTS).with_suffix("").parts)
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def modules(method: str) -> list[Path]:
    """Test files that name the method in an evidence marker."""
    texts = ((path, path.read_text("utf-8")) for path in sorted(TESTS.rglob("test_*.py")) if TESTS / "fidelity" not in
             path.parents)  # fmt: skip
    return [path for path, text in texts if "mark.evidence(" in text and f'"{method}"' in text]


def kinds(marks: Any, method: str) -> set[str]:
    return {kind for mark in marks if mark.name == "evidence" and mark.args[0] == method for kind in mark.args[1:]}


def runs(function: FunctionType, module: ModuleType) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """(arguments, marks) of each parametrised run of a test function."""
    whole = getattr(module, "pytestmark", [])
    marks = [*getattr(function, "pytestmark", ()), *(whole if isinstance(whole, list) else [whole])]
    axes = []
    for mark in (mark for mark in marks if mark.name == "parametrize"):
        names = mark.args[0].replace(" ", "").split(",") if isinstance(mark.args[0], str) else list(mark.args[0])
        axes.append([(names, parameter(value, len(names))) for value in mark.args[1]])
    for chosen in itertools.product(*axes):
        arguments = {name: v for names, param in chosen for name, v in zip(names, param.values, strict=True)}
        yield arguments, marks + [mark for _, param in chosen for mark in param.marks]


def parameter(value: Any, names: int) -> Any:
    """A `pytest.param`, also of a value that stands without one."""
    return value if hasattr(value, "marks") else pytest.param(*(value if names > 1 else (value,)))


def cases(method: str, wanted: set[str]) -> Iterator[tuple[Path, str, Callable[[], None]]]:
    """(file, name, call) of every run that counts as one of the wanted kinds and needs no fixture but FIXTURES."""
    for path in modules(method):
        for name, function in vars(load(path)).items():
            if not name.startswith("test_") or not isinstance(function, FunctionType):
                continue
            for arguments, marks in runs(function, load(path)):
                skipped = any(mark.name in ("gpu", "skip") for mark in marks)
                needed = set(inspect.signature(function).parameters) - set(arguments)
                if kinds(marks, method) & wanted and needed <= set(FIXTURES) and not skipped:
                    label = "-".join([name, *map(str, arguments.values())])
                    yield path, label, partial(call, function, arguments, needed)


def call(function: FunctionType, arguments: dict[str, Any], needed: set[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        given = {"tmp_path": Path(folder), "monkeypatch": patch}
        function(**arguments, **{name: given[name] for name in needed})
