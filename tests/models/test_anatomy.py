import pytest
import torch
from tiny import FAMILIES, HIDDEN, LAYERS, tiny_model
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, GraniteConfig, GraniteForCausalLM

from apothecary.errors import ModelError
from apothecary.models.adapters import adapter_delta, add_adapter, plain
from apothecary.models.anatomy import (
    attention_blocks,
    attention_linears,
    decoder_layers,
    final_norm,
    logit_head,
    mlp_blocks,
)
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


def with_states(model, ids):
    """(output of the last decoder layer, logits)."""
    seen = []
    handle = decoder_layers(model)[-1][1].register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    handle.remove()
    return (seen[0][0] if isinstance(seen[0], tuple) else seen[0]), logits


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_norm_and_head_turn_the_last_hidden_state_into_the_models_logits(family, adapters):
    model = tiny_model(family)
    if adapters:
        model = add_adapter(model, "user", LoraSettings(), seed=0)
    norm = final_norm(model)
    with torch.no_grad():
        norm.weight.normal_(1, 0.5)  # a norm of ones would change nothing when it is met again
    hidden, logits = with_states(model, torch.tensor([[3, 9, 200, 1]]))
    head = logit_head(model)
    torch.testing.assert_close(head(hidden), logits)
    assert head.parts == (norm, plain(model).get_output_embeddings()) and "Norm" in type(norm).__name__
    assert (head(norm(hidden)) - logits).abs().max() > 0.1, "normed once"


def test_the_head_of_opt_350m_projects_and_has_no_norm():
    model = tiny_model("opt", word_embed_proj_dim=16, do_layer_norm_before=False)
    head = logit_head(model)
    assert final_norm(model) is None and head.parts == (model.model.decoder.project_out, model.lm_head)
    hidden, logits = with_states(model, torch.tensor([[3, 9]]))
    torch.testing.assert_close(head(hidden), logits)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_the_head_caps_logits_softly(family):
    model = tiny_model(family, final_logit_softcapping=0.5)
    hidden, logits = with_states(model, torch.tensor([[3, 9]]))
    assert logit_head(model).softcap == 0.5 and 0.4 < logits.abs().max() < 0.5
    torch.testing.assert_close(logit_head(model)(hidden), logits)


def test_a_norm_of_the_embeddings_is_not_the_final_norm():
    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4))
    assert final_norm(model) is model.transformer.ln_f
    hidden, logits = with_states(model, torch.tensor([[3, 9]]))
    torch.testing.assert_close(logit_head(model)(hidden), logits)


def test_a_model_that_scales_its_logits_is_refused_and_left_as_it_was():
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = GraniteForCausalLM(GraniteConfig(vocab_size=50, logits_scaling=4.0, pad_token_id=0, **config)).train()
    with pytest.raises(ModelError, match="GraniteForCausalLM does not form its logits by final norm"):
        logit_head(model)
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_several_norms_after_the_layers_are_an_error():
    model = tiny_model("llama")
    model.model.second_norm = type(model.model.norm)(HIDDEN)
    with pytest.raises(ModelError, match=r"LlamaModel has 2 norms after its layers \(norm, second_norm\)"):
        logit_head(model)
