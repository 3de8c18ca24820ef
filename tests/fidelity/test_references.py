"""A reference is worth something when it shares no maths with us."""

from __future__ import annotations

import ast
from pathlib import Path
from types import FunctionType

import pytest
from fidelity import evidence

from apothecary.registry import UNREFERENCED, entries

REFERENCES = sorted((evidence.TESTS / "reference").glob("*.py"))
METHODS = [f"{kind}/{name}" for kind, name in entries()]


def imports(path) -> set[str]:
    """Top-level packages that a file imports, at any depth of its code, also by name through importlib."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else str(node.module).split(".")[0])
        elif isinstance(node, ast.Constant) and str(node.value).split(".")[0] == "apothecary":
            found.add("apothecary")
    return found


@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.stem)
def test_a_reference_uses_none_of_our_code(path):
    assert imports(path) <= {"__future__", "collections", "math", "itertools", "torch", "numpy", "scipy", "reference"}


@pytest.mark.parametrize("method", [pytest.param(m, marks=pytest.mark.evidence(m, "guard"), id=m) for m in METHODS])
def test_a_reference_test_compares_with_a_reference(method):
    """Each test that is marked "reference" uses one, has cases to run, and nothing the reference imports is ours."""
    for path in evidence.modules(method):
        for name, function in vars(evidence.load(path)).items():
            if name.startswith("test_") and isinstance(function, FunctionType):
                found = list(evidence.runs(function, evidence.load(path)))
                assert found, f"{path.name}::{name} has no case to run"
                if any("reference" in evidence.kinds(marks, method) for _, marks in found):
                    assert uses_reference(path.read_text("utf-8"), name), (
                        f"{path.name}::{name} is marked as a reference test of {method} and uses no reference"
                    )
    assert all("apothecary" not in imports(path) for path in REFERENCES)


def uses_reference(source: str, name: str) -> bool:
    """Whether a function of a file names what the file imports from the references, itself or through a helper or a
    fixture of the file.
    """
    tree = ast.parse(source)
    known = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            base = node.module if isinstance(node, ast.ImportFrom) else None
            known |= {alias.asname or alias.name.split(".")[0] for alias in node.names
                      if str(base or alias.name).split(".")[0] == "reference"}  # fmt: skip
    own = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    seen, left = set(), [name]
    while left:
        here = left.pop()
        if here in known:
            return True
        if here in own and here not in seen:
            seen.add(here)
            body = own[here]
            parts = [*body.body, body.args] if isinstance(body, ast.FunctionDef) else body.body
            nodes = [node for part in parts for node in ast.walk(part)]
            left += [node.id for node in nodes if isinstance(node, ast.Name)]
            left += [node.arg for node in nodes if isinstance(node, ast.arg)]  # fixtures
    return False


SOURCE = """
from reference import sft as theirs
from reference.gpt2 import forward

def helper(x):
    return forward(x)

@pytest.fixture
def expected():
    return helper(1)

@pytest.mark.parametrize("make", [theirs])
def test_decorated(make):
    assert "theirs" and make

def test_direct():
    assert theirs.train() == 1

def test_through_a_fixture(expected):
    assert expected

def test_not_at_all(tmp_path):
    assert unrelated(tmp_path)

def unrelated(x):
    return x
"""


@pytest.mark.parametrize(("name", "uses"), [("test_direct", True), ("test_through_a_fixture", True),
                                            ("test_not_at_all", False), ("test_decorated", False)])  # fmt: skip
def test_a_reference_must_be_named_by_the_test_and_not_by_its_file_alone(name, uses):
    assert uses_reference(SOURCE, name) is uses


@pytest.mark.parametrize("name", [name for name in UNREFERENCED if "/" in name])
def test_an_attack_that_is_excused_has_no_maths(name):
    module = entries()["attack", name.removeprefix("attack/")].module
    path = evidence.TESTS.parent / "src" / Path(*module.split(".")).with_suffix(".py")
    assert not imports(path) & {"torch", "numpy", "scipy"}, f"{name} computes something: give it a reference test"
