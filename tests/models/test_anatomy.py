import pytest
from tiny import FAMILIES, LAYERS, tiny_model
from torch import nn

from apothecary.errors import ModelError
from apothecary.models.adapters import adapter_delta, add_adapter
from apothecary.models.anatomy import attention_blocks, attention_linears, decoder_layers, mlp_blocks
from apothecary.models.settings import LoraSettings


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_one_attention_and_one_mlp_block(family):
    model = tiny_model(family)
    layers, attention, mlp = decoder_layers(model), attention_blocks(model), mlp_blocks(model)
    assert len(layers) == len(attention) == len(mlp) == LAYERS
    assert list(attention) == list(mlp) == list(range(LAYERS))
    for index, (name, layer) in enumerate(layers):
        assert model.get_submodule(name) is layer and name.endswith(f".{index}")
        inside = set(layer.modules())
        assert {attention[index], mlp[index]} <= inside and attention[index] is not mlp[index]
    assert len({id(block) for block in (*attention.values(), *mlp.values())}) == 2 * LAYERS


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_do_not_hide_the_blocks(family):
    model = tiny_model(family)
    before = attention_blocks(model)
    wrapped = add_adapter(model, "user", LoraSettings(), seed=0)
    assert attention_blocks(wrapped) == before == attention_blocks(model)
    assert all(wrapped.get_submodule(name) is layer for name, layer in decoder_layers(wrapped))
    assert len(mlp_blocks(wrapped)) == LAYERS


def test_fc2_stands_for_the_mlp_of_opt():
    model = tiny_model("opt")
    assert mlp_blocks(model)[1] is model.model.decoder.layers[1].fc2


class SomeAttention(nn.Module):
    pass


class AttentionLayerNorm(nn.Module):
    pass


class AttentionRotaryEmbedding(nn.Module):
    pass


class Wrapper(nn.Module):
    def __init__(self, *children):
        super().__init__()
        self.inner = nn.Sequential(*children) if len(children) > 1 else children[0]


def with_block(block):
    """A tiny Llama whose second layer has `block` for attention."""
    model = tiny_model("llama")
    model.model.layers[1].self_attn = block
    return model


def test_helpers_that_carry_the_name_are_not_attention():
    model = tiny_model("llama")
    model.model.layers[0].first_norm, model.model.layers[0].rotary = AttentionLayerNorm(), AttentionRotaryEmbedding()
    assert type(attention_blocks(model)[0]).__name__ == "LlamaAttention"


def test_attention_may_sit_one_level_deeper():
    block = SomeAttention()
    assert attention_blocks(with_block(Wrapper(block)))[1] is block


def test_a_layer_without_attention_is_named():
    with pytest.raises(ModelError, match=r"'model\.layers\.1' .* has 0 attention blocks"):
        attention_blocks(with_block(nn.Identity()))


def test_a_layer_with_two_attention_blocks_is_named():
    model = tiny_model("llama")
    model.model.layers[1].cross = SomeAttention()
    with pytest.raises(ModelError, match=r"'model\.layers\.1' .* has 2 attention blocks \(LlamaAttention, SomeAtt"):
        attention_blocks(model)


def test_a_layer_without_mlp_is_named():
    model = tiny_model("gpt2")
    model.transformer.h[0].mlp = nn.Identity()
    with pytest.raises(ModelError, match=r"'transformer\.h\.0' .* has 0 MLP blocks"):
        mlp_blocks(model)


def test_layers_that_do_not_match_the_configuration_are_an_error():
    model = tiny_model("llama")
    model.model.layers = model.model.layers[:1]
    with pytest.raises(ModelError, match="has 0 lists of 2 layers"):
        decoder_layers(model)


def test_as_many_experts_as_layers_do_not_confuse():
    model = tiny_model("llama")
    model.model.layers[0].experts = nn.ModuleList([nn.Identity() for _ in range(LAYERS)])
    assert [name for name, _ in decoder_layers(model)] == ["model.layers.0", "model.layers.1"]


SPLIT = ["self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"]
PROJECTIONS = {
    "phi3": ["self_attn.o_proj", "self_attn.qkv_proj"],
    "opt": ["self_attn.k_proj", "self_attn.out_proj", "self_attn.q_proj", "self_attn.v_proj"],
    "gpt2": ["attn.c_attn", "attn.c_proj"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_word_attention_stands_for_the_projections_of_every_layer(family):
    model = tiny_model(family)
    expected = [f"{name}.{part}" for name, _ in decoder_layers(model) for part in PROJECTIONS.get(family, SPLIT)]
    assert sorted(attention_linears(model)) == sorted(expected)
    add_adapter(model, "first", LoraSettings(), seed=0)
    assert sorted(attention_linears(model)) == sorted(expected), "adapters that are there change nothing"
    wrapped = add_adapter(tiny_model(family), "vectors", LoraSettings(targets="attention"), seed=0)
    assert sorted(adapter_delta(wrapped, "vectors")) == sorted(f"{name}.weight" for name in expected)


def test_attention_without_linear_layers_is_named():
    with pytest.raises(ModelError, match=r"'model\.layers\.1\.self_attn' \(SomeAttention\) has no linear layer"):
        attention_linears(with_block(SomeAttention()))
