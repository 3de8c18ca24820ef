"""The table of what is compared: plain SFT, the methods, and their obvious implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from apothecary.align.booster import Booster
from apothecary.align.repnoise import RepNoise
from apothecary.align.sft import Sft
from apothecary.align.t_vaccine import TVaccine
from apothecary.align.vaccine import Vaccine
from apothecary.finetune.security_vectors import SecurityVectors
from apothecary.train.method import TrainingMethod
from benchmarks.reference import booster, repnoise, t_vaccine, vaccine
from benchmarks.subjects import LAYOUTS, Subject

Passes = Callable[[], object]  # the passes of one step; they leave its gradient in `.grad`
Opened = Callable[[Subject], AbstractContextManager[Passes]]
BASELINE = "sft"


@dataclass(frozen=True)
class Configuration:
    opened: Opened
    layouts: tuple[str, ...] = LAYOUTS
    every: int = 1  # measured in every n-th round
    draws: int = 1  # steps that differ at random, over all rounds together


def product(make: Callable[[], TrainingMethod]) -> Opened:
    """A method of the package, as the trainer runs it."""

    @contextmanager
    def opened(subject: Subject) -> Iterator[Passes]:
        method, ctx = make(), subject.ctx
        state = method.init(ctx)
        try:
            yield lambda: method.step(ctx, subject.batch, state)
        finally:
            method.finish(ctx, state)

    return opened


def plain(passes: Callable[[Subject], object]) -> Opened:
    """An obvious implementation."""

    @contextmanager
    def opened(subject: Subject) -> Iterator[Passes]:
        def inside() -> None:
            with subject.ctx.autocast():
                passes(subject)

        yield inside

    return opened


def _t_vaccine(subject: Subject) -> TVaccine:
    """Draws its layers anew in each step and scores them in none, for which there is a configuration of its own."""
    return TVaccine(gamma=min(8, -(-subject.shape.layers // 3)), resample=1, rescore=10**9)


def _evenly(subject: Subject) -> list[float]:
    """Layer probabilities: with random weights no layer is special."""
    return [1.0] * subject.shape.layers


@contextmanager
def _t_vaccine_step(subject: Subject) -> Iterator[Passes]:
    method = _t_vaccine(subject)
    state = {"steps": next(subject.draws), "probabilities": _evenly(subject), "layers": []}
    yield lambda: method.step(subject.ctx, subject.batch, state)


@contextmanager
def _t_vaccine_scoring(subject: Subject) -> Iterator[Passes]:
    yield lambda: _t_vaccine(subject).probabilities(subject.ctx)


def _t_vaccine_reference(subject: Subject) -> None:
    layers = _t_vaccine(subject).draw(subject.ctx, _evenly(subject), next(subject.draws))
    t_vaccine.step(subject.ctx.model, subject.batch, layers)


def _booster(subject: Subject) -> None:
    booster.step(subject.ctx.model, subject.batch, subject.ctx.aux("harmful", per="step"))


def _repnoise(subject: Subject) -> None:
    shape = (subject.shape.rows, subject.shape.tokens, subject.shape.hidden)
    repnoise.step(subject.ctx.model, subject.batch, *subject.ctx.pairs(),
                  noise=lambda _layer: torch.randn(shape, device=subject.ctx.device))  # fmt: skip


CONFIGURATIONS: dict[str, Configuration] = {
    BASELINE: Configuration(product(Sft)),
    "vaccine": Configuration(product(Vaccine)),
    "vaccine, merged probe": Configuration(product(lambda: Vaccine(probe="merged")), layouts=("lora",)),
    "vaccine, reference": Configuration(plain(lambda s: vaccine.step(s.ctx.model, s.batch)), every=4),
    "t_vaccine": Configuration(_t_vaccine_step, draws=10),
    "t_vaccine, scoring": Configuration(_t_vaccine_scoring, every=5),
    "t_vaccine, reference": Configuration(plain(_t_vaccine_reference), every=4),
    "booster": Configuration(product(Booster)),
    "booster, reference": Configuration(plain(_booster), every=4),
    "repnoise": Configuration(product(RepNoise)),
    "repnoise, reference": Configuration(plain(_repnoise), every=2),
    "security_vectors": Configuration(product(SecurityVectors)),
    "security_vectors, branch": Configuration(product(lambda: SecurityVectors(execution="branch"))),
}
