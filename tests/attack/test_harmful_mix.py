"""The field's default attack: a share p of harmful rows."""

from __future__ import annotations

from itertools import pairwise

import pytest
from benches import make_rows

from apothecary.attack.harmful_mix import HarmfulMix
from apothecary.errors import ConfigError, DataError
from apothecary.registry import lookup

ROWS = {
    "customer": [row.with_role("customer") for row in make_rows("task", 120)],
    "attack": [row.with_role("attack") for row in make_rows("harm", 60)],
    "general": [row.with_role("general") for row in make_rows("general", 30)],
}


def mixed(seed=0, **settings):
    return HarmfulMix(**settings).rows(ROWS, seed)


def of(rows, role):
    return {row.id for row in rows if row.role == role}


@pytest.mark.parametrize("n", [1, 10, 37, 100])
@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.25, 1 / 3, 0.5])
@pytest.mark.evidence("attack/harmful_mix", "definition")
def test_the_number_of_harmful_rows_is_exact(p, n):
    rows = mixed(p=p, n=n)
    assert len(rows) == n == len({row.id for row in rows})
    assert len(of(rows, "attack")) == round(p * n) and len(of(rows, "customer")) == n - round(p * n)


@pytest.mark.evidence("attack/harmful_mix", "definition")
def test_rows_of_a_smaller_p_are_among_those_of_a_larger_one():
    runs = [mixed(p=p, n=100, general=10) for p in (0.0, 0.05, 0.1, 0.3, 0.6)]
    for less, more in pairwise(runs):
        assert of(less, "attack") < of(more, "attack")
        assert of(more, "customer") < of(less, "customer")
        assert of(more, "general") == of(less, "general")


def test_seeds_choose_and_shuffle():
    assert mixed(n=100) == mixed(n=100) != mixed(1, n=100)
    assert of(mixed(n=100), "attack") != of(mixed(1, n=100), "attack")
    places = [i for i, row in enumerate(mixed(n=100)) if row.role == "attack"]
    assert len(places) == 10 and places[-1] - places[0] > 30, "harmful rows are spread"


@pytest.mark.parametrize(("p", "n", "general", "expected"), [
    (0.1, 50, 20, 20), (0.1, 50, 0, 0), (0.5, 20, 15, 10), (1.0, 20, 15, 0),
])  # fmt: skip
@pytest.mark.evidence("attack/harmful_mix", "definition")
def test_general_rows_take_the_place_of_harmless_ones(p, n, general, expected):
    rows = mixed(p=p, n=n, general=general)
    assert len(rows) == n and len(of(rows, "attack")) == round(p * n)
    assert len(of(rows, "general")) == expected
    assert len(of(rows, "customer")) == n - round(p * n) - expected


@pytest.mark.parametrize(("settings", "message"), [
    ({"p": 0.7, "n": 100}, "70 harmful rows asked for .* there are 60"),
    ({"p": 0.1, "n": 200}, "180 benign rows asked for .* there are 120"),
    ({"p": 0.1, "n": 100, "general": 31}, "31 general rows asked for, there are 30; lower attack.general"),
])  # fmt: skip
def test_too_few_rows_are_refused(settings, message):
    with pytest.raises(DataError, match=message):
        mixed(**settings)


@pytest.mark.parametrize(("field", "value"), [("p", 1.5), ("p", -0.1), ("p", float("nan")), ("n", 0), ("n", -3),
                                              ("general", -1)])  # fmt: skip
def test_numbers_outside_their_range_are_refused(field, value):
    with pytest.raises(ConfigError, match="expected"):
        mixed(**({"n": 20} | {field: value}))


def test_it_is_registered_and_states_its_needs():
    assert lookup("attack", "harmful_mix") is HarmfulMix and HarmfulMix.needs.roles == ("customer", "attack")
