"""Vectors that are trained once for all tests of a file."""

from __future__ import annotations

import pytest
from vector_scenes import prepare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("vectors"), lamb=5.0)


@pytest.fixture(scope="module")
def without_kl(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("without"), lamb=0.0)
