"""Every fault found in somebody's code has a test here that would find it in ours."""

from __future__ import annotations

import ast
from functools import cache

import pytest
from fidelity.evidence import TESTS
from fidelity.faults import FAULTS


@cache
def collected(file: str) -> dict[str, list[str]]:
    """Test functions that pytest collects from a file, with the text of their decorators."""
    tree = ast.parse((TESTS / file).read_text("utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return {node.name: [ast.unparse(mark) for mark in node.decorator_list] for node in functions}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_has_its_test(fault):
    sentence, place = FAULTS[fault]
    file, _, name = place.partition("::")
    assert sentence.endswith(".") and file.rpartition("/")[2].startswith("test_") and name.startswith("test_")
    assert (TESTS / file).is_file() and name in collected(file), (
        f"{place} is gone; name the test that shows: {sentence}"
    )
    assert not any("skip" in mark or "xfail" in mark for mark in collected(file)[name])
