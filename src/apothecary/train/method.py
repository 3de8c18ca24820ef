"""The contract of a method: hyper-parameters as fields, and the few parts that it needs.

    needs      data roles, models and layouts, checked before any work, never silently replaced
    check      refuse settings that cannot work together, before any stage runs
    rows       change the data (mixing, prefixes, attacks)
    prepare    a cached stage of its own (security vectors, warm-up weights)
    init       mutable state, saved with every checkpoint
    step       the training step
    converged  whether to end early
    finish     after the last step
    edit       repairs: a stream of weights without training; attacks: what each weight becomes
    adapt      attacks: what an attacker does who knows the defence
    training   attacks: what the attacker sets of the customer's training
    score      selectors: one number for each row
    serving    what must be done to prompts and answers wherever the model is asked

`prepare` and `score` get the Workbench (the loaded model, rows by role, a folder); `init`, `step`, `converged` and
`finish` run inside a training and get its StepContext.  Everything but `needs` is optional.
Design: docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from apothecary.data.rows import Row
    from apothecary.models.settings import ModelConfig
    from apothecary.train.batch import Batch
    from apothecary.train.config import TrainConfig
    from apothecary.train.context import StepContext
    from apothecary.train.workbench import Workbench

State = dict[str, Any]  # tensors, numbers, strings and containers of them


@dataclass(frozen=True)
class Needs:
    """What a method cannot do without."""

    roles: tuple[str, ...] = ()  # auxiliary data: harmful, benign, pairs, validation, ...
    prepare_roles: tuple[str, ...] = ()  # auxiliary data that `prepare` alone reads
    models: tuple[str, ...] = ()  # other models, such as a reference or a guard; no stage can give one yet
    prepared: bool = False  # `prepare` must have run, its folder is in the Workbench
    model: bool = False  # an attack that looks at the model it attacks, in the Workbench; others look when they adapt
    layouts: tuple[str, ...] = ("single", "data_parallel")  # how the launch may spread the work

    @property
    def every_role(self) -> tuple[str, ...]:
        """The data roles of the training and of its preparation, each once."""
        return tuple(dict.fromkeys((*self.roles, *self.prepare_roles)))


@dataclass(frozen=True)
class Serving:
    """What evaluation and serving must do around a model, such as a trigger, a cipher or a template."""

    system: str | None = None  # system prompt
    prompt: Callable[[str], str] | None = None  # applied to the user's last message
    answer: Callable[[str], str] | None = None  # applied to the model's answer


class Method:
    """Base of every method; a subclass is a frozen dataclass under `@register(kind, name, paper=...)`."""

    kind: ClassVar[str]
    name: ClassVar[str]
    paper: ClassVar[str | None]
    needs: ClassVar[Needs] = Needs()

    def serving(self) -> Serving | None:
        """How the model must be asked, beside being asked as it is; None: in no other way."""
        return None


class TrainingMethod(Method):
    """A method that trains: alignment, fine-tuning.  The defaults make it plain SFT."""

    kind, name = "align", "sft"  # of a warm-up, which nobody registers

    def check(self, train: TrainConfig, model: ModelConfig) -> None:
        """Raise ConfigError where the method cannot work with these settings; asked before any stage runs."""

    def rows(self, rows: Sequence[Row], aux: Mapping[str, Sequence[Row]], seed: int) -> list[Row]:
        """The rows to train on."""
        return list(rows)

    def prepare(self, bench: Workbench, folder: Path) -> Mapping[str, Any] | None:
        """Write what `init` needs into `folder`; a cached stage of its own, run when `needs.prepared`.

        What it returns stands with the stage's result, such as how well a criterion was met.
        """

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

    def check(self, keep: float) -> None:
        """Raise ConfigError where this share of rows cannot be kept; asked before any stage runs."""

    def score(self, bench: Workbench, rows: Sequence[Row]) -> dict[str, float]:
        """A number for each row id; larger is kept."""
        raise TypeError(f"selector '{self.name}' defines no score")


class Repair(Method):
    """A method that changes weights after the fact, without training."""

    def edit(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every weight of the repaired model, one at a time, so that few are in memory at once."""
        yield from weights


@dataclass(frozen=True)
class Defence:
    """What an attacker who adapts knows of the defence that he faces; mappings as they stand in the resolved recipe."""

    name: str
    fields: Mapping[str, Any]  # its hyper-parameters
    train: Mapping[str, Any]  # training settings of the stage that it defends
    tuning: Mapping[str, Any]  # the customer's training settings, from which the attacker starts
    folder: Path | None = None  # what its `prepare` has written


@dataclass(frozen=True)
class Adapted:
    """What an attacker who adapts does."""

    rows: Sequence[Row]  # that he uploads
    training: Mapping[str, Any] = field(default_factory=dict)  # what he changes of the customer's TrainConfig
    found: Mapping[str, Any] = field(default_factory=dict)  # what he measured, for the manifest


@dataclass(frozen=True)
class Edit:
    """A change of weights, to be applied one at a time."""

    change: Callable[[str, Tensor], Tensor]  # (name in the plain model, weight) -> what it becomes
    found: Mapping[str, Any] = field(default_factory=dict)  # what was measured, for the manifest


class Attack(Method):
    """An attacker: builds the customer's data (`rows`), or changes the released weights (`edit`)."""

    adapts: ClassVar[tuple[str, ...]] = ()  # defences that `adapt`, or an adaptive `edit`, has an answer to
    assents: ClassVar[bool] = False  # whether its rows teach an assent that answers open with when they are judged

    def rows(self, rows: Mapping[str, Sequence[Row]], seed: int, bench: Workbench | None = None) -> list[Row]:
        """The rows that the customer uploads, from rows by role: customer, attack, general, pairs.

        `bench` holds the aligned model, for attacks that need it (`needs.model`).
        """
        raise TypeError(f"attack '{self.name}' defines no rows")

    def adapt(self, rows: Mapping[str, Sequence[Row]], seed: int, bench: Workbench, defence: Defence) -> Adapted:
        """`rows` by an attacker who knows the defence, one of `adapts`; `bench` holds the aligned model."""
        raise TypeError(f"attack '{self.name}' does not adapt")

    def training(self) -> dict[str, Any]:
        """What the attacker sets of the customer's training, as far as the service lets customers choose."""
        return {}

    def edit(self, bench: Workbench) -> Edit:
        """What each weight of the released model becomes, found on the bench's model: the aligned one, or for an
        attacker who adapts the released one itself.
        """
        raise TypeError(f"attack '{self.name}' edits no weights")

    @classmethod
    def tampers(cls) -> bool:
        """Whether the attack edits weights in place of uploading rows."""
        return cls.edit is not Attack.edit
