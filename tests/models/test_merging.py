"""Adapters added to the weights for a while: what is merged, what is refused, what comes back."""

from __future__ import annotations

import pytest
import torch
from benches import same_bits, snapshot, working_lora
from tiny import PAD, VOCAB, tiny_model

from apothecary.errors import ConfigError
from apothecary.models.adapters import activate
from apothecary.models.merging import merge_temporarily, merges_exactly, refuse_merged

IDS = torch.arange(PAD + 1, VOCAB)[None, :64]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("end", ["lm_head", "wte"])
def test_a_tied_embedding_is_refused_before_anything_is_moved(end):
    model = working_lora(tiny_model("gpt2"), targets=("c_attn", end))
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"on a tied embedding would change .*; set execution: branch"):
        merge_temporarily(model, "trained")
    assert same_bits(before, snapshot(model))
    refuse_merged(model)


@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_an_untied_embedding_is_merged_and_comes_back(end):
    model = working_lora(tiny_model("llama", tie_word_embeddings=False), targets=("q_proj", end)).eval()
    before, branch = snapshot(model), model(IDS).logits
    undo = merge_temporarily(model, "trained")
    activate(model, [])
    torch.testing.assert_close(model(IDS).logits, branch, rtol=1e-4, atol=1e-4)
    undo()
    assert same_bits(before, snapshot(model)) and not torch.allclose(model(IDS).logits, branch, atol=1e-2)


def test_adapters_stand_in_the_weights_where_these_are_fine_enough_and_nothing_is_random():
    assert merges_exactly(working_lora(tiny_model("llama")))
    assert merges_exactly(working_lora(tiny_model("gpt2", dtype=torch.float64)))
    assert not merges_exactly(working_lora(tiny_model("llama", dtype=torch.bfloat16)))
    assert not merges_exactly(working_lora(tiny_model("llama"), dropout=0.1))
    assert not merges_exactly(tiny_model("llama")), "there is none"
