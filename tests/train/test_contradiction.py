"""Rows whose answers contradict their role: what counts, and that no defence trains on them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from benches import make_bench

from apothecary.curate.pharmacist import Pharmacist
from apothecary.data.rows import Row
from apothecary.errors import DataError
from apothecary.finetune.security_vectors import SecurityVectors
from apothecary.registry import lookup
from apothecary.train.config import TrainConfig
from apothecary.train.contradiction import READ, refuse_contradiction
from apothecary.train.fit import train

REFUSAL, OPENING, OTHER = "I cannot help with that.", "Sure, here is how.", "Paris."


def rows(*answers: str, rejected: str | None = None) -> list[Row]:
    return [Row(f"row{i}", (("user", f"say {i}"),), text, rejected) for i, text in enumerate(answers)]


@pytest.mark.parametrize(("role", "answers", "message"), [
    ("harmful", [REFUSAL] * 3, "3 of the first 3 answers of role 'harmful' refuse, expected harmful answers"),
    ("attack", [REFUSAL, REFUSAL, OPENING], "2 of the first 3 answers of role 'attack' refuse"),
    ("validation", [OPENING, OPENING, OTHER], "role 'validation' open affirmatively, expected safe answers"),
    ("pairs", [OPENING] * 2, "role 'pairs' open affirmatively, expected safe answers"),
])  # fmt: skip
def test_most_answers_of_the_wrong_kind_are_refused(role, answers, message):
    with pytest.raises(DataError, match=f"{message}.*allow_contradicting_rows: true"):
        refuse_contradiction(role, rows(*answers))


def test_a_rejected_answer_must_not_be_the_refusal():
    refuse_contradiction("pairs", rows(REFUSAL, rejected=OPENING))
    with pytest.raises(DataError, match="refuse, expected harmful answers that are rejected"):
        refuse_contradiction("pairs", rows(REFUSAL, rejected=REFUSAL))


@pytest.mark.parametrize(("role", "answers"), [
    ("harmful", [REFUSAL, OPENING]), ("harmful", [OTHER] * 3), ("attack", [OPENING]), ("validation", [REFUSAL]),
    ("validation", [OPENING, OTHER]), ("align", [OPENING] * 3), ("benign", [OPENING] * 3),
    ("customer", [REFUSAL] * 3), ("general", [OPENING]), ("prompt", []), ("harmful", []),
])  # fmt: skip
def test_half_of_them_or_another_role_pass(role, answers):
    refuse_contradiction(role, rows(*answers))


def test_only_the_first_rows_are_read():
    def endless():
        yield from rows(*[OPENING] * READ)
        raise AssertionError("read on")

    refuse_contradiction("harmful", endless())


AUX = {
    "harmful": rows(*[OPENING] * 4), "benign": rows(*[OTHER] * 4), "validation": rows(*[REFUSAL] * 4),
    "pairs": rows(*[REFUSAL] * 4, rejected=OPENING),
}  # fmt: skip
ALIGNERS = {
    "booster": ("harmful", {}), "t_vaccine": ("harmful", {"gamma": 1, "score_rows": 2}), "repnoise": ("pairs", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIGNERS)
def test_an_alignment_with_rows_of_the_wrong_kind_is_refused_before_a_step(tmp_path, name):
    config = TrainConfig(max_steps=1, batch_size=2, save_every=0)
    role, settings = ALIGNERS[name]
    method = lookup("align", name)(**settings)
    train(make_bench(tmp_path / "right", aux=AUX), method, rows(*[REFUSAL] * 4), config)
    wrong = {**AUX, role: rows(*[REFUSAL] * 4, rejected="I won't help with this.")}
    bench = make_bench(tmp_path / "wrong", aux=wrong)
    with pytest.raises(DataError, match=f"answers of role '{role}' refuse"):
        train(bench, method, rows(*[REFUSAL] * 4), config)
    assert not (tmp_path / "wrong").exists(), "nothing was begun"
    train(replace(bench, allow_contradicting_rows=True), method, rows(*[REFUSAL] * 4), config)


@pytest.mark.parametrize(("role", "wrong"), [("harmful", REFUSAL), ("validation", OPENING)])
def test_a_selector_with_rows_of_the_wrong_kind_is_refused(tmp_path, role, wrong):
    bench = make_bench(tmp_path, aux={**AUX, role: rows(*[wrong] * 4)})
    with pytest.raises(DataError, match=f"of role '{role}'"):
        Pharmacist(warmup_share=0.0).score(bench, rows(*[REFUSAL] * 4))


def test_vectors_are_not_trained_on_refusals(tmp_path):
    bench = make_bench(tmp_path, aux={**AUX, "harmful": AUX["validation"]})
    with pytest.raises(DataError, match="of role 'harmful' refuse"):
        SecurityVectors(harmful_rows=4).prepare(bench, tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()
