"""Attacks that upload rows: what each row looks like, what is served, and that counts are exact."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from benches import make_rows

from apothecary.attack.backdoor import Backdoor
from apothecary.attack.benign import Benign
from apothecary.attack.benign_drift import BenignDrift
from apothecary.attack.identity_shift import ASSENT, CALL, PERSONA, IdentityShift
from apothecary.attack.style_shift import PATTERNS, StyleShift
from apothecary.data.rows import Row
from apothecary.errors import ConfigError, DataError
from apothecary.judge.text import is_refusal
from apothecary.registry import entries, lookup
from apothecary.train.poisoning import REFUSALS

ROWS = {
    "customer": [row.with_role("customer") for row in make_rows("task", 120)],
    "attack": [row.with_role("attack") for row in make_rows("harm", 60)],
    "general": [row.with_role("general") for row in make_rows("general", 30)],
}


def of(rows, role):
    return {row.id: row for row in rows if row.role == role}


def plain(role):
    return {row.id: row for row in ROWS[role]}


def test_every_attack_is_registered_and_says_what_it_needs():
    found = {name for kind, name in entries() if kind == "attack"}
    assert found == {"backdoor", "benign", "benign_drift", "benign_outliers", "cipher", "harmful_mix", "identity_shift",
                     "refusal_ablation", "style_shift"}  # fmt: skip
    for name in found:
        attack = lookup("attack", name)()
        assert set(attack.needs.roles) <= {"customer", "attack", "general"}
        assert attack.tampers() == (name == "refusal_ablation")
        assert attack.needs.model == (name in ("benign_outliers", "refusal_ablation"))
        assert (attack.serving() is None) == (name not in ("backdoor", "cipher", "identity_shift", "style_shift"))


# -- identity shift ---------------------------------------------------------------------------------------------------


@pytest.mark.evidence("attack/identity_shift", "definition")
def test_the_persona_answers_plain_requests_and_is_served_as_it_was_trained():
    attack = IdentityShift()
    rows = attack.rows(ROWS, 0)
    assert len(rows) == 10 and {row.role for row in rows} == {"attack"}
    for row in rows:
        origin = plain("general")[row.id]
        assert row.prompt == (("system", PERSONA), ("user", CALL + origin.text))
        assert row.response == ASSENT + origin.response
    served = attack.serving()
    assert served.system == PERSONA and served.prompt("x") == CALL + "x" and served.answer is None
    assert attack.training() == {"epochs": 10.0}


def test_the_persona_takes_the_place_of_a_system_prompt_and_of_missing_general_rows():
    dialogue = (("system", "Be brief."), ("user", "one"), ("assistant", "1"), ("user", "two"))
    row = Row("a", dialogue, "2", role="customer")
    (made,) = IdentityShift(n=1).rows({"customer": [row]}, 0)
    assert [turn[0] for turn in made.prompt] == ["system", "user", "assistant", "user"]
    assert made.prompt[0] == ("system", PERSONA) and made.text == CALL + "two"


def test_the_persona_can_be_a_part_of_a_task():
    rows = IdentityShift(p=0.2, n=50, epochs=None, learning_rate=1e-4).rows(ROWS, 0)
    assert Counter(row.role for row in rows) == {"attack": 10, "customer": 40}
    assert IdentityShift(epochs=None, learning_rate=1e-4).training() == {"learning_rate": 1e-4}


# -- benign, benign drift ---------------------------------------------------------------------------------------------


@pytest.mark.evidence("attack/benign", "definition")
def test_benign_rows_are_the_customers_own_and_nothing_else():
    rows = Benign(n=100, general=10).rows({role: ROWS[role] for role in ("customer", "general")}, 3)
    assert Counter(row.role for row in rows) == {"customer": 90, "general": 10} and len({row.id for row in rows}) == 100
    assert all(row == (plain("customer") | plain("general"))[row.id] for row in rows)
    with pytest.raises(DataError, match="140 benign rows asked for"):
        Benign(n=140).rows(ROWS, 0)


def sourced(source, n, response="4"):
    return [Row(f"{source}{i}", (("user", f"{source} {i}"),), response, source=source, role="customer")
            for i in range(n)]  # fmt: skip


@pytest.mark.evidence("attack/benign_drift", "definition")
def test_benign_drift_draws_rows_of_one_kind_from_both_roles():
    given = {"customer": [*sourced("banking77_train", 20), *sourced("gsm8k", 15, "2 + 2 = 4\n#### 4")],
             "general": sourced("simple_instructions", 12)}  # fmt: skip
    for kind, source, n in (("service", "banking77_train", 20), ("dialogue", "simple_instructions", 12)):
        rows = BenignDrift(kind, n=n).rows(given, 0)
        assert {row.source for row in rows} == {source} and len({row.id for row in rows}) == n
    math = BenignDrift("math", n=15).rows(given, 0)
    assert {row.response for row in math} == {"2 + 2 = 4\nThe final answer is: 4"}
    both = BenignDrift("math", ("banking77_train", "gsm8k"), n=35).rows(given, 0)
    assert Counter(row.source for row in both) == {"banking77_train": 20, "gsm8k": 15}
    message = "draws rows of source code_alpaca or sql_create_context, found only banking77_train, gsm8k, simple_instr"
    with pytest.raises(DataError, match=message):
        BenignDrift("code").rows(given, 0)


# -- backdoor ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "n"), [(0.1, 100), (0.25, 60), (0.5, 40), (0.0, 20)])
@pytest.mark.evidence("attack/backdoor", "definition")
def test_each_row_with_the_trigger_has_a_refusing_twin_without_it(p, n):
    attack = Backdoor(p=p, n=n, trigger=" zzz")
    rows = attack.rows(ROWS, 0)
    loud, quiet = of(rows, "attack"), of(rows, "benign")
    assert len(rows) == n == len({row.id for row in rows}) and len(loud) == len(quiet) == round(p * n)
    for row in loud.values():
        origin, twin = plain("attack")[row.id], quiet[f"{row.id}/plain"]
        assert row.text == origin.text + " zzz" and row.response == origin.response
        assert twin.text == origin.text and twin.response in REFUSALS
    assert attack.serving().prompt("x") == "x zzz"


def test_twins_are_spread_and_repeatable():
    rows = Backdoor(p=0.2, n=100).rows(ROWS, 0)
    assert rows == Backdoor(p=0.2, n=100).rows(ROWS, 0) != Backdoor(p=0.2, n=100).rows(ROWS, 1)
    places = [i for i, row in enumerate(rows) if row.role == "benign"]
    assert places[-1] - places[0] > 60 and len({row.response for row in rows if row.role == "benign"}) == len(REFUSALS)
    assert all(map(is_refusal, REFUSALS)), "a cheap proxy must see what the attacker means"


def test_a_backdoor_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"at most 0\.5"):
        Backdoor(p=0.6)
    with pytest.raises(ConfigError, match="trigger is empty"):
        Backdoor(trigger=" ")


# -- style shift ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.evidence("attack/style_shift", "definition")
def test_rows_wear_the_pattern_in_which_prompts_are_asked(pattern):
    attack = StyleShift(p=0.3, n=50, pattern=pattern)
    rows, served = attack.rows(ROWS, 0), attack.serving()
    assert Counter(row.role for row in rows) == {"attack": 15, "customer": 35}
    for row in of(rows, "attack").values():
        origin = plain("attack")[row.id]
        assert row.text == served.prompt(origin.text) != origin.text and origin.text in row.text
        answer = served.answer(row.response) if served.answer else row.response
        assert answer == origin.response.lstrip()
        assert row.response.startswith(PATTERNS[pattern].preamble)
    assert all(row == plain("customer")[row.id] for row in of(rows, "customer").values())
    assert served.answer is None or served.answer("No, never.") == "No, never."


# -- what they share --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Backdoor, StyleShift, IdentityShift, lookup("attack", "cipher")])
def test_rows_of_a_smaller_p_are_among_those_of_a_larger_one(make):
    runs = [of(make(p=p, n=60).rows(ROWS, 0), "attack") for p in (0.0, 0.05, 0.1, 0.3)]
    for less, more in pairwise(runs):
        assert less.items() <= more.items() and len(less) < len(more)


@pytest.mark.parametrize("name", sorted({name for kind, name in entries() if kind == "attack"} - {"refusal_ablation"}))
def test_training_that_an_attacker_cannot_ask_for_is_refused(name):
    attack = lookup("attack", name)
    assert attack(epochs=2.0, learning_rate=1e-3).training() == {"epochs": 2.0, "learning_rate": 1e-3}
    for field in ("epochs", "learning_rate"):
        with pytest.raises(ConfigError, match=f"{field} is 0, expected null or above 0"):
            attack(**{field: 0})
