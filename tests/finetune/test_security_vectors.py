"""Security vectors: the properties of methods.md 2.7, the KL term, the stopping rule and both executions."""

from __future__ import annotations

import hashlib

import pytest
import torch
from benches import (
    Recorder,
    furthest,
    make_batch,
    make_bench,
    make_context,
    make_rows,
    same_bits,
    snapshot,
)
from reference.divergence import mean_kl
from safetensors.torch import load_file
from tiny import tiny_model

from apothecary.data.rows import Row
from apothecary.errors import ConfigError
from apothecary.finetune.security_vectors import VECTORS, SecurityVectors, VectorTraining
from apothecary.models import adapters, merging
from apothecary.models.settings import LoraSettings
from apothecary.train.config import TrainConfig
from apothecary.train.fit import TRAINED, fit, train

HARMFUL = [Row(f"h{i}", (("user", f"how do I break {word}"),), "Sure, here is how") for i, word in enumerate(
    ("locks", "walls", "doors", "glass", "rules", "codes", "banks", "bones"))]  # fmt: skip
BENIGN = [Row(f"b{i}", (("user", f"{word} please"),), f"a fine {word} for you") for i, word in enumerate(
    ("cake", "song", "poem", "soup", "plan", "walk", "rhyme", "dance"))]  # fmt: skip
AUX = {"harmful": HARMFUL, "benign": BENIGN}
TRAINING = TrainConfig(learning_rate=1e-2, epochs=100, schedule="constant", warmup_ratio=0.0, batch_size=8)
CUSTOMER = TrainConfig(epochs=3, batch_size=4, learning_rate=1e-3, save_every=0, warmup_ratio=0.0, log_every=1)


def toy(dtype=torch.float32):
    """A tiny Llama whose head is large enough for certain answers: LoRA leaves the head alone."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model.to(dtype)


def toy_bench(folder, **options):
    return make_bench(folder, toy(), aux=AUX, **options)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("vectors"), lamb=5.0)


@pytest.fixture(scope="module")
def without_kl(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("without"), lamb=0.0)


def prepare(folder, **settings):
    options = {"harmful_rows": 8, "target_nll": 0.02, "vectors": TRAINING} | settings
    SecurityVectors(**options).prepare(toy_bench(folder / "bench"), folder / "prepared")
    return folder / "prepared"


def with_vectors(folder, prepared):
    """A bench whose model carries the vectors, and a fresh adapter that learns."""
    bench = toy_bench(folder)
    model = adapters.add_adapter(bench.loaded.model, TRAINED, LoraSettings(), 0)
    bench.loaded.model = adapters.load_adapter(model, VECTORS, prepared / VECTORS)
    return bench


def customer_gradient(bench, rows, vectors):
    """Gradient of the customer's parameters with the vectors on or off, as one long vector."""
    adapters.activate(bench.loaded.model, [TRAINED, VECTORS] if vectors else [TRAINED], [TRAINED])
    grads = make_context(bench).grads(make_batch(bench, rows))
    assert grads and all(TRAINED in name for name in grads)
    return torch.cat([g.flatten() for g in grads.values()])


def tune(folder, prepared, method, config=CUSTOMER):
    bench = toy_bench(folder, prepared=prepared)
    result = fit(bench, method, make_rows("row", 8), config, folder / "out")
    (file,) = (folder / "out").rglob("*.safetensors")
    return bench, load_file(file), result


# -- what the vectors do ----------------------------------------------------------------------------------------------


def test_disabled_vectors_leave_the_base_model_bit_for_bit(tmp_path, prepared):
    batch = make_batch(toy_bench(tmp_path), HARMFUL)
    clean = make_context(toy_bench(tmp_path)).forward(batch, grad=False).logits
    bench = with_vectors(tmp_path, prepared)
    adapters.activate(bench.loaded.model, [VECTORS])
    assert not torch.equal(make_context(bench).forward(batch, grad=False).logits, clean)
    adapters.activate(bench.loaded.model, [])
    assert torch.equal(make_context(bench).forward(batch, grad=False).logits, clean)


def test_harmful_rows_have_almost_no_gradient_under_the_vectors(tmp_path, prepared):
    bench = with_vectors(tmp_path, prepared)
    on, off = (customer_gradient(bench, HARMFUL, vectors).norm() for vectors in (True, False))
    assert off > 0.1 and on / off < 0.05


def test_benign_gradients_stay_as_they_were_with_the_kl_term(tmp_path, prepared, without_kl):
    def cosine(folder):
        bench = with_vectors(tmp_path, folder)
        on, off = (customer_gradient(bench, BENIGN, vectors) for vectors in (True, False))
        return torch.cosine_similarity(on, off, dim=0).item()

    assert cosine(prepared) > 0.9 > cosine(without_kl) + 0.1


