"""What code a stage's result depends on: its source files, found by reading imports, and the versions of libraries.

Nothing is imported: a cached run must not pay for torch.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

LIBRARIES = ("torch", "transformers", "peft")  # another version of these makes another result: part of a stage's key
RECORDED = (*LIBRARIES, "apothecary", "accelerate", "tokenizers", "safetensors", "datasets", "numpy")


def key_versions() -> dict[str, str | None]:
    """The part of `versions()` that decides a stage's key."""
    found = versions()
    return {name: found.get(name) for name in LIBRARIES}


@cache
def versions() -> dict[str, str | None]:
    """Installed versions as manifests record them; None for a package that is absent."""
    found: dict[str, str | None] = {}
    for name in RECORDED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


@cache
def _root(package: str) -> Path | None:
    """Folder (or file) of a top-level package; finding one of those imports nothing."""
    spec = find_spec(package)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec.origin else None


@cache
def _file(module: str) -> Path | None:
    """The source file of a dotted module name, or None if there is none."""
    top, *rest = module.split(".")
    root = _root(top)
    if root is None:
        return None
    path = root.joinpath(*rest)
    for candidate in (path, path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _statements(nodes: Iterable[ast.AST], inside_functions: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements that can run: those under `if TYPE_CHECKING` never do."""
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from _statements(node.orelse, inside_functions)
        elif inside_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from _statements(ast.iter_child_nodes(node), inside_functions)


@cache
def _imports(module: str, inside_functions: bool) -> frozenset[str]:
    """Names of modules, of this module's own top-level package or of apothecary, that `module` imports."""
    path = _file(module)
    assert path is not None
    is_package = path.name == "__init__.py"
    found = set()
    for node in _statements(ast.parse(path.read_bytes()).body, inside_functions):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
            continue
        parts = module.split(".")
        anchor = parts[: len(parts) - node.level + is_package] if node.level else []
        base = ".".join([*anchor, *([node.module] if node.module else [])])
        found.add(base)
        found.update(f"{base}.{alias.name}" for alias in node.names)
    own = {"apothecary", module.split(".")[0]}
    return frozenset(name for name in found if name.split(".")[0] in own and _file(name) is not None)


@cache
def sources(modules: tuple[str, ...]) -> tuple[str, ...]:
    """Sorted names of `modules` and of all that they import, directly or not, within their own packages.

    Imports inside functions count.  A package that is merely on the way to a module counts with what it imports at its
    top; `apothecary/__init__.py` itself is left out, because all it does is to name the public functions.
    """
    seen: dict[str, bool] = {}  # module -> were imports inside its functions followed?
    queue = [(module, True) for module in modules]
    while queue:
        module, explicit = queue.pop()
        if module == "apothecary" or seen.get(module) or (module in seen and not explicit):
            continue
        if _file(module) is None:
            raise FileNotFoundError(f"no source file for module '{module}'")
        seen[module] = explicit
        queue.extend((name, True) for name in _imports(module, explicit))
        parts = module.split(".")
        parents = (".".join(parts[:end]) for end in range(1, len(parts)))
        queue.extend((parent, False) for parent in parents if _file(parent) is not None)
    return tuple(sorted(seen))


@cache
def source_digest(modules: tuple[str, ...]) -> str:
    """sha256 over the names and bytes of the source files of `sources(modules)`."""
    state = hashlib.sha256()
    for module in sources(modules):
        path = _file(module)
        assert path is not None
        state.update(f"{module}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return state.hexdigest()
