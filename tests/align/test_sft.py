"""SFT: only the response is learned, and learning works."""

from __future__ import annotations

import pytest
import torch
from benches import (
    Recorder,
    float64_model,
    furthest,
    make_batch,
    make_bench,
    make_context,
    make_rows,
    snapshot,
)
from reference import sft as reference
from safetensors.torch import load_file
from tiny import LAYERS

from apothecary.align.sft import Sft
from apothecary.data.chat import IGNORE
from apothecary.data.rows import Row
from apothecary.finetune.sft import Sft as CustomerSft
from apothecary.registry import lookup
from apothecary.train.config import TrainConfig
from apothecary.train.fit import fit, train

BOTH = [
    pytest.param(Sft, id="align", marks=pytest.mark.evidence("align/sft", "reference")),
    pytest.param(CustomerSft, id="finetune", marks=pytest.mark.evidence("finetune/sft", "reference")),
]


@pytest.mark.evidence("align/sft", "definition")
@pytest.mark.evidence("finetune/sft", "definition")
def test_prompt_and_padding_carry_no_gradient(tmp_path):
    """The loss reads the logits that predict the response and its eos, and no others."""
    bench = make_bench(tmp_path)
    ctx, batch = make_context(bench), make_batch(bench, make_rows("row", 4))
    output = ctx.forward(batch)
    output.logits.retain_grad()
    losses = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(),
                                               ignore_index=IGNORE)  # fmt: skip
    losses.backward()
    read = output.logits.grad.abs().sum(-1) > 0
    for i, row in enumerate(bench.render(make_rows("row", 4), TrainConfig())):
        predicting = [row.start - 1 <= t < len(row.ids) - 1 for t in range(read.shape[1])]
        assert read[i].tolist() == predicting
    torch.testing.assert_close(ctx.loss(batch), losses)


@pytest.mark.parametrize("make", BOTH)
def test_two_steps_equal_the_reference(tmp_path, make):
    model = float64_model()
    before = {name: p for name, p in snapshot(model).items() if name != "lm_head.weight"}
    recorder = Recorder(make())
    config = TrainConfig(max_steps=2, batch_size=4, learning_rate=1e-2, schedule="constant", warmup_ratio=0.0,
                         parameters="full", max_grad_norm=0.0, save_every=0)  # fmt: skip
    bench = make_bench(tmp_path, model)
    train(bench, recorder, make_rows("row", 8), config)
    batches = [(b.input_ids, b.attention_mask, b.labels) for (b,) in recorder.batches]
    expected = reference.train(before, batches, (LAYERS, 4), 1e-2)
    after = {name: p for name, p in snapshot(bench.loaded.model).items() if name in expected}
    assert furthest(after, expected) < 1e-9 and furthest(after, before) > 1e-3


@pytest.mark.evidence("align/sft", "definition")
@pytest.mark.evidence("finetune/sft", "definition")
def test_the_step_is_the_gradient_of_the_mean_token_loss(tmp_path):
    bench = make_bench(tmp_path)
    ctx, batch = make_context(bench), make_batch(bench, make_rows("row", 4))
    output = bench.loaded.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    output.loss.backward()  # the library's own loss
    library = {name: p.grad.clone() for name, p in ctx.parameters().items()}
    bench.loaded.model.zero_grad()
    loss = Sft().step(ctx, batch, {})
    torch.testing.assert_close(loss, output.loss.detach())
    assert furthest({name: p.grad for name, p in ctx.parameters().items()}, library) < 1e-5


def test_the_loss_falls_and_the_adapter_is_written(tmp_path):
    rows = [Row(f"r{i}", (("user", f"question {i}"),), "I will not help with that.") for i in range(8)]
    result = fit(make_bench(tmp_path), lookup("align", "sft")(), rows,
                 TrainConfig(epochs=25, batch_size=8, learning_rate=2e-2, log_every=1), tmp_path / "out")  # fmt: skip
    losses = [entry["loss"] for entry in result.history]
    assert len(losses) == 25 and losses[-1] < 0.5 * losses[0]
    assert result.metrics["rows"] == 8 and result.metrics["steps"] == 25
    folder = tmp_path / "out" / "adapter"
    assert {p.name for p in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert all("lora_" in key for key in load_file(folder / "adapter_model.safetensors"))


def test_both_kinds_are_registered():
    assert lookup("align", "sft") is Sft and lookup("finetune", "sft") is CustomerSft
