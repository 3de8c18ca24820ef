"""LESS and its SGD relative: the formula against own Adam and one backward per row, subtasks, resume, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benches import float64_model, make_bench, make_rows
from reference import influence as reference
from tiny import LAYERS, PAD, tiny_model

from apothecary.curate.keep import keep
from apothecary.curate.less import Less
from apothecary.curate.less_sgd import LessSgd
from apothecary.data.rows import Row
from apothecary.errors import ConfigError
from apothecary.models.settings import LoraSettings
from apothecary.train import fit, per_row
from apothecary.train.batch import collate
from apothecary.train.config import TrainConfig
from apothecary.train.early import subtasks

SHAPE = (LAYERS, 4)
LORA = LoraSettings(rank=3, alpha=6, targets=("c_attn", "c_fc", "c_proj"))
# All rows in each step, so that the training is Adam on one loss; the rate falls from 3e-2 to 2e-2 to 1e-2.
WARM = TrainConfig(learning_rate=3e-2, epochs=3, batch_size=64, schedule="linear", warmup_ratio=0.0, max_grad_norm=0.0,
                   save_every=0, lora=LORA)  # fmt: skip
RATES = [3e-2, 2e-2, 1e-2]
POOL = make_rows("pool", 6)
QUICK = replace(WARM, lora=LoraSettings(rank=2, dropout=0.1), batch_size=4, epochs=2)


def validation(tag="validation"):
    """Three rows of one subtask and two of another."""
    return [replace(row, source="ab"[i > 2]) for i, row in enumerate(make_rows(tag, 5))]


def tensors(bench, rows):
    batch = collate(bench.render(rows, WARM), PAD, 1.0)
    return batch.input_ids, batch.attention_mask, batch.labels


def in_float64(patch):
    """Adapters are made in fp32: widen them before training starts."""
    attach = fit.attach
    patch.setattr(fit, "attach", lambda *args: attach(*args).double())


def scene(folder, patch):
    """A float64 bench, its GPT-2 weights, the adapter that it will draw, and the model as a function of one."""
    in_float64(patch)
    bench = make_bench(folder, float64_model(), aux={"validation": validation()})
    base = {name: p.detach().clone() for name, p in bench.loaded.model.named_parameters() if name != "lm_head.weight"}
    drawn = fit.attach(make_bench(folder, float64_model()), WARM, "selector", None)
    lora = {}
    for name, p in drawn.named_parameters():
        if p.requires_grad:
            where, kind = name.removeprefix("base_model.model.").split(".lora_")
            lora[f"{where}.{kind[0]}"] = p.detach().clone()
    return bench, base, lora


def checkpoints(bench, weights, model):
    """Weights and moments after each epoch, by the reference's own Adam."""
    pool = tensors(bench, POOL)
    return list(reference.adam(weights, lambda w: reference.token_mean(model(w), pool, SHAPE), RATES, WARM.betas))


