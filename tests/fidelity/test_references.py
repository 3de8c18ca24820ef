"""A reference is worth something when it shares no maths with us."""

from __future__ import annotations

import ast

import pytest
from fidelity import evidence

from apothecary.registry import entries

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
    """Each file with a test that is marked "reference" imports one, and nothing the reference imports is ours."""
    for path in {path for path, _, _ in evidence.cases(method, {"reference"})}:
        assert "reference" in imports(path), f"{path.name} has a reference test of {method} and imports no reference"
    assert all("apothecary" not in imports(path) for path in REFERENCES)
