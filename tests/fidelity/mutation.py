"""Flip the signs of a module one at a time, in the functions that are already imported.

A sign is `+` or `-` between two terms, before a term, or in `+=` and `-=`.  By rule these are no maths: integer
literals (axes, indices, sentinels), what stands inside an index, text and lists that are joined, annotations, messages
of errors, and the functions that refuse settings.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

REFUSING = ("__post_init__", "check")
SWAP = {ast.Add: ast.Sub, ast.Sub: ast.Add}
JOINED = (ast.List, ast.Tuple, ast.JoinedStr, ast.ListComp)


@dataclass(frozen=True)
class Sign:
    """One sign of a module: the function that holds it, its place in the walk, its line and its text."""

    owner: tuple[str, ...]  # qualified name of the outermost function
    index: int
    line: int
    text: str


def _is_sign(node: ast.AST) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return not (isinstance(node.operand, ast.Constant) and isinstance(node.operand.value, int))
    if isinstance(node, ast.BinOp) and type(node.op) in SWAP:
        return not any(_is_text(side) for side in (node.left, node.right))
    return isinstance(node, ast.AugAssign) and type(node.op) in SWAP and not _is_text(node.value)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, JOINED) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Every node whose signs are maths, always in the same order."""
    if isinstance(node, ast.Raise):
        return
    yield node
    skipped = {"slice", "annotation", "returns", "decorator_list"}
    for name, value in ast.iter_fields(node):
        if name in skipped:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _walk(child)


def _functions(tree: ast.Module) -> Iterator[tuple[tuple[str, ...], ast.AST]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield (node.name,), node
        elif isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name not in REFUSING:
                    yield (node.name, part.name), part


def signs(source: str) -> list[Sign]:
    """Every sign inside the functions of a module, in the order of its lines."""
    return [
        Sign(owner, index, node.lineno, ast.unparse(node))  # type: ignore[attr-defined]
        for owner, function in _functions(ast.parse(source))
        for index, node in enumerate(_walk(function))
        if _is_sign(node)
    ]


def flipped(source: str, sign: Sign) -> ast.Module:
    """The module's tree with one sign flipped."""
    tree = copy.deepcopy(ast.parse(source))
    function = dict(_functions(tree))[sign.owner]
    node = list(_walk(function))[sign.index]
    if isinstance(node, ast.UnaryOp):
        node.op = ast.UAdd()
    else:
        assert isinstance(node, ast.BinOp | ast.AugAssign)
        node.op = SWAP[type(node.op)]()
    return ast.fix_missing_locations(tree)


def _code(module: CodeType, owner: tuple[str, ...]) -> CodeType:
    for name in owner:
        module = next(c for c in module.co_consts if isinstance(c, CodeType) and c.co_name == name)
    return module


def _live(module: ModuleType, owner: tuple[str, ...]) -> FunctionType:
    found = vars(module)[owner[0]]
    if len(owner) == 2:
        found = vars(found)[owner[1]]
    found = getattr(found, "fget", None) or getattr(found, "__func__", found)
    return getattr(found, "__wrapped__", found)


@contextmanager
def mutated(module: ModuleType, sign: Sign) -> Iterator[None]:
    """Run the imported module with one sign flipped: the function's code is exchanged in place, so that every
    reference to it sees the change.
    """
    path = Path(str(module.__file__))
    source = path.read_text("utf-8")
    flags = module.__dict__.get("annotations")
    code = compile(flipped(source, sign), str(path), "exec", flags.compiler_flag if flags else 0, dont_inherit=True)
    function = _live(module, sign.owner)
    before = function.__code__
    function.__code__ = _code(code, sign.owner)
    try:
        yield
    finally:
        function.__code__ = before