@pytest.mark.evidence("curate/less", "reference", "definition")
def test_less_equals_the_reference(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        bench, base, lora = scene(tmp_path, patch)

        def model(weights):
            return reference.with_lora(base, weights, LORA.scale)

        points = checkpoints(bench, lora, model)
        found = Less(share=1.0, projection_dim=0, batch_size=4, warmup=WARM).score(bench, POOL)
        groups = [tensors(bench, validation()[:3]), tensors(bench, validation()[3:])]
        expected = reference.less(points, RATES, tensors(bench, POOL), groups, model, SHAPE, WARM.betas)
        assert list(found) == [row.id for row in POOL]
        torch.testing.assert_close(torch.tensor(list(found.values()), dtype=torch.float64), expected,
                                   rtol=1e-9, atol=1e-12)  # fmt: skip
        plain = reference.less(points, RATES, tensors(bench, POOL), groups, model, SHAPE, WARM.betas, False)
        assert torch.corrcoef(torch.stack([plain, expected]))[0, 1] < 0.999, "Adam's directions matter"


@pytest.mark.evidence("curate/less_sgd", "reference", "definition")
@pytest.mark.parametrize("parameters", ["lora", "full"])
def test_less_sgd_equals_the_reference(tmp_path, parameters):
    with pytest.MonkeyPatch.context() as patch:
        bench, base, lora = scene(tmp_path, patch)
        weights = lora if parameters == "lora" else base

        def model(weights):
            return reference.with_lora(base, weights, LORA.scale) if parameters == "lora" else weights

        points = checkpoints(bench, weights, model)
        warm = replace(WARM, parameters=parameters)
        found = LessSgd(share=1.0, warmup=warm, gradient="exact").score(bench, POOL)
        groups = [tensors(bench, validation()[:3]), tensors(bench, validation()[3:])]
        expected = reference.less(points, RATES, tensors(bench, POOL), groups, model, SHAPE, WARM.betas, False)
        torch.testing.assert_close(torch.tensor(list(found.values()), dtype=torch.float64), expected,
                                   rtol=1e-9, atol=1e-12)  # fmt: skip


@pytest.mark.parametrize("row_loss", ["mean", "sum"])
def test_central_differences_rank_as_exact_products(tmp_path, row_loss):
    pool = make_rows("pool", 16)
    found = []
    for gradient in ("central", "exact"):
        bench = make_bench(tmp_path / gradient, aux={"validation": validation()})
        found.append(LessSgd(share=0.5, warmup=QUICK, gradient=gradient, row_loss=row_loss).score(bench, pool))
    central, exact = (torch.tensor(list(scores.values())) for scores in found)
    assert torch.corrcoef(torch.stack([central, exact]))[0, 1] > 0.999


def test_the_sum_counts_every_token(tmp_path):
    """With one checkpoint and one subtask, the sum's score is the mean's times the answer's tokens."""
    warm, aux = replace(QUICK, epochs=1, batch_size=64), {"validation": make_rows("validation", 3)}
    mean, total = (LessSgd(share=1.0, warmup=warm, gradient="exact", row_loss=kind).score(
        make_bench(tmp_path / kind, aux=aux), POOL) for kind in ("mean", "sum"))  # fmt: skip
    tokens = {row.row_id: row.supervised for row in make_bench(tmp_path).render(POOL, WARM)}
    assert total == pytest.approx({name: score * tokens[name] for name, score in mean.items()}, rel=1e-4)


def test_the_projection_keeps_the_order(tmp_path):
    """Scores are sums of inner products of unit vectors: each is off by about 1/sqrt(8192)."""
    found = []
    for size in (0, 8192):
        bench = make_bench(tmp_path / str(size), aux={"validation": validation()})
        found.append(Less(share=0.5, projection_dim=size, warmup=QUICK).score(bench, make_rows("pool", 12)))
    exact, projected = (torch.tensor(list(scores.values())) for scores in found)
    assert 0 < (exact - projected).abs().max() < 4 / 8192**0.5


def test_scores_lie_in_the_unit_interval_and_follow_the_target(tmp_path):
    """A row that is a validation row's twin scores above rows about something else, in the best subtask alone."""
    target = [Row("v", (("user", "sing to me"),), "la la la", source="song"),
              Row("w", (("user", "count"),), "1 2 3 4", source="count")]  # fmt: skip
    pool = [replace(target[0], id="song"), replace(target[1], id="count"), *make_rows("why", 6)]
    bench = make_bench(tmp_path, aux={"validation": target})
    scores = LessSgd(share=1.0, warmup=QUICK).score(bench, pool)
    assert {"song", "count"} == set(sorted(scores, key=scores.__getitem__)[-2:])
    scores = Less(share=1.0, projection_dim=0, warmup=QUICK).score(make_bench(tmp_path / "adam", aux=bench.aux), pool)
    assert max(map(abs, scores.values())) <= 1


@pytest.mark.parametrize("size", [0, 64])
def test_the_scale_of_a_validation_rows_loss_does_not_matter(tmp_path, monkeypatch, size):
    """methods.md 7.1: c > 0 times a loss leaves its direction of unit length as it is."""
    plain = per_row.row_gradients

    def unlike(ctx, batch):
        """Gradients as if each row's loss were multiplied with a number of its own."""
        c_B = torch.tensor([1.0 + 7 * (ord(name[-1]) % 5) for name in batch.row_ids])
        for name, grads in plain(ctx, batch):
            yield name, grads * c_B.view(-1, *[1] * (grads.dim() - 1)) if "val" in batch.row_ids[0] else grads

    found = []
    for change in (plain, unlike):
        monkeypatch.setattr(per_row, "row_gradients", change)
        bench = make_bench(tmp_path / change.__name__, aux={"validation": validation()})
        found.append(Less(share=1.0, projection_dim=size, warmup=QUICK).score(bench, POOL))
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-7) and len(set(found[0].values())) == len(POOL)


def test_a_subtask_may_be_named_in_meta():
    rows = [Row(str(i), (("user", "x"),), "y", source="s", meta={"subtask": i % 3} if i else {}) for i in range(7)]
    assert subtasks(rows) == [[0], [1, 4], [2, 5], [3, 6]]


@pytest.mark.parametrize("method", [Less, LessSgd])
def test_the_warm_up_sees_its_share_alone_and_dropped_rows_come_last(tmp_path, method):
    long = Row("long", (("user", "a " * 300),), "yes")
    pool = [*make_rows("pool", 7), long]
    warm = replace(QUICK, over_long="drop")
    bench = make_bench(tmp_path, aux={"validation": validation()})
    scores = method(share=1.0, warmup=warm).score(bench, pool)
    assert scores["long"] == float("-inf") and all(abs(scores[row.id]) < 1e6 for row in pool[:7])
    assert "long" not in {row.id for row in keep(scores, pool, 0.8, 0)}
    few = make_bench(tmp_path / "few", aux={"validation": [*validation(), long]})
    with pytest.raises(Exception, match="row 'long' has"):
        method(share=0.3, warmup=warm).score(few, pool[:7])


@pytest.mark.parametrize(("method", "fields", "message"), [
    (Less, {"share": 0.0}, "share in \\(0, 1\\]"), (Less, {"projection_dim": -1}, "projection_dim"),
    (Less, {"batch_size": 0}, "batch_size"), (Less, {"warmup": replace(WARM, epochs=1.5)}, "whole epochs"),
    (Less, {"warmup": replace(WARM, max_steps=5)}, "whole epochs"),
    (Less, {"warmup": replace(WARM, parameters="full")}, "lora"),
    (LessSgd, {"share": 1.1}, "share in"), (LessSgd, {"warmup": replace(WARM, epochs=0.5)}, "whole epochs"),
])  # fmt: skip
def test_settings_outside_their_ranges_are_refused(method, fields, message):
    with pytest.raises(ConfigError, match=message):
        method(**fields)


@pytest.mark.parametrize("method", [Less(), LessSgd()])
def test_validation_rows_are_needed(tmp_path, method):
    with pytest.raises(ConfigError, match="needs rows of role validation"):
        method.score(make_bench(tmp_path, tiny_model(), aux={"harmful": POOL}), POOL)
