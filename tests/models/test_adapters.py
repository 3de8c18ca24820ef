import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import FAMILIES, VOCAB, tiny_model

from apothecary.errors import ModelError
from apothecary.models.adapters import (
    activate,
    active_adapters,
    adapter_delta,
    adapter_names,
    adapter_parameters,
    add_adapter,
    load_adapter,
    merge_adapters,
    plain,
    remove_adapter,
    save_adapter,
    trainable_adapters,
)
from apothecary.models.digest import tensors_digest
from apothecary.models.settings import LoraSettings

SETTINGS = LoraSettings(rank=4, alpha=8.0)


def ids(rows=2, length=12):
    return torch.randint(5, VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model):
    return model(ids()).logits


@torch.no_grad()
def teach(model, name, seed=0):
    """Give the adapter a B that is not zero, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in adapter_parameters(model, name).items():
        if "lora_B" in key:
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))


def taught(family="llama", name="user", seed=0, dtype=torch.float32):
    model = add_adapter(tiny_model(family, dtype=dtype), name, SETTINGS, seed)
    teach(model, name, seed)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_changes_nothing_and_no_active_adapter_is_the_base(family):
    model = tiny_model(family)
    before = logits(model)
    wrapped = add_adapter(model, "user", SETTINGS, seed=0)
    assert torch.equal(logits(wrapped), before)
    teach(wrapped, "user")
    assert (logits(wrapped) - before).abs().max() > 1e-3
    activate(wrapped, [])
    assert torch.equal(logits(wrapped), before) and active_adapters(wrapped) == []
    activate(wrapped, ["user"])
    assert (logits(wrapped) - before).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_delta_is_merged_weight_minus_base_weight(family):
    base = tiny_model(family).state_dict()
    model = taught(family)
    deltas = adapter_delta(model, "user")
    merged = model.merge_and_unload().state_dict()
    assert deltas.keys() <= base.keys()
    for name, weight in merged.items():
        expected = deltas.get(name, torch.zeros(()))
        assert expected.dtype == torch.float32
        if name in deltas:
            assert expected.shape == weight.shape and expected.abs().max() > 0
        assert torch.allclose(weight - base[name], expected.expand_as(weight), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_head_and_embeddings_are_no_targets(family):
    model = taught(family)
    inner = plain(model)
    assert not any(hasattr(part, "lora_A") for part in (inner.get_output_embeddings(), inner.get_input_embeddings()))
    touched = {name.rsplit(".lora_", 1)[0] for name in adapter_parameters(model, "user")}
    linear = {
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
        and "lora_" not in name
        and module is not inner.get_output_embeddings()
    }
    assert touched == linear


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_adapters_agree_bit_for_bit(family, tmp_path):
    model = taught(family)
    save_adapter(model, "user", tmp_path / "a")
    loaded = load_adapter(tiny_model(family), "other", tmp_path / "a")
    assert torch.equal(logits(loaded), logits(model))
    assert trainable_adapters(loaded) == [] and active_adapters(loaded) == ["other"]
    standard = PeftModel.from_pretrained(tiny_model(family), str(tmp_path / "a"))
    assert torch.equal(logits(standard.eval()), logits(model))


def test_the_folder_is_standard_peft_and_its_bytes_are_stable(tmp_path):
    model = taught()
    save_adapter(model, "user", tmp_path / "a")
    save_adapter(taught(), "user", tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    assert config["target_modules"] == sorted(config["target_modules"])
    model.save_pretrained(str(tmp_path / "theirs"), selected_adapters=["user"], save_embedding_layers=False)
    ours, theirs = (
        load_file(path / "adapter_model.safetensors") for path in (tmp_path / "a", tmp_path / "theirs/user")
    )
    assert tensors_digest(ours) == tensors_digest(theirs)


@pytest.mark.parametrize(("kept", "other"), [("user", "sv"), ("sv", "sv2"), ("sv2", "sv")])
def test_a_saved_adapter_holds_nothing_of_another(kept, other, tmp_path):
    model = add_adapter(taught(name=kept), other, SETTINGS, seed=7)
    teach(model, other, seed=7)
    save_adapter(model, kept, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    alone = taught(name=kept)
    expected = {
        name.replace(f".{kept}.", "."): value.detach() for name, value in adapter_parameters(alone, kept).items()
    }
    assert not any(part in (kept, other) for key in saved for part in key.split("."))
    assert tensors_digest(saved) == tensors_digest(expected)


def test_initialisation_depends_on_the_seed_alone():
    state = torch.get_rng_state()
    first = adapter_parameters(add_adapter(tiny_model(), "user", SETTINGS, seed=5), "user")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again = adapter_parameters(add_adapter(tiny_model(seed=4), "user", SETTINGS, seed=5), "user")
    other = adapter_parameters(add_adapter(tiny_model(), "user", SETTINGS, seed=6), "user")
    second = add_adapter(taught(name="sv"), "user", SETTINGS, seed=5)
    assert tensors_digest(first) == tensors_digest(again) == tensors_digest(adapter_parameters(second, "user"))
    assert tensors_digest(first) != tensors_digest(other)


def test_lora_tensors_are_fp32_over_a_half_precision_base(tmp_path):
    model = taught(dtype=torch.bfloat16)
    assert {p.dtype for p in adapter_parameters(model, "user").values()} == {torch.float32}
    assert plain(model).get_input_embeddings().weight.dtype == torch.bfloat16
    save_adapter(model, "user", tmp_path)
    loaded = load_adapter(tiny_model(dtype=torch.bfloat16), "user", tmp_path)
    assert {p.dtype for p in adapter_parameters(loaded, "user").values()} == {torch.float32}


def test_only_the_trainable_adapters_learn():
    model = add_adapter(taught(name="sv"), "user", SETTINGS, seed=1)
    assert (active_adapters(model), trainable_adapters(model)) == (["sv", "user"], ["sv", "user"])
    activate(model, ["sv", "user"], ["user"])
    assert (active_adapters(model), trainable_adapters(model)) == (["sv", "user"], ["user"])
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == set(adapter_parameters(model, "user"))
    model(ids(), labels=ids()).loss.backward()
    assert all(p.grad is None for p in adapter_parameters(model, "sv").values())
    assert all(p.grad is not None for p in adapter_parameters(model, "user").values())


def test_two_active_adapters_add_up():
    model = add_adapter(taught(name="sv", seed=1), "user", SETTINGS, seed=2)
    teach(model, "user", seed=2)
    both = logits(model)
    weights = tiny_model().state_dict()
    for name in ("sv", "user"):
        for key, delta in adapter_delta(model, name).items():
            weights[key] = weights[key] + delta
    reference = tiny_model()
    reference.load_state_dict(weights)
    assert torch.allclose(logits(reference), both, atol=1e-5)
    activate(model, ["sv"])
    alone = taught(name="sv", seed=1)
    assert torch.equal(logits(model), logits(alone))


def test_activation_leaves_base_weights_as_they_are(tmp_path):
    save_adapter(taught(name="sv"), "sv", tmp_path)
    base = tiny_model()
    base.get_input_embeddings().requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in base.named_parameters()}

    def now(model):
        names = {name.replace(".base_layer", ""): p.requires_grad for name, p in plain(model).named_parameters()}
        return {name: flag for name, flag in names.items() if name in flags}

    model = load_adapter(base, "sv", tmp_path)
    assert now(model) == flags and len(set(flags.values())) == 2
    for active in ([], ["sv"]):
        activate(model, active)
        assert now(model) == flags
    assert not any(p.requires_grad for p in adapter_parameters(model, "sv").values())
    assert not any(now(add_adapter(model, "user", SETTINGS, seed=0)).values())


def test_a_second_adapter_does_not_thaw_the_first():
    model = taught(name="sv")
    activate(model, ["sv"])
    model = add_adapter(model, "user", SETTINGS, seed=0)
    assert (active_adapters(model), trainable_adapters(model)) == (["sv", "user"], ["user"])
    activate(model, [])
    model = add_adapter(model, "third", SETTINGS, seed=0)
    assert (active_adapters(model), trainable_adapters(model)) == (["third"], ["third"])


def test_removal_gives_back_the_plain_model():
    untouched = tiny_model()
    model = add_adapter(taught(name="sv"), "user", SETTINGS, seed=0)
    activate(model, ["sv", "user"], ["user"])
    model = remove_adapter(model, "sv")
    assert adapter_names(model) == ["user"] == active_adapters(model) == trainable_adapters(model)
    assert torch.equal(logits(model), logits(untouched))
    bare = remove_adapter(model, "user")
    assert bare is plain(bare) and adapter_names(bare) == []
    assert list(dict(bare.named_parameters())) == list(dict(untouched.named_parameters()))
    assert tensors_digest(bare.state_dict()) == tensors_digest(untouched.state_dict())
    assert active_adapters(add_adapter(bare, "sv", SETTINGS, seed=0)) == ["sv"]


def test_removing_an_inactive_adapter_leaves_the_rest_inactive():
    model = add_adapter(taught(name="sv"), "user", SETTINGS, seed=0)
    activate(model, [])
    assert active_adapters(remove_adapter(model, "sv")) == []


def test_the_adapter_takes_the_mode_of_the_base():
    dropping = LoraSettings(rank=4, dropout=0.5)
    model = add_adapter(tiny_model(), "user", dropping, seed=0)
    teach(model, "user")
    assert torch.equal(logits(model), logits(model))
    assert not any(module.training for module in model.modules())


def test_targets_by_name():
    model = add_adapter(tiny_model(), "user", LoraSettings(targets=("q_proj", "v_proj")), seed=0)
    assert {name.split(".")[-2] for name in adapter_delta(model, "user")} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merging_adds_the_deltas_in_order_and_leaves_no_wrapper(family, tmp_path):
    for seed in (1, 2):
        save_adapter(taught(family, seed=seed), "user", tmp_path / str(seed))
    deltas = [adapter_delta(taught(family, seed=seed), "user") for seed in (1, 2)]
    merged = merge_adapters(tiny_model(family), [tmp_path / "1", tmp_path / "2"])
    base = tiny_model(family).state_dict()
    assert list(merged.state_dict()) == list(base) and adapter_names(merged) == []
    for name, weight in merged.state_dict().items():
        expected = base[name] + sum((delta[name] for delta in deltas if name in delta), torch.zeros(()))
        assert torch.allclose(weight, expected, atol=1e-6, rtol=0), name


def test_half_precision_weights_are_rounded_once(tmp_path):
    for seed in (1, 2):
        save_adapter(taught(seed=seed), "user", tmp_path / str(seed))
    deltas = [adapter_delta(taught(seed=seed), "user") for seed in (1, 2)]
    base = tiny_model(dtype=torch.bfloat16).state_dict()
    merged = merge_adapters(tiny_model(dtype=torch.bfloat16), [tmp_path / "1", tmp_path / "2"]).state_dict()
    for name in deltas[0]:
        exact = base[name].float() + deltas[0][name] + deltas[1][name]
        assert merged[name].dtype == torch.bfloat16
        assert torch.equal(merged[name], exact.bfloat16())


def test_an_adapter_of_another_model_is_refused_and_leaves_no_trace(tmp_path):
    save_adapter(taught(), "user", tmp_path / "llama")
    save_adapter(taught("gpt2"), "user", tmp_path / "gpt2")
    wider = tiny_model("llama", intermediate_size=64)
    shallower = tiny_model("llama", num_hidden_layers=1)
    for model, folder in ((wider, "llama"), (shallower, "llama"), (tiny_model("llama"), "gpt2")):
        names, before = list(dict(model.named_parameters())), logits(model)
        with pytest.raises(ModelError, match=r"made for another model|does not fit LlamaForCausalLM"):
            load_adapter(model, "user", tmp_path / folder)
        assert list(dict(model.named_parameters())) == names and torch.equal(logits(model), before)
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert adapter_names(add_adapter(model, "user", SETTINGS, seed=0)) == ["user"]


def test_tied_embeddings_are_not_merged_into(tmp_path):
    model = get_peft_model(tiny_model("gemma2"), LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    save_adapter(model, "default", tmp_path)
    with pytest.raises(ModelError, match="'lm_head', which is tied"):
        merge_adapters(tiny_model("gemma2"), [tmp_path])


def test_user_errors_are_clear(tmp_path):
    model = taught(name="sv")
    with pytest.raises(ModelError, match="no adapter 'svv'; did you mean 'sv'"):
        activate(model, ["svv"])
    with pytest.raises(ModelError, match="'sv' cannot learn while inactive"):
        activate(model, [], ["sv"])
    with pytest.raises(ModelError, match="already has an adapter 'sv'"):
        add_adapter(model, "sv", SETTINGS, seed=0)
    for name in ("", "a.b", "layers", "lora_A", "base_layer"):
        with pytest.raises(ModelError, match="cannot name an adapter"):
            add_adapter(model, name, SETTINGS, seed=0)
    with pytest.raises(ModelError, match="does not fit LlamaForCausalLM"):
        add_adapter(tiny_model(), "user", LoraSettings(targets=("c_attn",)), seed=0)
    for act in (adapter_delta, remove_adapter, lambda m, n: save_adapter(m, n, tmp_path)):
        with pytest.raises(ModelError, match="has no adapter 'user'"):
            act(model, "user")
    assert (active_adapters(model), trainable_adapters(model)) == (["sv"], ["sv"])


def test_only_safetensors_lora_folders_are_read(tmp_path):
    with pytest.raises(ModelError, match=r"has no adapter_config\.json"):
        load_adapter(tiny_model(), "user", tmp_path / "missing")
    save_adapter(taught(), "user", tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors"):
        load_adapter(tiny_model(), "user", tmp_path)
    weights.write_bytes(b"not a safetensors file")
    with pytest.raises(ModelError, match="cannot be read"):
        load_adapter(tiny_model(), "user", tmp_path)


def test_activate_on_a_plain_model():
    model = tiny_model()
    activate(model, [])
    assert plain(model) is model and active_adapters(model) == []
    with pytest.raises(ModelError, match="no adapter 'user'"):
        activate(model, ["user"])
