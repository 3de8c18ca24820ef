"""Security vectors in the weights for a while: the merge, its undo, and that nothing is released with them in it."""

from __future__ import annotations

import pytest
import torch
from benches import Halt, float64_model, halt_at, make_batch, make_context, make_rows, same_bits, snapshot, working_lora
from vector_scenes import BENIGN, CUSTOMER, HARMFUL, toy, toy_bench, tune, with_vectors

from apothecary.errors import ConfigError, ModelError, TrainingError
from apothecary.finetune.security_vectors import VECTORS, SecurityVectors
from apothecary.models import adapters, merging
from apothecary.train.config import TrainConfig
from apothecary.train.fit import TRAINED, export, fit


@pytest.mark.evidence("finetune/security_vectors", "definition")
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


@pytest.mark.evidence("finetune/security_vectors", "definition")
def test_what_was_trained_in_between_stays_when_the_vectors_are_taken_out():
    model = working_lora(float64_model())
    before, delta = snapshot(adapters.plain(model)), adapters.adapter_delta(model, TRAINED)
    undo = merging.merge_temporarily(model, TRAINED)
    places = {name.replace(".weight", ".base_layer.weight"): change for name, change in delta.items()}
    weights = {name: p for name, p in adapters.plain(model).named_parameters() if name in places}
    for name, p in weights.items():
        torch.testing.assert_close(p.detach(), before[name] + places[name], rtol=0, atol=1e-6)
        p.data += 0.5
    undo()
    assert weights.keys() == places.keys()
    assert all((p - before[name] - 0.5).abs().max() < 1e-12 for name, p in weights.items())


def test_quantised_weights_cannot_be_merged_into(prepared):
    model = adapters.load_adapter(toy(), VECTORS, prepared / VECTORS)
    weight = adapters.plain(model).model.layers[0].self_attn.q_proj.base_layer.weight
    weight.requires_grad_(False)
    weight.data = weight.data.to(torch.uint8)
    with pytest.raises(ConfigError, match="set execution: branch"):
        merging.merge_temporarily(model, VECTORS)


def test_a_merge_that_is_refused_changes_nothing(prepared):
    model = adapters.load_adapter(toy(), VECTORS, prepared / VECTORS)
    last = adapters.plain(model).model.layers[-1].self_attn.o_proj.base_layer.weight
    last.requires_grad_(False)
    last.data = last.data.to(torch.uint8)
    before = snapshot(model)
    with pytest.raises(ConfigError, match="these are quantised"):
        merging.merge_temporarily(model, VECTORS)
    assert same_bits(before, snapshot(model))
    merging.refuse_merged(model)


# -- nothing is saved with the vectors in it --------------------------------------------------------------------------


def released(folder):
    return list(folder.rglob("*.safetensors"))


@pytest.mark.parametrize("parameters", ["lora", "full"])
def test_nothing_is_exported_while_the_vectors_are_merged(tmp_path, prepared, parameters):
    config = TrainConfig(parameters=parameters)
    bench = with_vectors(tmp_path, prepared)
    undo = merging.merge_temporarily(bench.loaded.model, VECTORS)
    bench.loaded.model = adapters.remove_adapter(bench.loaded.model, VECTORS)
    if parameters == "full":
        bench.loaded.model = adapters.remove_adapter(bench.loaded.model, TRAINED)
    with pytest.raises(ModelError, match=f"'{VECTORS}' is merged into the weights for a while"):
        export(bench, config, tmp_path / "out")
    assert not released(tmp_path)
    undo()
    export(bench, config, tmp_path / "out")
    assert released(tmp_path)


@pytest.mark.parametrize("parameters", ["lora", "full"])
def test_nothing_is_exported_while_the_vectors_are_attached(tmp_path, prepared, parameters):
    bench = with_vectors(tmp_path, prepared)
    if parameters == "full":
        bench.loaded.model = adapters.remove_adapter(bench.loaded.model, TRAINED)
    with pytest.raises(TrainingError, match=f"adapter '{VECTORS}' is still in the model"):
        export(bench, TrainConfig(parameters=parameters), tmp_path / "out")
    assert not released(tmp_path)


def test_no_adapter_is_saved_or_merged_on_weights_that_hold_the_vectors(tmp_path, prepared):
    bench = with_vectors(tmp_path, prepared)
    model = bench.loaded.model
    undo = merging.merge_temporarily(model, VECTORS)
    for name in (TRAINED, VECTORS):
        with pytest.raises(ModelError, match="take it out before the model is saved"):
            adapters.save_adapter(model, name, tmp_path / name)
    base = adapters.remove_adapter(adapters.remove_adapter(model, TRAINED), VECTORS)
    with pytest.raises(ModelError, match="expected weights without it"):
        adapters.merge_adapters(base, [prepared / VECTORS])
    undo()
    merging.refuse_merged(base)
    assert not released(tmp_path)


@pytest.mark.parametrize("execution", ["merged", "branch"])
def test_a_training_that_is_stopped_releases_nothing_and_goes_on_to_the_same_bytes(tmp_path, prepared, execution):
    config = TrainConfig(**{**CUSTOMER.__dict__, "save_every": 2})
    _, whole, _ = tune(tmp_path / "whole", prepared, SecurityVectors(execution=execution), config)
    folder = tmp_path / "stopped"
    bench = toy_bench(folder, prepared=prepared, stop=halt_at(3))
    with pytest.raises(Halt):
        fit(bench, SecurityVectors(execution=execution), make_rows("row", 8), config, folder / "out")
    assert not (folder / "out").exists()
    with pytest.raises((ModelError, TrainingError), match=VECTORS):
        export(bench, config, folder / "out")
    assert not (folder / "out").exists()
    _, resumed, result = tune(folder, prepared, SecurityVectors(execution=execution), config)
    assert result.metrics["resumed"] and same_bits(whole, resumed)
