"""Rows before any work on the model: one that cannot be trained on, or of the wrong kind, shows at once."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from apothecary.config import build
from apothecary.data.chat import render
from apothecary.data.rows import Row, RowFile, read_rows
from apothecary.errors import DataError, OverLong
from apothecary.models.settings import ModelConfig
from apothecary.pipeline.stage import Executor, Stage
from apothecary.train.contradiction import refuse_contradiction

TRAINED = ("align", "prepare", "finetune")
READ = ("data", "attack")  # stages whose rows are there before any model is loaded


def check(stages: Iterable[Stage], executor: Executor) -> None:
    """Render what the stages still to be trained will see; raises what their training would raise.

    Rows that a selector has yet to choose are left to the training itself, and so are rows that it may drop.
    """
    todo = [stage for stage in stages if stage.kind in TRAINED and executor.state(stage) != "fresh"]
    if not todo:
        return
    from apothecary.models.load import load_tokenizer

    tokenizer, context = load_tokenizer(build(ModelConfig, todo[0].config["model"], "model"))
    seen = set()
    for stage in todo:
        train = _training(stage)
        limit = min(train.get("max_length") or sys.maxsize, context or sys.maxsize)
        drop = train.get("over_long") == "drop"
        for row in _rows(stage, executor):
            if (case := (row.prompt, row.response, limit, drop)) not in seen:
                seen.add(case)
                try:
                    render(row, tokenizer, limit)
                except OverLong as error:
                    if not drop:
                        raise OverLong(f"{stage.label}: {error}") from error


def check_kinds(stages: Iterable[Stage], executor: Executor) -> None:
    """Refuse sources whose answers contradict the role that the recipe gives them, before any model is loaded."""
    for stage in stages:
        if stage.kind == "data":
            try:
                refuse_contradiction(stage.config["role"], RowFile(executor.execute(stage).path("rows.jsonl")))
            except DataError as error:
                raise DataError(f"{stage.label}: {error}") from error


def _training(stage: Stage) -> Mapping[str, Any]:
    """The training settings of a stage; what is prepared has them, if any, among its method's own."""
    if "train" in stage.config:
        return stage.config["train"]
    nested = (value for value in stage.config["fields"].values() if isinstance(value, Mapping))
    return next((value for value in nested if "over_long" in value), {})


def _rows(stage: Stage, executor: Executor) -> Iterator[Row]:
    for name, source in stage.inputs.items():
        if source.kind in READ and "model" not in source.config and (name == "rows" or name.startswith("aux.")):
            yield from read_rows(executor.execute(source).path("rows.jsonl"))
