"""Rows are rendered before any work on a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline.models import edit

from apothecary.data.rows import Row, write_rows
from apothecary.errors import DataError
from apothecary.pipeline import preflight
from apothecary.pipeline.plan import ROWS_ONLY, plan
from apothecary.pipeline.recipe import Recipe
from apothecary.pipeline.stage import Executor
from apothecary.pipeline.store import Store


def checked(folder: Path, **changes: object) -> Executor:
    """Preflight over all stages of a recipe once its rows are read."""
    planned = plan(Recipe.parse(edit(**changes)))
    executor = Executor(Store(folder / "store"))
    for stage in planned.of_kind(*ROWS_ONLY):
        executor.execute(stage)
    preflight.check(planned.stages().values(), executor)
    return executor


@pytest.fixture
def long(tmp_path: Path) -> str:
    """Three rows, one of 600 words; the lab's context is 512 tokens."""
    texts = {"a": "fine", "b": "word " * 600, "c": "fine too"}
    write_rows(tmp_path / "long.jsonl", [Row(name, (("user", f"Say {name}"),), text) for name, text in texts.items()])
    return str(tmp_path / "long.jsonl")


def test_good_rows_pass_and_no_model_is_needed(tmp_path: Path):
    assert {record.stage.kind for record in checked(tmp_path).records.values()} == {*ROWS_ONLY}


@pytest.mark.parametrize("role", ["align", "customer", "benign"])
def test_an_over_long_row_of_any_training_is_named(role: str, long: str, tmp_path: Path):
    data = {**edit()["data"], role: long}
    with pytest.raises(DataError, match=r"row 'b' has \d+ tokens, expected at most 512"):
        checked(tmp_path, data=data, attack=None)


def test_rows_that_may_be_dropped_pass(long: str, tmp_path: Path):
    train = {"train": {"over_long": "drop"}}
    data = {**edit()["data"], "customer": long}
    checked(tmp_path, data=data, attack=None, finetune=train)
    arms = {"may drop": {"finetune": train}, "may not": {}}
    with pytest.raises(DataError, match=r"^finetune sft: may not \(seed 0\): row 'b' has"):
        checked(tmp_path, data=data, attack=None, arms=arms)


def test_a_limit_of_the_recipe_counts(tmp_path: Path):
    with pytest.raises(DataError, match="expected at most 8;"):
        checked(tmp_path, align={"train": {"max_length": 8}})


def test_rows_of_no_training_are_not_rendered(long: str, tmp_path: Path):
    checked(tmp_path, data={**edit()["data"], "validation": long}, arms={"undefended": {}})
