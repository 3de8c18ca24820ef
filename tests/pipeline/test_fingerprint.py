"""Which source files a stage depends on."""

import subprocess
import sys
from pathlib import Path

import pytest

from apothecary.pipeline import fingerprint


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `fp_demo` that is on the path and has not been imported."""
    files = {
        "__init__.py": "",
        "top.py": "import fp_demo.sub.deep\nfrom . import sibling\n\ndef f():\n    from fp_demo.late import g\n",
        "sibling.py": "import json\n",
        "late.py": "raise RuntimeError('imported')\n",
        "typed.py": "x = 1\n",
        "unrelated.py": "y = 1\n",
        "sub/__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fp_demo import typed\n\n"
        "def lazily():\n    from fp_demo import unrelated\n",
        "sub/deep.py": "from ..sibling import thing\n",
    }
    for name, text in files.items():
        path = tmp_path / "fp_demo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    _forget()
    yield tmp_path / "fp_demo"
    _forget()


def _forget() -> None:
    for name in ("_root", "_file", "_imports", "sources", "source_digest"):
        getattr(fingerprint, name).cache_clear()


def test_imports_are_followed_through_functions_and_packages_but_not_for_types(package: Path):
    found = fingerprint.sources(("fp_demo.top",))
    assert found == ("fp_demo", "fp_demo.late", "fp_demo.sibling", "fp_demo.sub", "fp_demo.sub.deep", "fp_demo.top")
    assert "fp_demo.unrelated" in fingerprint.sources(("fp_demo.sub",))  # asked for by name: its functions count
    assert not any(name.startswith("fp_demo") for name in sys.modules)


@pytest.mark.parametrize(
    ("name", "counts"), [("late.py", True), ("sub/deep.py", True), ("typed.py", False), ("unrelated.py", False)]
)
def test_the_digest_changes_with_the_files_that_count(package: Path, name: str, counts: bool):
    before = fingerprint.source_digest(("fp_demo.top",))
    _forget()
    assert fingerprint.source_digest(("fp_demo.top",)) == before
    with (package / name).open("a") as file:
        file.write("z = 2\n")
    _forget()
    assert (fingerprint.source_digest(("fp_demo.top",)) != before) == counts


def test_evaluation_does_not_decide_training():
    train = fingerprint.sources(("apothecary.pipeline.steps.training", "apothecary.align.sft"))
    assert {
        "apothecary.train.fit",
        "apothecary.train.trainer",
        "apothecary.data.chat",
        "apothecary.models.load",
    } <= set(train)
    assert not [
        name for name in train if name.startswith(("apothecary.evals", "apothecary.judge", "apothecary.report"))
    ]
    assert not {"apothecary.pipeline.run", "apothecary.pipeline.plan", "apothecary.align.vaccine"} & set(train)
    assert "apothecary.judge.opening" in fingerprint.sources(("apothecary.judge.opening",))


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from apothecary.pipeline import fingerprint as f; "
        "f.source_digest(('apothecary.pipeline.steps.training',)); v = f.versions(); "
        "print(v['torch'] is not None, 'torch' in sys.modules, 'apothecary.train.fit' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["True", "False", "False"]


def test_an_unknown_module_is_an_error():
    with pytest.raises(FileNotFoundError, match=r"apothecary\.nothing"):
        fingerprint.source_digest(("apothecary.nothing",))


def test_more_versions_are_recorded_than_decide_a_key():
    recorded = fingerprint.versions()
    assert {"apothecary", "accelerate", "tokenizers", "safetensors", "datasets", "numpy"} < set(recorded)
    assert set(fingerprint.key_versions()) == {"torch", "transformers", "peft"}
    assert fingerprint.key_versions().items() <= recorded.items()
