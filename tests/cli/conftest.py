from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MODULE = (sys.executable, "-m", "apothecary")
SCRIPT = (str(Path(sys.executable).with_name("apothecary")),)
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli(tmp_path: Path) -> Run:
    """The real command line in a fresh process, in an empty folder."""

    def call(*arguments: str, start: tuple[str, ...] = MODULE) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*start, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=300)

    return call
