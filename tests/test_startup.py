"""What stays cheap: modules are counted, because time on a busy machine says little."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import apothecary

HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "numpy", "scipy", "jinja2", "huggingface_hub"}


def loaded(code: str) -> set[str]:
    """Names in sys.modules after `code` in a fresh interpreter."""
    script = f"import sys\n{code}\nprint('', *sys.modules, sep='\\n', file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.split("\n"))


@pytest.mark.parametrize(
    ("code", "most"),
    [
        ("import apothecary", 40),
        ("from apothecary.cli import main; main(['--help'])", 380),
        ("from apothecary.cli import main; main(['methods'])", 330),
    ],
)
def test_starting_imports_little(code: str, most: int):
    found = loaded(code)
    assert not found & HEAVY
    assert len(found - loaded("")) < most


def test_listing_methods_imports_none_of_them():
    found = loaded("from apothecary.cli import main; main(['methods'])")
    assert not {name for name in found if name.startswith(("apothecary.align", "apothecary.train", "apothecary.judge"))}


def test_a_dry_run_needs_no_torch(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {align: 'lab:align', customer: 'lab:customer_train'}")
    words = ["run", str(recipe), "--dry-run", "--store", str(tmp_path / "store")]
    assert "torch" not in loaded(f"from apothecary.cli import main; assert main({words!r}) == 0")


@pytest.mark.parametrize("name", apothecary._HOME)
def test_public_names_exist(name: str):
    assert getattr(apothecary, name) is getattr(importlib.import_module(f"apothecary.{apothecary._HOME[name]}"), name)
    assert name in dir(apothecary) and {*apothecary.__all__} == {*apothecary._HOME, "__version__"}


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        apothecary.nothing  # noqa: B018
