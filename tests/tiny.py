"""Random models of every supported family and a tokenizer, small enough for unit tests; nothing is downloaded."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "opt", "gpt2")
LAYERS = 2
HIDDEN = 32
CONTEXT = 256
SPECIAL = ("<|pad|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>")
PAD, EOS = 0, 1
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("in", "g"), ("Ġ", "a")]
VOCAB = len(SPECIAL) + 256 + len(MERGES)
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_COMMON = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS}
_LLAMA = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.15,
}
_GEMMA = _LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
_SETTINGS = {
    "llama": ("llama", _LLAMA),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", _LLAMA | {"head_dim": 8}),
    "mistral": ("mistral", _LLAMA | {"sliding_window": 16}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", _GEMMA | {"layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("phi3", _LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
    "opt": (
        "opt",
        {
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
            "ffn_dim": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "dropout": 0.0,
            "init_std": 0.15,
        },
    ),
    "gpt2": (
        "gpt2",
        {
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_positions": CONTEXT,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "initializer_range": 0.15,
        },
    ),
}


def tiny_model(
    family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: object
) -> PreTrainedModel:
    """A random causal language model of `family` in eval mode, the same for the same seed; dropout is off.

    `overrides` go into its configuration.
    """
    kind, settings = _SETTINGS[family]
    config = CONFIG_MAPPING[kind](**(_COMMON | settings | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    return model.to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with pad, eos and a chat template; any text survives a round trip."""
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in MERGES)]
    core = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIAL[PAD],
        eos_token=SPECIAL[EOS],
        chat_template=TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
