"""Security vectors: what they do, what they learn from, and the customer's training (methods.md 2.7)."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from benches import make_batch, make_bench, make_context, make_rows, same_bits, snapshot
from tiny import tiny_model
from vector_scenes import AUX, BENIGN, CUSTOMER, HARMFUL, TRAINING, prepare, toy, toy_bench, tune, with_vectors

from apothecary.config import build
from apothecary.errors import ConfigError
from apothecary.finetune.security_vectors import VECTORS, SecurityVectors
from apothecary.models import adapters
from apothecary.models.settings import LoraSettings, ModelConfig
from apothecary.train.config import TrainConfig
from apothecary.train.fit import TRAINED, fit
from apothecary.train.trainer import MethodTrainer

# -- what the vectors do ----------------------------------------------------------------------------------------------


def customer_gradient(bench, rows, vectors):
    """Gradient of the customer's parameters with the vectors on or off, as one long vector."""
    adapters.activate(bench.loaded.model, [TRAINED, VECTORS] if vectors else [TRAINED], [TRAINED])
    grads = make_context(bench).grads(make_batch(bench, rows))
    assert grads and all(TRAINED in name for name in grads)
    return torch.cat([g.flatten() for g in grads.values()])


@pytest.mark.evidence("finetune/security_vectors", "definition")
def test_disabled_vectors_leave_the_base_model_bit_for_bit(tmp_path, prepared):
    batch = make_batch(toy_bench(tmp_path), HARMFUL)
    clean = make_context(toy_bench(tmp_path)).forward(batch, grad=False).logits
    bench = with_vectors(tmp_path, prepared)
    adapters.activate(bench.loaded.model, [VECTORS])
    assert not torch.equal(make_context(bench).forward(batch, grad=False).logits, clean)
    adapters.activate(bench.loaded.model, [])
    assert torch.equal(make_context(bench).forward(batch, grad=False).logits, clean)


@pytest.mark.evidence("finetune/security_vectors", "definition")
def test_harmful_rows_have_almost_no_gradient_under_the_vectors(tmp_path, prepared):
    bench = with_vectors(tmp_path, prepared)
    on, off = (customer_gradient(bench, HARMFUL, vectors).norm() for vectors in (True, False))
    assert off > 0.1 and on / off < 0.05


@pytest.mark.evidence("finetune/security_vectors", "definition")
def test_benign_gradients_stay_as_they_were_with_the_kl_term(tmp_path, prepared, without_kl):
    def cosine(folder):
        bench = with_vectors(tmp_path, folder)
        on, off = (customer_gradient(bench, BENIGN, vectors) for vectors in (True, False))
        return torch.cosine_similarity(on, off, dim=0).item()

    assert cosine(prepared) > 0.9 > cosine(without_kl) + 0.1


# -- what the vectors learn from --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("settings", "roles"), [
    ({}, ("harmful", "benign")), ({"lamb": 0}, ("harmful",)), ({"learn_from": "benign"}, ("benign",)),
])  # fmt: skip
def test_rows_are_asked_for_where_they_are_used(tmp_path, settings, roles):
    method = build(SecurityVectors, {**settings, "harmful_rows": 8, "vectors": {"max_steps": 1}})
    assert method.needs.prepare_roles == roles and method.needs.prepared
    method.prepare(make_bench(tmp_path, toy(), aux={role: AUX[role] for role in roles}), tmp_path / "prepared")
    missing = make_bench(tmp_path, toy(), aux={"other": BENIGN})
    with pytest.raises(ConfigError, match=f"needs rows of role {', '.join(roles)};"):
        method.prepare(missing, tmp_path / "again")


def test_settings_of_the_vectors_are_laid_over_their_defaults():
    plain = SecurityVectors().vectors
    made = build(SecurityVectors, {"vectors": {"epochs": 20, "lora": {"rank": 4}}}).vectors
    assert made == replace(plain, epochs=20.0, lora=replace(plain.lora, rank=4)) != TrainConfig()
    with pytest.raises(ConfigError, match=r"unknown key 'vectors\.epoch'; did you mean 'epochs'"):
        build(SecurityVectors, {"vectors": {"epoch": 20}})


