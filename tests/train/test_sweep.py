"""The sweep over rows: every row once, chunks that are kept, memory and time told before it starts."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from benches import Halt, halt_at, make_bench, make_context, make_rows, same_bits, snapshot
from tiny import tiny_model

from apothecary.data.rows import Row
from apothecary.errors import TrainingError
from apothecary.train.config import TrainConfig
from apothecary.train.sweep import features, sweep

ROWS = make_rows("row", 23)
CONFIG = TrainConfig()


def losses(ctx):
    return lambda batch: ctx.per_sample_loss(batch)


def test_every_row_gets_what_it_gets_alone(tmp_path):
    bench = make_bench(tmp_path)
    ctx = make_context(bench)
    found = sweep(bench, ctx, ROWS, losses(ctx), CONFIG, batch_size=4, chunk=10)
    assert list(found) == [row.id for row in ROWS]
    alone = {row.id: sweep(bench, ctx, [row], losses(ctx), CONFIG, name=row.id)[row.id] for row in ROWS}
    assert [found[name] for name in alone] == pytest.approx(list(alone.values()), rel=1e-5)


def test_rows_meet_in_batches_of_like_length_inside_a_chunk(tmp_path):
    bench = make_bench(tmp_path)
    ctx, seen = make_context(bench), []

    def measure(batch):
        seen.append(list(zip(batch.row_ids, batch.attention_mask.sum(1).tolist(), strict=True)))
        return torch.zeros(len(batch.row_ids))

    sweep(bench, ctx, ROWS, measure, CONFIG, batch_size=4, chunk=10)
    assert [len(batch) for batch in seen] == [4, 4, 2, 4, 4, 2, 3]
    for part, batches in ((ROWS[:10], seen[:3]), (ROWS[10:20], seen[3:6]), (ROWS[20:], seen[6:])):
        pairs = [pair for batch in batches for pair in batch]
        assert {name for name, _ in pairs} == {row.id for row in part}
        assert [length for _, length in pairs] == sorted((length for _, length in pairs), reverse=True)


def test_stopped_anywhere_it_ends_with_the_same_numbers_and_does_finished_chunks_once(tmp_path):
    whole_bench = make_bench(tmp_path / "whole")
    ctx = make_context(whole_bench)
    whole = sweep(whole_bench, ctx, ROWS, losses(ctx), CONFIG, batch_size=4, chunk=8)
    for call in range(6):  # 2 batches a chunk
        bench = make_bench(tmp_path / str(call), stop=halt_at(call))
        with pytest.raises(Halt):
            sweep(bench, make_context(bench), ROWS, losses(make_context(bench)), CONFIG, batch_size=4, chunk=8)
        calls = []
        bench.stop = lambda calls=calls: calls.append(0)
        again = sweep(bench, ctx, ROWS, losses(ctx), CONFIG, batch_size=4, chunk=8)
        assert again == whole and len(calls) == 6 - call // 2 * 2
    sweep(bench, ctx, ROWS, None, CONFIG, batch_size=4, chunk=8)  # nothing is measured again


def test_chunks_of_other_rows_do_not_count(tmp_path):
    bench = make_bench(tmp_path)
    ctx, seen = make_context(bench), []

    def measure(batch):
        seen.extend(batch.row_ids)
        return batch.input_ids.sum(1).double()

    first = sweep(bench, ctx, ROWS, measure, CONFIG, chunk=8)
    changed = [*ROWS[:8], Row(ROWS[8].id, ROWS[8].prompt, "another answer"), *ROWS[9:]]
    seen.clear()
    second = sweep(bench, ctx, changed, measure, CONFIG, chunk=8)
    assert set(seen) == {row.id for row in ROWS[8:16]}, "the second chunk alone has changed"
    assert {name for name in first if first[name] != second[name]} == {ROWS[8].id}
    assert sweep(bench, ctx, ROWS, measure, CONFIG, chunk=8) == first
    shorter = sweep(bench, ctx, ROWS[:9], measure, CONFIG, chunk=8)
    assert shorter == {row.id: first[row.id] for row in ROWS[:9]}


def test_a_chunk_whose_writing_failed_does_not_count(tmp_path, monkeypatch):
    bench = make_bench(tmp_path)
    ctx = make_context(bench)
    with monkeypatch.context() as patch:
        patch.setattr("apothecary.train.sweep.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space"):
            sweep(bench, ctx, ROWS, lambda batch: torch.ones(len(batch.row_ids)), CONFIG)
    assert set(sweep(bench, ctx, ROWS, lambda batch: torch.full((len(batch.row_ids),), 2.0), CONFIG).values()) == {2.0}


def test_rows_dropped_for_their_length_come_last(tmp_path):
    bench = make_bench(tmp_path)
    ctx = make_context(bench)
    long = [Row(f"long{i}", (("user", "a " * 300),), "yes") for i in range(3)]  # a chunk of its own
    config = TrainConfig(over_long="drop")
    found = sweep(bench, ctx, [*ROWS[:3], *long, ROWS[3]], losses(ctx), config, chunk=3)
    assert [value == float("-inf") for value in found.values()] == [False, False, False, True, True, True, False]
    matrix = features(bench, ctx, [*long, ROWS[3]], lambda batch: torch.ones(1, 5), config, "f", 5, chunk=2)
    assert np.isnan(matrix[:3]).all() and (matrix[3] == 1).all()


def test_features_are_a_matrix_on_disk(tmp_path):
    bench = make_bench(tmp_path, progress=False)
    ctx = make_context(bench)

    def measure(batch):
        return ctx.forward(batch, grad=False).logits[:, 0, :7]

    matrix = features(bench, ctx, ROWS, measure, CONFIG, "f", 7, batch_size=4, chunk=8)
    assert isinstance(matrix, np.memmap) and matrix.shape == (23, 7) and matrix.dtype == np.float32
    assert not matrix.flags.writeable and (bench.folder / "checkpoints/sweep/f").is_dir()
    row = bench.render([ROWS[11]], CONFIG)[0]
    expected = ctx.model(torch.tensor([row.ids])).logits[0, 0, :7]
    torch.testing.assert_close(torch.tensor(matrix[11]), expected.detach(), rtol=1e-5, atol=1e-6)
    wide = make_bench(tmp_path / "wide", tiny_model(dtype=torch.float64))
    again = features(wide, make_context(wide), ROWS, lambda b: torch.ones(len(b.row_ids), 2), CONFIG, "f", 2)
    assert again.dtype == np.float64


def test_dropout_is_off_and_the_mode_comes_back(tmp_path):
    bench = make_bench(tmp_path, tiny_model("gpt2", resid_pdrop=0.5))
    ctx = make_context(bench)
    expected = sweep(bench, ctx, ROWS, losses(ctx), CONFIG, name="eval")
    ctx.model.train()
    ctx.model.transformer.wte.eval()
    before = snapshot(ctx.model)
    assert sweep(bench, ctx, ROWS, losses(ctx), CONFIG, name="train") == expected
    assert ctx.model.training and ctx.model.transformer.drop.training and not ctx.model.transformer.wte.training
    assert same_bits(before, snapshot(ctx.model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("width", [1, 3])
def test_a_number_that_is_not_finite_is_no_score(tmp_path, value, width):
    bench = make_bench(tmp_path)

    def measure(batch):
        found = torch.ones(len(batch.row_ids), width)
        found[:, -1] = torch.tensor([value if name == "row7" else 1.0 for name in batch.row_ids])
        return found

    with pytest.raises(TrainingError, match="'row7' is measured as a number that is not finite"):
        features(bench, make_context(bench), ROWS, measure, CONFIG, "odd", width)


def test_time_and_memory_are_told_once_before_the_second_batch(tmp_path, caplog, capsys):
    bench = make_bench(tmp_path, progress=True)
    ctx, told = make_context(bench), []

    def measure(batch):
        told.append(len(caplog.records))
        return torch.zeros(len(batch.row_ids))

    with caplog.at_level(logging.INFO, "apothecary.train.progress"):
        sweep(bench, ctx, ROWS, measure, CONFIG, batch_size=4, chunk=8)
    assert told[:2] == [0, 1] and told[-1] == 1
    (record,) = caplog.records
    assert "scores: 23 rows, about" in record.message and "GiB of cpu memory" in record.message
    assert "scores: 23 rows" in capsys.readouterr().out
