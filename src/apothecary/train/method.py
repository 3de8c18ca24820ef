"""The contract of a method: hyper-parameters as fields, and the few parts that it needs.

    needs      data roles and layouts, checked before any work, never silently replaced
    rows       change the data (mixing, prefixes, attacks)
    prepare    a cached stage of its own (security vectors, warm-up weights)
    init       mutable state, saved with every checkpoint
    step       the training step
    finish     after the last step
    score      selectors: one number for each row

Everything but `needs` is optional.  Design: docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from apothecary.data.rows import Row
    from apothecary.train.batch import Batch
    from apothecary.train.context import StepContext
    from apothecary.train.workbench import Workbench

State = dict[str, Any]  # tensors, numbers, strings and containers of them


@dataclass(frozen=True)
class Needs:
    """What a method cannot do without."""

    roles: tuple[str, ...] = ()  # auxiliary data: harmful, benign, pairs, validation, ...
    prepared: bool = False  # `prepare` must have run, its folder is in the Workbench
    layouts: tuple[str, ...] = ("single", "data_parallel")  # how the launch may spread the work


class Method:
    """Base of every method; a subclass is a frozen dataclass under `@register(kind, name, paper=...)`."""

    kind: ClassVar[str]
    name: ClassVar[str]
    paper: ClassVar[str | None]
    needs: ClassVar[Needs] = Needs()


class TrainingMethod(Method):
    """A method that trains: alignment, fine-tuning.  The defaults make it plain SFT."""

    def rows(self, rows: Sequence[Row], aux: Mapping[str, Sequence[Row]], seed: int) -> list[Row]:
        """The rows to train on."""
        return list(rows)

    def prepare(self, bench: Workbench, folder: Path) -> None:
        """Write what `init` needs into `folder`; a cached stage of its own, run when `needs.prepared`."""

    def init(self, ctx: StepContext) -> State:
        """State before the first step; also the place to attach adapters (before a checkpoint is loaded)."""
        return {}

    def step(self, ctx: StepContext, batch: Batch, state: State) -> Tensor:
        """Accumulate the gradient of one micro-batch into `.grad`; return the detached loss."""
        return ctx.backward(batch)

    def converged(self, ctx: StepContext, state: State) -> bool:
        """True to end the training early; asked after each optimiser step."""
        return False

    def finish(self, ctx: StepContext, state: State) -> None:
        """After the last step."""


class Selector(Method):
    """A method that ranks rows."""

    def score(self, bench: Workbench, rows: Sequence[Row]) -> dict[str, float]:
        """A number for each row id; larger is kept."""
        raise TypeError(f"selector '{self.name}' defines no score")


class Attack(Method):
    """A method that builds the customer's data as an attacker would."""

    def rows(self, rows: Mapping[str, Sequence[Row]], seed: int) -> list[Row]:
        """The rows that the customer uploads, from rows by role: customer, attack, general."""
        raise TypeError(f"attack '{self.name}' defines no rows")
