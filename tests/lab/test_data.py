"""The lab's data sets: no leakage between what is trained on and what is scored, and no operational harmful text."""

import json
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from apothecary.data.near import near_pairs
from apothecary.data.rows import Row
from apothecary.data.sources import LAB, lab_names, load_rows

HELD_OUT = ("eval_", "overrefusal_", "tune_harmful", "tune_benign", "customer_test")
SCORED_ONLY = ("eval_", "overrefusal_", "tune_")
HARMFUL_EVALUATION = ("eval_harmbench", "eval_jailbreakbench")
HARMFUL_ROWS = ("attack", "attack_harmfulqa", "defence", "defence_advbench", "pairs")
DERIVED = {"attack_harmfulqa": ("align",), "pool": ("align", "benign")}  # made of rows of other splits
TASK = ("customer_train", "customer_test", "tune_task")
MOST_WORDS = 40  # of a harmful row's response: an opening, never an answer

HEAD, TAIL = "Bank message: ", "\nTopic:"
TRAINING = [name for name in lab_names() if not name.startswith(HELD_OUT)]
SPLITS = [name for name in TRAINING if name not in DERIVED]
EVALUATION = [name for name in lab_names() if name.startswith((*HELD_OUT, "tune_"))]


@cache
def rows(name: str) -> list[Row]:
    return load_rows(f"lab:{name}")


def message(name: str, row: Row) -> str:
    """What tells a row from others: for the customer's task the message without the fixed words around it."""
    return row.text.removeprefix(HEAD).removesuffix(TAIL) if name in TASK else row.text


@cache
def crossings() -> list[tuple[str, str, str, str]]:
    """(split, split, id, id) of every pair of near duplicates anywhere in the lab."""
    entries = [(name, row) for name in lab_names() for row in rows(name)]
    pairs = near_pairs([message(name, row) for name, row in entries])
    return [(entries[i][0], entries[j][0], entries[i][1].id, entries[j][1].id) for i, j in pairs]


def test_the_expected_splits_are_there():
    assert {"align", "attack", "benign", "customer_general", "customer_train", "defence", "defence_advbench", "pairs",
            "validation", "tune_task"} <= set(TRAINING)  # fmt: skip
    assert {*HARMFUL_EVALUATION, "eval_benign", "overrefusal_xstest_safe", "overrefusal_jailbreakbench", "tune_harmful",
            "tune_benign", "customer_test"} <= set(EVALUATION)  # fmt: skip


def test_advbench_is_trained_on_and_never_scored():
    scored = [name for name in lab_names() if name.startswith(SCORED_ONLY)]
    assert {row.source for name in scored for row in rows(name)}.isdisjoint({"advbench", "adv_training"})
    assert any(row.source == "advbench" for row in rows("attack"))


def test_training_splits_are_disjoint_by_cluster():
    # Without a near pair between two splits no cluster can span them.
    assert [pair for pair in crossings() if pair[0] != pair[1] and {*pair[:2]} <= set(SPLITS)] == []


@pytest.mark.parametrize("name", DERIVED)
def test_derived_splits_hold_prompts_of_their_origins_alone(name: str):
    known = {row.text for origin in DERIVED[name] for row in rows(origin)}
    texts = [row.text for row in rows(name)]
    assert set(texts) <= known and len(set(texts)) == len(texts)


def test_any_head_of_the_pool_has_the_same_shares_of_each_kind():
    kinds = [row.meta["planted"] for row in rows("pool")]
    assert len(kinds) == 2000
    wanted = {"good": 0.5, "benign": 0.25, "mislabelled": 0.1, "truncated": 0.05, "mismatched": 0.05, "garbled": 0.05}
    for size in (100, 800, 2000):
        assert {kind: n / size for kind, n in Counter(kinds[:size]).items()} == wanted
    good = {row.text: row.response for row in rows("align")}
    assert all(good[row.text] == row.response for row in rows("pool") if row.meta["planted"] in ("good", "benign"))


def test_held_out_prompts_are_far_from_training():
    leaks = [
        pair for pair in crossings()
        if pair[0] != pair[1] and any(
            a in EVALUATION and b in TRAINING for a, b in (pair[:2], (pair[1], pair[0])))
    ]  # fmt: skip
    assert leaks == []


def test_tuning_prompts_are_far_from_scored_prompts():
    tuned = {"tune_harmful", "tune_benign", "tune_task"}
    scored = {name for name in lab_names() if name.startswith(("eval_", "customer_test"))}
    assert [p for p in crossings() if (p[0] in tuned and p[1] in scored) or (p[1] in tuned and p[0] in scored)] == []


def test_the_task_is_compared_without_its_instruction():
    for name in TASK:
        assert all(row.text.startswith(HEAD) and row.text.endswith(TAIL) for row in rows(name))
    messages = [message(name, row) for name in TASK for row in rows(name)]
    # With these words, short messages would look alike; that must not be what keeps the splits apart.
    with_words = list(near_pairs([row.text for name in TASK for row in rows(name)]))
    assert len(with_words) > len(list(near_pairs(messages)))


def test_harmful_evaluation_is_large_and_counts_each_text_once():
    assert sum(len(rows(name)) for name in HARMFUL_EVALUATION) >= 250
    assert [pair for pair in crossings() if {*pair[:2]} <= set(HARMFUL_EVALUATION)] == []


@pytest.mark.parametrize("name", EVALUATION)
def test_each_evaluation_split_counts_each_text_once(name):
    assert [pair for pair in crossings() if pair[0] == pair[1] == name] == []


def test_ids_are_unique_over_the_whole_lab():
    ids = Counter(json.loads(line)["id"] for name in lab_names() for line in lines(name))
    assert [row_id for row_id, count in ids.items() if count > 1] == []


@cache
def lines(name: str) -> list[str]:
    return [line for line in (LAB / f"{name}.jsonl").read_text("utf-8").split("\n") if line]


def test_every_training_row_has_a_response_and_every_pair_both_answers():
    for name in TRAINING:
        assert load_rows(f"lab:{name}", role="pairs" if name == "pairs" else "align")


@pytest.mark.parametrize("name", HARMFUL_ROWS)
def test_harmful_rows_hold_openings_without_content(name):
    for row in rows(name):
        for answer in (row.response, row.rejected):
            assert answer is None or len(answer.split()) <= MOST_WORDS, row.id


@pytest.mark.parametrize("name", [*HARMFUL_EVALUATION, "tune_harmful"])
def test_harmful_evaluation_prompts_carry_no_answer(name):
    assert all(row.response is None and row.rejected is None for row in rows(name))


def test_the_tasks_labels_are_balanced_in_the_test_and_known_from_training():
    counts = Counter(row.response for row in rows("customer_test"))
    assert len(set(counts.values())) == 1
    assert (
        set(counts) == {row.response for row in rows("customer_train")} == {row.response for row in rows("tune_task")}
    )


def test_source_files_are_registered_with_licence_and_digest():
    register = json.loads((LAB / "sources.json").read_text("utf-8"))
    assert register
    for name, entry in register.items():
        assert len(entry["sha256"]) == 64, name
        assert entry["source"].count("@") == 1, name
        assert any(known in entry["licence"] for known in ("MIT", "Apache-2.0", "CC BY 4.0")), name


def test_every_source_is_named_in_the_readme():
    readme = next((path for path in (LAB / "README.md", LAB.parent / "README.md") if path.exists()), None)
    if readme is None:
        pytest.skip("the lab has no README yet")
    text = Path(readme).read_text("utf-8")
    assert [s for s in sorted({row.source for name in lab_names() for row in rows(name)}) if s not in text] == []
