"""The workbench: a loaded model, the rows by role and a folder; what fitting, preparing and scoring work on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from apothecary.data.chat import Rendered, render, render_all, render_each, render_pair
from apothecary.data.rows import Row
from apothecary.errors import ConfigError, ModelError
from apothecary.models.load import LoadedModel, context_length
from apothecary.train.auxiliary import Auxiliary
from apothecary.train.config import TrainConfig
from apothecary.train.context import StepContext

if TYPE_CHECKING:
    from apothecary.train.method import Method


def _go_on() -> None:
    """The default stop check: never stop."""


@dataclass
class Workbench:
    """What a stage hands to a method.  `prepared` is the folder that the method's `prepare` has filled.

    A `source` that is a function loads the model when it is first asked for, which a selector may never do.
    """

    source: LoadedModel | Callable[[], LoadedModel]
    aux: Mapping[str, Sequence[Row]]
    seed: int
    folder: Path
    prepared: Path | None = None
    stop: Callable[[], None] = field(default=_go_on)  # raises when a cancellation was asked for
    progress: bool = False
    allow_contradicting_rows: bool = False  # whether answers may be of another kind than their role says

    @cached_property
    def loaded(self) -> LoadedModel:
        return self.source() if callable(self.source) else self.source

    @property
    def pad_id(self) -> int:
        return cast(int, self.loaded.tokenizer.pad_token_id)

    def render(self, rows: Sequence[Row], config: TrainConfig, paired: bool = False) -> list[Rendered]:
        """Token ids of rows under a training configuration's length limit, which the model's context caps."""
        return render_all(rows, self.loaded.tokenizer, self._limit(config.max_length), config.over_long,
                          render_pair if paired else render)  # fmt: skip

    def render_each(self, rows: Iterable[Row], config: TrainConfig) -> Iterator[Rendered]:
        """`render` row by row, for pools that do not fit in memory; there may be none."""
        return render_each(rows, self.loaded.tokenizer, self._limit(config.max_length), config.over_long)

    def _limit(self, max_length: int | None) -> int:
        try:
            context = context_length(self.loaded.model)
        except ModelError:  # the model states no context: then `max_length` is needed
            if max_length is None:
                raise
            return max_length
        return min(max_length or context, context)

    def require(self, method: Method) -> None:
        """Refuse a method whose data roles, models or prepared folder are missing."""
        self.require_roles(method, method.needs.roles)
        if method.needs.models:
            raise ConfigError(f"{method.kind} method '{method.name}' needs models ({', '.join(method.needs.models)}), "
                              "which no stage can give yet; choose another method")  # fmt: skip
        if method.needs.prepared and self.prepared is None:
            raise ConfigError(f"{method.kind} method '{method.name}' needs its prepare stage to run first")

    def require_roles(self, method: Method, roles: Sequence[str]) -> None:
        """Refuse a method that finds no rows of a role, or rows of another kind; `prepare` asks for its own."""
        missing = [role for role in roles if not self.aux.get(role)]
        if missing:
            raise ConfigError(f"{method.kind} method '{method.name}' needs rows of role {', '.join(missing)}; "
                              "name a source for them under data")  # fmt: skip
        if not self.allow_contradicting_rows:
            # By name, which keeps the judge's patterns out of the key of every training (pipeline/fingerprint.py): a
            # refusal changes no result.
            refuse = import_module("apothecary.train.contradiction").refuse_contradiction
            for role in roles:
                refuse(role, self.aux[role])

    def context(self, config: TrainConfig, roles: Sequence[str] = (), processes: int = 1, rank: int = 0) -> StepContext:
        """A StepContext over the model, with auxiliary batches for `roles`."""
        rendered = {role: self.render(self.aux[role], config, paired=role == "pairs") for role in roles}
        auxiliary = Auxiliary(rendered, config.aux_batch_size or config.batch_size, self.pad_id,
                              config.reduction, self.seed, processes, rank)  # fmt: skip
        return StepContext(self.loaded.model, auxiliary, config, processes,
                           layout="single" if processes == 1 else "data_parallel",
                           prepared=self.prepared)  # fmt: skip
