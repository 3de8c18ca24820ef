"""For every test: no network, one thread, and GPU tests only where there is a GPU."""

from __future__ import annotations

import os

import pytest

pytest_plugins = ["fidelity.badge"]

for name, value in {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(name, value)  # before anything imports torch or the hub's client


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-trajectories", action="store_true", help="store what train/test_trajectories.py computes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
