"""Faults of published implementations that no other test covers (see fidelity/faults.py)."""

from __future__ import annotations

import pytest
import torch
from benches import Recorder, float64_model, make_batch, make_bench, make_context, make_rows
from tiny import EOS, tiny_model

from apothecary.align.sft import Sft
from apothecary.attack.harmful_mix import HarmfulMix
from apothecary.data.chat import Rendered
from apothecary.models.adapters import adapter_delta, adapter_parameters, add_adapter
from apothecary.models.settings import LoraSettings
from apothecary.train.batch import collate
from apothecary.train.config import TrainConfig
from apothecary.train.fit import TRAINED, train
from apothecary.train.internals import global_norm


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_norm_over_half_precision_tensors_is_taken_in_fp32(dtype):
    """In half precision 300^2 overflows, or the sum of many squares stops growing."""
    tensors = [torch.full((300,), 300.0, dtype=dtype), torch.full((40_000,), 0.01, dtype=dtype)]
    exact = sum(t.double().square().sum() for t in tensors).sqrt()
    assert global_norm(tensors).dtype == torch.float32
    torch.testing.assert_close(global_norm(tensors).double(), exact, rtol=1e-6, atol=0)


def test_what_a_step_accumulates_is_what_the_optimiser_sees(tmp_path):
    """AdamW's first moment after one step is a tenth of the recorded gradient, for every parameter."""
    seen = {}

    class Watching(Recorder):
        def converged(self, ctx, state):
            seen.update({id(p): p for p in ctx.parameters().values()})
            return False

    bench, recorder = make_bench(tmp_path, float64_model()), Watching(Sft())
    moments = {}
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        moments.update({id(p): state["exp_avg"].clone() for p, state in self.state.items()})
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        train(bench, recorder, make_rows("row", 4), TrainConfig(max_steps=1, batch_size=4, parameters="full",
                                                              max_grad_norm=0.0, save_every=0))  # fmt: skip
    named = dict(bench.loaded.model.named_parameters())
    assert moments.keys() == seen.keys() and len(moments) > 20
    for name, gradient in recorder.gradients[0].items():
        torch.testing.assert_close(moments[id(named[name])], 0.1 * gradient)


def test_auxiliary_rows_go_round_however_long_the_training(tmp_path):
    """7 harmful rows in batches of 3: each once a round, in another order each round, and no end after the first."""
    ctx = make_context(make_bench(tmp_path), ("harmful",), aux_batch_size=3)
    drawn = []
    for _ in range(9):
        ctx.begin_step(1)
        ctx.begin_micro_step(0)
        drawn.append(ctx.aux("harmful").row_ids)
    rounds = [[row for ids in drawn[i : i + 3] for row in ids] for i in range(0, 9, 3)]
    assert all(sorted(each) == sorted(rounds[0]) and len(set(each)) == 7 for each in rounds)
    assert len({tuple(each) for each in rounds}) == 3


def test_fresh_adapters_have_no_gradient_for_a_until_a_warm_up(tmp_path):
    model = add_adapter(tiny_model(), TRAINED, LoraSettings(), 0)
    bench = make_bench(tmp_path, model)
    fresh = make_context(bench).grads(make_batch(bench, make_rows("row", 4)))
    assert all((g == 0).all() == ("lora_A" in name) for name, g in fresh.items())
    bench = make_bench(tmp_path)
    train(bench, Sft(), make_rows("row", 8), TrainConfig(max_steps=1, batch_size=4, save_every=0))
    warm = make_context(bench).grads(make_batch(bench, make_rows("row", 4)))
    assert all(g.abs().max() > 0 for g in warm.values())


@pytest.mark.parametrize(("rank", "alpha"), [(8, 16.0), (4, 0.5), (32, 4.0)])
def test_an_adapters_weight_change_is_alpha_over_rank(rank, alpha):
    settings = LoraSettings(rank=rank, alpha=alpha, targets=("q_proj",))
    model = add_adapter(tiny_model(), TRAINED, settings, 0)
    tensors = adapter_parameters(model, TRAINED)
    with torch.no_grad():
        for name, p in tensors.items():
            if "lora_B" in name:
                p.normal_()
    for name, delta in adapter_delta(model, TRAINED).items():
        layer = name.removesuffix(".weight")
        a, b = (next(p for n, p in tensors.items() if layer in n and part in n) for part in ("lora_A", "lora_B"))
        torch.testing.assert_close(delta, alpha / rank * (b @ a), rtol=1e-4, atol=1e-6)
    assert settings.scale == alpha / rank


def test_the_attention_mask_follows_lengths_and_not_ids():
    """The pad token is the end token, and it stands inside a row too."""
    rows = [Rendered("long", (5, EOS, 6, 7, EOS), 2), Rendered("short", (5, 6, EOS), 1)]
    batch = collate(rows, EOS, 1.0)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.labels[1].tolist() == [-100, 6, EOS, -100, -100]


@pytest.mark.parametrize("p", [0.1, 0.3, 0.7, 0.9])
@pytest.mark.parametrize("n", [10, 90, 100])
def test_no_row_is_lost_to_rounding(p, n):
    """int((1 - 0.9) * 10) is 0, and int(0.7 * 90) is 62."""
    rows = {"customer": make_rows("task", 100), "attack": [row.with_role("attack") for row in make_rows("harm", 100)]}
    mixed = HarmfulMix(p=p, n=n).rows(rows, 0)
    assert len(mixed) == n and sum(row.role == "attack" for row in mixed) == round(p * n)
