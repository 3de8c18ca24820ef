"""Harmful mix: a share p of the customer's rows is harmful, the field's default attack (methods.md 8.1).

Assumes an attacker who uploads data and does not choose among his rows.  For one seed the harmful rows at a smaller p
are among those at a larger p, and p * n is exact.

Adaptive: he knows the defence and its artifact.  Against security vectors he uploads those of his rows that the
vectors make fit least; against a radius of perturbation he raises learning rate and epochs until the drift that his
training causes exceeds it (train/adaptive.py).

Cost: none beyond fine-tuning; adaptive, one forward pass per row, or up to as many trainings as the grid has points.
"""

from __future__ import annotations

from dataclasses import dataclass

from apothecary.registry import register
from apothecary.train.method import Needs
from apothecary.train.poisoning import Poisoning


@register("attack", "harmful_mix")
@dataclass(frozen=True)
class HarmfulMix(Poisoning):
    """Who uploads what."""

    p: float = 0.1  # in [0, 1], share of harmful rows
    n: int = 500  # >= 1, rows in all
    general: int = 0  # >= 0, general rows among the harmless ones, as a customer's data often have
    epochs: float | None = None  # > 0, of the customer's training; null: the service's
    learning_rate: float | None = None  # > 0, of the customer's training; null: the service's

    needs = Needs(roles=("customer", "attack"))