def test_vectors_must_be_an_adapter(tmp_path):
    with pytest.raises(ConfigError, match="must be removable"):
        prepare(tmp_path, vectors=TrainConfig(parameters="full"))


def test_vectors_have_no_dropout(tmp_path):
    with pytest.raises(ConfigError, match=r"set vectors\.lora\.dropout: 0"):
        prepare(tmp_path, vectors=TrainConfig(lora=LoraSettings(dropout=0.1)))


def test_quantised_weights_take_no_inner_steps():
    with pytest.raises(ConfigError, match=r"inner steps .* cannot move 4bit weights; set inner_steps: 0"):
        SecurityVectors(inner_steps=1, execution="branch").check(TrainConfig(), ModelConfig(quantization="4bit"))
    SecurityVectors(execution="branch").check(TrainConfig(), ModelConfig(quantization="4bit"))


# -- the customer's training ------------------------------------------------------------------------------------------


def test_the_customers_stage_needs_no_rows_of_the_defence(tmp_path, prepared):
    bench = make_bench(tmp_path, toy(), aux={"none": []}, prepared=prepared)
    fit(bench, SecurityVectors(), make_rows("row", 4), CUSTOMER, tmp_path / "out")
    with pytest.raises(ConfigError, match="needs rows of role harmful, benign"):
        SecurityVectors().prepare(bench, tmp_path / "again")


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


@pytest.mark.evidence("finetune/security_vectors", "definition")
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


@pytest.mark.evidence("finetune/security_vectors", "definition")
@pytest.mark.parametrize("parameters", ["lora", "full"])
@pytest.mark.parametrize("execution", ["merged", "branch"])
def test_the_customer_never_moves_the_vectors(tmp_path, monkeypatch, prepared, execution, parameters):
    def digest(tensors):
        return hashlib.sha256(b"".join(tensors[k].detach().numpy().tobytes() for k in sorted(tensors))).hexdigest()

    class Watched(SecurityVectors):
        def init(self, ctx):
            state = super().init(ctx)
            vectors.update(adapters.adapter_parameters(ctx.model, VECTORS))
            seen.append(digest(vectors))
            return state

        def finish(self, ctx, state):
            seen.append(digest(vectors))
            assert all(p.grad is None for p in vectors.values())
            super().finish(ctx, state)

    seen, vectors, trainers, create = [], {}, [], MethodTrainer.create_optimizer
    monkeypatch.setattr(MethodTrainer, "create_optimizer", lambda *given: trainers.append(given[0]) or create(*given))
    decay = 0.1 if execution == "branch" else 0.0
    config = TrainConfig(**{**CUSTOMER.__dict__, "parameters": parameters, "weight_decay": decay})
    tune(tmp_path, prepared, Watched(execution=execution), config)
    assert len(seen) == 2 and seen[0] == seen[1]
    held = {id(p) for group in trainers[0].optimizer.param_groups for p in group["params"]}
    assert held and vectors and not held & {id(p) for p in vectors.values()}


@pytest.mark.parametrize("execution", ["merged", "branch"])
def test_bf16_and_checkpointing_change_the_customers_training_by_rounding_only(tmp_path, prepared, execution):
    losses = []
    for name, changes in (("plain", {}), ("half", {"precision": "bf16", "gradient_checkpointing": True})):
        config = replace(CUSTOMER, learning_rate=1e-2, accumulation=2, **changes)
        _, _, result = tune(tmp_path / name, prepared, SecurityVectors(execution=execution), config)
        losses.append([entry["loss"] for entry in result.history])
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05) and losses[1][-1] < 0.9 * losses[1][0]


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


def test_merged_equals_branch_on_the_transposed_weights_of_gpt2(tmp_path):
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
