"""Rows of role `pairs`: two answers to one prompt, drawn together and divided like every other role."""

from __future__ import annotations

import pytest
import torch
from benches import make_bench, make_context, make_pairs, make_rows
from tiny import EOS, tiny_tokenizer

from apothecary.data.chat import render, render_all, render_pair
from apothecary.data.rows import Row
from apothecary.errors import DataError, OverLong
from apothecary.train.batch import joined

ROWS = make_pairs(7)


def test_both_answers_are_rendered_behind_the_same_prompt():
    tokenizer = tiny_tokenizer()
    (row,) = make_pairs(1)
    pair = render_pair(row, tokenizer, 256)
    assert pair.rejected is not None and pair.rejected.row_id == pair.row_id == row.id
    assert pair.start == pair.rejected.start and pair.ids[: pair.start] == pair.rejected.ids[: pair.start]
    assert tokenizer.decode(pair.rejected.ids[pair.start : -1]) == row.rejected and pair.rejected.ids[-1] == EOS
    assert pair.ids == render(row, tokenizer, 256).ids and render(row, tokenizer, 256).rejected is None


@pytest.mark.parametrize("answers", [("No.", "Sure " * 99), ("No " * 99, "Sure.")])
def test_a_pair_is_as_long_as_its_longer_answer(answers):
    tokenizer, row = tiny_tokenizer(), Row("r", (("user", "a"),), *answers)
    with pytest.raises(OverLong, match="row 'r'"):
        render_all([*ROWS, row], tokenizer, 100, one=render_pair)
    kept = render_all([*ROWS, row], tokenizer, 100, "drop", render_pair)
    assert [pair.row_id for pair in kept] == [pair.id for pair in ROWS]


@pytest.mark.parametrize("rejected", [None, "", "No."])
def test_a_row_without_two_answers_is_named(rejected):
    with pytest.raises(DataError, match="row 'lone'"):
        render_pair(Row("lone", (("user", "a"),), "No.", rejected), tiny_tokenizer(), 256)


@pytest.mark.parametrize("reduction", ["token_mean", "sample_mean"])
def test_both_sides_hold_the_same_rows_with_a_normaliser_each(tmp_path, reduction):
    def drawn(window, processes=1, rank=0):
        ctx = make_context(make_bench(tmp_path, aux={"pairs": ROWS}), ("pairs",), aux_batch_size=3, reduction=reduction)
        ctx.auxiliary.processes, ctx.auxiliary.rank = processes, rank
        steps = []
        for _ in range(3):
            ctx.begin_step(window)
            for micro in range(window):
                ctx.begin_micro_step(micro)
                steps.append(ctx.pairs())
        return steps

    whole, parts = drawn(1), drawn(4)
    both = [drawn(2, 2, rank) for rank in (0, 1)]
    assert sorted(row for sides in whole for row in sides[0].row_ids) == sorted(row.id for row in ROWS)
    for side in (0, 1):
        for step, batches in enumerate(whole):
            four = [sides[side] for sides in parts[4 * step : 4 * step + 4]]
            assert [row for part in four for row in part.row_ids] == list(batches[side].row_ids)
            assert {part.normaliser for part in four} == {batches[side].normaliser}
            assert sum(float(part.share(reduction)) for part in four) == pytest.approx(1)
            assert float(batches[side].share(reduction)) == pytest.approx(1)
            shared = [both[i % 2][2 * step + i // 2][side] for i in range(4)]
            assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(four, shared, strict=True))
    refusals, harmful = whole[0]
    assert refusals.row_ids == harmful.row_ids and not torch.equal(refusals.labels[0], harmful.labels[0])


def test_joined_batches_keep_their_rows_and_are_padded_on_the_right(tmp_path):
    ctx = make_context(make_bench(tmp_path, aux={"pairs": ROWS, "benign": make_rows("a longer row", 4)}),
                       ("pairs", "benign"), aux_batch_size=2)  # fmt: skip
    batches = [ctx.pairs()[1], ctx.aux("benign")]
    whole, start = joined(batches), 0
    assert whole.row_ids == (*batches[0].row_ids, *batches[1].row_ids)
    for batch in batches:
        rows, width = batch.input_ids.shape
        for name, blank in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            got = getattr(whole, name)[start : start + rows]
            assert torch.equal(got[:, :width], getattr(batch, name)) and (got[:, width:] == blank).all()
        start += rows
