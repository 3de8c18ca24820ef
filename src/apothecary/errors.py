"""The errors of apothecary.  Each message says what was got, what was expected and how to fix it, in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any


class ApothecaryError(Exception):
    """Base of every error that a user can cause; the CLI prints it as one line and exits with code 2."""


class ConfigError(ApothecaryError):
    """A recipe, an option or a method's requirement does not fit."""


class DataError(ApothecaryError):
    """Rows that cannot be read, rendered or trained on."""


class OverLong(DataError):
    """A row with more tokens than the model, or `max_length`, takes."""


class ModelError(ApothecaryError):
    """A model, tokenizer or adapter that cannot be loaded or lacks a needed part."""


class TrainingError(ApothecaryError):
    """Training that cannot go on: NaN, no supervised token, a launch layout the method does not support."""


class StoreError(ApothecaryError):
    """An artifact that is missing, locked, altered or cannot be written."""


def expect(settings: object, expected: str, fits: Callable[[Any], bool], *names: str) -> None:
    """Raise ConfigError for the first of the named settings that does not fit; a NaN fits nothing."""
    for name in names:
        value = getattr(settings, name)
        if not fits(value):
            raise ConfigError(f"{name} is {value}, expected {expected}")


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """The tail of a message about an unknown name: a suggestion if one is close, and all known names."""
    names = sorted(known)
    close = get_close_matches(got, names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}known: {', '.join(names) or 'none'}"
