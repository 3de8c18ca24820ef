import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apothecary.data.batching import BLOCK, padding_share, plan, share
from apothecary.data.sources import LAB, load_rows
from apothecary.errors import ConfigError

LENGTHS = st.lists(st.integers(1, 50), max_size=120)


@settings(max_examples=200, database=None, deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(0, 9), st.integers(0, 3))
def test_every_row_exactly_once_in_full_batches(lengths, batch_size, seed, epoch):
    batches = plan(lengths, batch_size, seed, epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)
    assert sum(len(batch) != batch_size for batch in batches) == (len(lengths) % batch_size > 0)
    assert batches == plan(lengths, batch_size, seed, epoch)


def test_plan_is_the_same_in_another_interpreter():
    code = "from apothecary.data.batching import plan; print(plan([i * 7 % 31 for i in range(60)], 4, 3, 2))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(plan([i * 7 % 31 for i in range(60)], 4, 3, 2))


def test_seed_and_epoch_change_the_plan():
    lengths = [i % 17 + 1 for i in range(200)]
    plans = [plan(lengths, 8, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 10), (10, 0))]
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])
    memberships = [{frozenset(batch) for batch in batches} for batches in plans]
    assert len(memberships[0] & memberships[1]) < len(memberships[0]) / 2  # not merely another order of the batches


def test_batches_of_a_block_do_not_overlap_in_length_and_come_in_no_order():
    lengths = list(range(8 * BLOCK))
    batches = plan(lengths, 8, 0, 0)
    assert all(max(batch) - min(batch) == 7 for batch in batches)
    assert [batch[0] for batch in batches] != sorted(batch[0] for batch in batches)


@settings(max_examples=100, database=None, deadline=None)
@given(st.lists(st.integers(), max_size=20), st.integers(1, 8))
def test_parts_are_contiguous_even_and_complete(batch, parts):
    split = [share(batch, parts, index) for index in range(parts)]
    assert [i for part in split for i in part] == batch
    sizes = [len(part) for part in split]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_rows_run_out_before_parts():
    assert [share([5, 6], 4, index) for index in range(4)] == [[5], [6], [], []]


@pytest.mark.parametrize("index", [-1, 2])
def test_part_outside_its_range(index):
    with pytest.raises(ConfigError, match=f"part {index} of 2 asked for"):
        share([1], 2, index)


def test_batch_size_below_one():
    with pytest.raises(ConfigError, match="batch size is 0, expected at least 1 row"):
        plan([1, 2], 0, 0, 0)


def test_padding_share_by_hand():
    lengths, batches = [1, 3, 4, 4], [[0, 1], [2, 3]]
    assert padding_share(lengths, batches) == pytest.approx(2 / 14)
    assert padding_share(lengths, [[0, 1, 2, 3]]) == pytest.approx(4 / 16)
    assert padding_share(lengths, [[0, 1, 2, 3]], parts=2) == pytest.approx(2 / 14)
    assert padding_share(lengths, [[0, 1, 2, 3]], parts=8) == 0
    assert padding_share([], []) == 0


def lab_lengths() -> list[int]:
    rows = load_rows("lab:customer_train") + load_rows("lab:align")
    model = LAB.parent / "model"
    if not (model / "tokenizer.json").exists():
        return [sum(len(text.split()) for text in (row.text, row.response or "")) for row in rows]
    from transformers import AutoTokenizer

    from apothecary.data.chat import render

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [len(render(row, tokenizer, 10_000).ids) for row in rows]


def test_padding_is_under_15_percent_of_the_labs_tokens():
    lengths = lab_lengths()
    for batch_size in (8, 16):
        for seed, parts in ((0, 1), (1, 1), (2, 2), (3, 8)):
            found = padding_share(lengths, plan(lengths, batch_size, seed, 0), parts)
            print(f"batch size {batch_size}, {parts} parts: padding {found:.1%}")
            assert found < 0.15
        ungrouped = [list(range(i, min(i + batch_size, len(lengths)))) for i in range(0, len(lengths), batch_size)]
        assert padding_share(lengths, ungrouped) > 0.2  # the bound means something