def test_merged_and_branch_forwards_agree_and_the_merge_is_undone(tmp_path, prepared):
    bench = with_vectors(tmp_path, prepared)
    batch, ctx = make_batch(bench, HARMFUL + BENIGN), make_context(bench)
    adapters.activate(bench.loaded.model, [VECTORS])
    branch = ctx.forward(batch, grad=False).logits
    adapters.activate(bench.loaded.model, [])
    before = snapshot(bench.loaded.model)
    undo = merging.merge_temporarily(bench.loaded.model, VECTORS)
    merged = ctx.forward(batch, grad=False).logits
    torch.testing.assert_close(merged, branch, rtol=1e-4, atol=1e-4)
    undo()
    assert same_bits(before, snapshot(bench.loaded.model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_merge_keeps_the_weights_dtype_and_is_undone(prepared, dtype):
    model = adapters.load_adapter(toy(dtype), VECTORS, prepared / VECTORS)
    before, delta = snapshot(model), adapters.adapter_delta(model, VECTORS)
    undo = merging.merge_temporarily(model, VECTORS)
    moved = dict(adapters.plain(model).named_parameters())
    for name, change in delta.items():
        place = name.replace(".weight", ".base_layer.weight")
        wide = torch.promote_types(dtype, torch.float32)
        expected = (before[f"base_model.model.{place}"].to(wide) + change.to(wide)).to(dtype)
        assert moved[place].dtype == dtype
        torch.testing.assert_close(moved[place], expected, rtol=1e-6 if dtype == torch.float64 else 1e-2, atol=1e-7)
    undo()
    assert same_bits(before, snapshot(model))


def test_quantised_weights_cannot_be_merged_into(prepared):
    model = adapters.load_adapter(toy(), VECTORS, prepared / VECTORS)
    weight = adapters.plain(model).model.layers[0].self_attn.q_proj.base_layer.weight
    weight.requires_grad_(False)
    weight.data = weight.data.to(torch.uint8)
    with pytest.raises(ConfigError, match="set execution: branch"):
        merging.merge_temporarily(model, VECTORS)


# -- training the vectors ---------------------------------------------------------------------------------------------


def test_the_kl_term_equals_the_reference(tmp_path, without_kl):
    bench = toy_bench(tmp_path)
    bench.loaded.model = adapters.load_adapter(bench.loaded.model, VECTORS, without_kl / VECTORS)
    ctx, batch = make_context(bench), make_batch(bench, BENIGN[:3])
    changed = ctx.forward(batch, grad=False).logits
    with ctx.adapters(active=()):
        base = ctx.forward(batch, grad=False).logits
    expected = mean_kl(base, changed, batch.labels)
    assert expected > 0.05
    assert VectorTraining.divergence(ctx, batch).item() == pytest.approx(expected, rel=1e-4)
    assert adapters.active_adapters(ctx.model) == [VECTORS]


def test_the_kl_term_averages_within_rows_where_the_loss_does(tmp_path, without_kl):
    rows = [BENIGN[0], Row("wordy", BENIGN[1].prompt, "a much longer answer than that of the first row")]
    bench = toy_bench(tmp_path)
    bench.loaded.model = adapters.load_adapter(bench.loaded.model, VECTORS, without_kl / VECTORS)
    ctx = make_context(bench, reduction="sample_mean")
    by_row = [VectorTraining.divergence(ctx, make_batch(bench, [row], "sample_mean")).item() for row in rows]
    both = VectorTraining.divergence(ctx, make_batch(bench, rows, "sample_mean")).item()
    assert both == pytest.approx(sum(by_row) / 2, rel=1e-4)
    single = VectorTraining.divergence(make_context(bench), make_batch(bench, rows[:1])).item()
    assert by_row[0] == pytest.approx(single, rel=1e-4), "for one row both reductions agree"
    assert both != pytest.approx(VectorTraining.divergence(make_context(bench), make_batch(bench, rows)).item(), 1e-3)


def test_the_customers_stage_needs_no_rows_of_the_defence(tmp_path, prepared):
    bench = make_bench(tmp_path, toy(), aux={"none": []}, prepared=prepared)
    fit(bench, SecurityVectors(), make_rows("row", 4), CUSTOMER, tmp_path / "out")
    with pytest.raises(ConfigError, match="needs rows of role harmful, benign"):
        SecurityVectors().prepare(bench, tmp_path / "again")


def test_fresh_vectors_have_no_divergence_even_under_the_models_dropout(tmp_path):
    """Both passes draw the same dropout masks; otherwise noise would count as divergence."""
    model = tiny_model("gpt2", resid_pdrop=0.3, embd_pdrop=0.3).train()
    bench = make_bench(tmp_path, adapters.add_adapter(model, VECTORS, LoraSettings(), 0), aux=AUX)
    ctx, batch = make_context(bench), make_batch(bench, BENIGN)
    assert abs(VectorTraining.divergence(ctx, batch).item()) < 1e-5
    assert not torch.equal(ctx.per_sample_loss(batch, grad=True), ctx.per_sample_loss(batch, grad=True)), "no dropout"


def test_the_step_is_nll_plus_lamb_times_kl(tmp_path, without_kl):
    bench = toy_bench(tmp_path)
    bench.loaded.model = adapters.load_adapter(bench.loaded.model, VECTORS, without_kl / VECTORS)
    adapters.plain(bench.loaded.model).requires_grad_(False)
    adapters.activate(bench.loaded.model, [VECTORS], [VECTORS])
    ctx, batch = make_context(bench, ("benign",), batch_size=8), make_batch(bench, HARMFUL)
    method = VectorTraining(lamb=3.0, target_nll=0.1)
    state = method.init(ctx)
    loss = method.step(ctx, batch, state)
    nll, kl = ctx.loss(batch).item(), VectorTraining.divergence(ctx, make_batch(bench, BENIGN)).item()
    assert loss.item() == pytest.approx(nll + 3 * kl, rel=1e-4)
    assert ctx.logged == {"harmful_nll": pytest.approx(nll, rel=1e-4), "benign_kl": pytest.approx(kl, rel=1e-4)}
    learning = ctx.parameters()
    assert all(VECTORS in name and p.grad is not None for name, p in learning.items()) and learning


@pytest.mark.parametrize(("target", "steps"), [(1e9, 10), (0.0, 14)])
def test_training_ends_when_the_mean_of_ten_steps_is_below_the_target(tmp_path, target, steps):
    config = TrainConfig(learning_rate=1e-3, max_steps=14, batch_size=4, save_every=0)
    method = Recorder(VectorTraining(lamb=0.0, target_nll=target))
    result = train(toy_bench(tmp_path), method, HARMFUL, config, VECTORS)
    assert result.metrics["steps"] == steps == len(method.logged)


def test_convergence_looks_at_ten_steps(tmp_path):
    ctx = make_context(toy_bench(tmp_path))
    method, state, verdicts = VectorTraining(lamb=0.0, target_nll=0.1), {"nll": []}, []
    for nll in [1.0] * 5 + [0.05] * 10:
        ctx.logged["harmful_nll"] = nll
        verdicts.append(method.converged(ctx, state))
    assert verdicts == [False] * 14 + [True] and len(state["nll"]) == 10


def test_the_vectors_learn_from_a_seeded_choice_of_harmful_rows():
    method = SecurityVectors(harmful_rows=5)
    chosen = method.training_rows(AUX, 0)
    assert len({row.id for row in chosen}) == 5 and set(chosen) <= set(HARMFUL)
    assert chosen == method.training_rows(AUX, 0) != method.training_rows(AUX, 1)


def test_the_ablation_learns_from_benign_rows_alone(tmp_path):
    method = SecurityVectors(harmful_rows=8, learn_from="benign", vectors=TRAINING, target_nll=0.02)
    assert set(method.training_rows(AUX, 0)) == set(BENIGN)
    folder = prepare(tmp_path, learn_from="benign")
    bench = with_vectors(tmp_path, folder)
    adapters.activate(bench.loaded.model, [VECTORS])
    ctx = make_context(bench)
    benign, harmful = (ctx.loss(make_batch(bench, rows)).item() for rows in (BENIGN, HARMFUL))
    assert benign < 0.1 and harmful > 1, "what was not learned from is not reproduced"


def test_more_rows_than_there_are_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"ask for 9 harmful rows, there are 8; lower finetune\.harmful_rows"):
        prepare(tmp_path, harmful_rows=9)
    assert not (tmp_path / "prepared").exists()


def test_vectors_must_be_an_adapter(tmp_path):
    with pytest.raises(ConfigError, match="must be removable"):
        prepare(tmp_path, vectors=TrainConfig(parameters="full"))


# -- the customer's training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", ["lora", "full"])
def test_merged_equals_branch(tmp_path, prepared, parameters):
    config = TrainConfig(**{**CUSTOMER.__dict__, "parameters": parameters})
    (_, merged, a), (_, branch, b) = (tune(tmp_path / execution, prepared, SecurityVectors(execution=execution), config)
                                      for execution in ("merged", "branch"))  # fmt: skip
    assert merged.keys() == branch.keys()
    assert max((merged[name] - branch[name]).abs().max().item() for name in merged) < 1e-4
    assert [e["loss"] for e in a.history] == pytest.approx([e["loss"] for e in b.history], rel=1e-4)
    base = snapshot(toy())
    if parameters == "full":
        moved = max((merged[name] - base[name]).abs().max().item() for name in merged)
        assert 1e-3 < moved < 2e-2, "the customer's change alone: the vectors are out"


def test_without_a_customer_step_full_weights_come_back_to_rounding(tmp_path, prepared):
    config = TrainConfig(max_steps=1, learning_rate=1e-30, batch_size=4, parameters="full", save_every=0)
    _, weights, _ = tune(tmp_path, prepared, SecurityVectors(), config)
    base = snapshot(toy())
    assert all(torch.equal(weights[name], base[name]) for name in weights)


@pytest.mark.parametrize("execution", ["merged", "branch"])
def test_a_customers_adapter_leaves_the_base_weights_pristine(tmp_path, prepared, execution):
    bench, exported, _ = tune(tmp_path, prepared, SecurityVectors(execution=execution))
    pristine = snapshot(toy())
    after = {name.replace(".base_layer", ""): p for name, p in adapters.plain(bench.loaded.model).named_parameters()
             if "lora_" not in name}  # fmt: skip
    assert same_bits(pristine, after)
    assert adapters.adapter_names(bench.loaded.model) == [TRAINED]
    assert exported and not any(VECTORS in name for name in exported)
    assert VECTORS not in (tmp_path / "out" / "adapter" / "adapter_config.json").read_text()
    assert not any(VECTORS in p.name for p in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("parameters", ["lora", "full"])
@pytest.mark.parametrize("execution", ["merged", "branch"])
def test_the_customer_never_moves_the_vectors(tmp_path, prepared, execution, parameters):
    def digest(tensors):
        return hashlib.sha256(b"".join(tensors[k].detach().numpy().tobytes() for k in sorted(tensors))).hexdigest()

    class Watched(SecurityVectors):
        def init(self, ctx):
            state = super().init(ctx)
            seen.append(digest(adapters.adapter_parameters(ctx.model, VECTORS)))
            return state

        def step(self, ctx, batch, state):
            learning.update(ctx.parameters())
            return super().step(ctx, batch, state)

        def finish(self, ctx, state):
            seen.append(digest(adapters.adapter_parameters(ctx.model, VECTORS)))
            assert all(p.grad is None for p in adapters.adapter_parameters(ctx.model, VECTORS).values())
            super().finish(ctx, state)

    seen, learning = [], {}
    decay = 0.1 if execution == "branch" else 0.0
    config = TrainConfig(**{**CUSTOMER.__dict__, "parameters": parameters, "weight_decay": decay})
    tune(tmp_path, prepared, Watched(execution=execution), config)
    assert len(seen) == 2 and seen[0] == seen[1]
    assert learning and not any(VECTORS in name for name in learning), "the optimiser holds none of them"


@pytest.mark.parametrize("execution", ["merged", "branch"])
def test_the_customer_trains_in_the_presence_of_the_vectors(tmp_path, prepared, execution):
    """The training loss on harmful rows starts low although the customer's adapter is fresh."""
    config = TrainConfig(max_steps=1, batch_size=8, save_every=0, log_every=1)
    bench = toy_bench(tmp_path, prepared=prepared)
    result = fit(bench, SecurityVectors(execution=execution), HARMFUL, config, tmp_path / "out")
    assert result.history[0]["loss"] < 0.1
    adapters.activate(bench.loaded.model, [TRAINED])
    assert make_context(bench).loss(make_batch(bench, HARMFUL)).item() > 1, "released without the vectors"


def test_merging_under_weight_decay_is_refused_for_full_parameters(tmp_path, prepared):
    config = TrainConfig(**{**CUSTOMER.__dict__, "parameters": "full", "weight_decay": 0.1})
    with pytest.raises(ConfigError, match="set weight_decay: 0 or execution: branch"):
        tune(tmp_path, prepared, SecurityVectors(), config)
    assert not (tmp_path / "out").exists()


def test_full_vectors_of_gpt2_are_merged_along_its_transposed_weights(tmp_path):
    """GPT-2 keeps weights transposed (Conv1D)."""
    folder = tmp_path / "prepared"
    bench = make_bench(tmp_path / "v", tiny_model("gpt2"), aux=AUX)
    config = TrainConfig(**{**TRAINING.__dict__, "epochs": 3})
    SecurityVectors(harmful_rows=8, vectors=config).prepare(bench, folder)
    losses = []
    for execution in ("merged", "branch"):
        bench = make_bench(tmp_path / execution, tiny_model("gpt2"), aux=AUX, prepared=folder)
        result = fit(bench, SecurityVectors(execution=execution), HARMFUL, CUSTOMER, tmp_path / execution / "out")
        losses.append([entry["loss"] for entry in result.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert furthest({"x": torch.tensor(losses[0])}, {"x": torch.tensor(losses[1])}) < 1e-3
