import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tiny import CONTEXT, FAMILIES, VOCAB, tiny_model, tiny_tokenizer

from apothecary.errors import ModelError
from apothecary.models.adapters import adapter_delta, adapter_parameters, add_adapter, save_adapter
from apothecary.models.digest import tensors_digest
from apothecary.models.load import context_length, load_model, load_tokenizer
from apothecary.models.settings import LoraSettings, ModelConfig


def saved(path, model=None, tokenizer=None):
    (model or tiny_model()).save_pretrained(path)
    (tokenizer or tiny_tokenizer()).save_pretrained(path)
    return str(path)


def an_adapter(path, seed):
    model = add_adapter(tiny_model(), "user", LoraSettings(rank=4), seed=seed)
    for name, value in adapter_parameters(model, "user").items():
        value.data.add_(0.1 * seed * ("lora_B" in name))
    save_adapter(model, "user", path)
    return adapter_delta(model, "user")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back_ready_to_use(family, tmp_path):
    model = tiny_model(family)
    loaded = load_model(ModelConfig(saved(tmp_path, model)))
    assert tensors_digest(loaded.model.state_dict()) == tensors_digest(model.state_dict())
    assert type(loaded.model) is type(model) and not loaded.model.training
    assert loaded.tokenizer.pad_token_id == 0 and loaded.tokenizer.eos_token_id == 1 and loaded.tokenizer.chat_template
    assert context_length(loaded.model) == CONTEXT
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.name_or_path == loaded.tokenizer.name_or_path == str(tmp_path)


def test_auto_precision_on_a_cpu_is_fp32(tmp_path):
    path = saved(tmp_path, tiny_model(dtype=torch.bfloat16))
    assert load_model(ModelConfig(path, device="cpu")).model.dtype == torch.float32
    for name in ("float32", "bfloat16", "float16"):
        assert load_model(ModelConfig(path, device="cpu", dtype=name)).model.dtype == getattr(torch, name)


def test_adapters_are_merged_in_order(tmp_path):
    deltas = [an_adapter(tmp_path / str(seed), seed) for seed in (1, 2, 3)]
    config = ModelConfig(saved(tmp_path / "base"), adapter=str(tmp_path / "1"))
    loaded = load_model(config, adapters=[tmp_path / "2", tmp_path / "3"])
    base = tiny_model().state_dict()
    assert type(loaded.model) is type(tiny_model()) and list(loaded.model.state_dict()) == list(base)
    for name, weight in loaded.model.state_dict().items():
        expected = base[name] + sum((delta[name] for delta in deltas if name in delta), torch.zeros(()))
        assert torch.allclose(weight, expected, atol=1e-6, rtol=0), name


def test_full_weights_replace_those_of_the_base(tmp_path):
    path, other = saved(tmp_path / "base"), tiny_model(seed=9)
    other.save_pretrained(tmp_path / "tuned")
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "tuned" / "model.safetensors", tmp_path / "bare")
    for weights in (tmp_path / "tuned", tmp_path / "bare"):
        loaded = load_model(ModelConfig(path), weights=weights)
        assert tensors_digest(loaded.model.state_dict()) == tensors_digest(other.state_dict())
    with pytest.raises(ModelError, match="expected a folder with a model's full weights"):
        load_model(ModelConfig(path), weights=tmp_path)


def test_end_tokens_are_those_of_the_base_whatever_the_weights_folder_holds(tmp_path):
    model = tiny_model()
    model.generation_config.eos_token_id = [1, 7]
    path = saved(tmp_path / "base", model)
    tiny_model(seed=9).save_pretrained(tmp_path / "tuned")
    loaded = load_model(ModelConfig(path), weights=tmp_path / "tuned")
    assert loaded.model.generation_config.eos_token_id == [1, 7]
    (tmp_path / "base" / "generation_config.json").unlink()
    for weights in (None, tmp_path / "tuned"):
        assert load_model(ModelConfig(path), weights=weights).model.generation_config.eos_token_id == 1


@pytest.mark.parametrize(("base", "tuned"), [("llama", "qwen3"), ("qwen3", "llama"), ("llama", "gpt2")])
def test_weights_of_another_architecture_are_refused(base, tuned, tmp_path):
    path = saved(tmp_path / "base", tiny_model(base))
    tiny_model(tuned).save_pretrained(tmp_path / "tuned")
    with pytest.raises(ModelError, match=r"differ from \w+ForCausalLM in \d+ tensors"):
        load_model(ModelConfig(path), weights=tmp_path / "tuned")


def test_incomplete_weights_are_refused_rather_than_drawn_at_random(tmp_path):
    path = saved(tmp_path)
    state = tiny_model().state_dict()
    state.pop("model.norm.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"in 1 tensors \(first: model\.norm\.weight\)"):
        load_model(ModelConfig(path))


@pytest.mark.parametrize(("names", "expected"), [
    (["<|pad|>"], "<|pad|>"),
    (["<|reserved_special_token_0|>", "<|fine_right_pad_id|>"], "<|fine_right_pad_id|>"),
    (["<|reserved_special_token_0|>"], "<|reserved_special_token_0|>"),
    ([], "<|eos|>"),
])  # fmt: skip
def test_a_missing_pad_token_is_taken_from_what_exists(names, expected, tmp_path):
    tokenizer = tiny_tokenizer()
    path = saved(tmp_path, tiny_model(vocab_size=VOCAB + 2, pad_token_id=None), tokenizer)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    kept = [token for token in content["added_tokens"] if token["content"] != "<|pad|>" or "<|pad|>" in names]
    extra = [name for name in names if name != "<|pad|>"]
    content["added_tokens"] = kept + [{**kept[0], "id": VOCAB + at, "content": name} for at, name in enumerate(extra)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_model(ModelConfig(path))
    assert loaded.tokenizer.pad_token == expected
    assert loaded.model.get_input_embeddings().weight.shape[0] == VOCAB + 2
    assert loaded.tokenizer.pad_token_id < VOCAB + 2


def test_a_pad_token_without_an_embedding_row_is_not_used(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == VOCAB
    loaded = load_model(ModelConfig(saved(tmp_path, tokenizer=tokenizer)))
    assert loaded.tokenizer.pad_token == "<|pad|>"


def test_a_model_without_chat_template_needs_one_from_a_file(tmp_path):
    tokenizer = tiny_tokenizer()
    template, tokenizer.chat_template = tokenizer.chat_template, None
    path = saved(tmp_path / "model", tokenizer=tokenizer)
    with pytest.raises(ModelError, match="has no chat template, expected a chat model; choose one, or set"):
        load_model(ModelConfig(path))
    with pytest.raises(ModelError, match="cannot be read as UTF-8 text"):
        load_model(ModelConfig(path, chat_template=str(tmp_path / "none")))
    (tmp_path / "template.jinja").write_text(template)
    loaded = load_model(ModelConfig(path, chat_template=str(tmp_path / "template.jinja")))
    assert (
        loaded.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<|user|>a<|eos|>"
    )


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="has no eos token"):
        load_model(ModelConfig(saved(tmp_path, tokenizer=tokenizer)))


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(("damage", "message"), [
    (shutil.rmtree, "does not exist, expected a folder with config.json"),
    (remove("config.json"), "has no config.json"),
    (remove("model.safetensors"), r"has no \*\.safetensors file, and no other format is read"),
    (write("config.json", b"{"), "not a valid JSON file"),
    (write("config.json", b'{"model_type": "t5"}'), "cannot be loaded as a language model"),
    (write("config.json", b'{"model_type": "no_such"}'), "cannot be loaded as a language model"),
    (write("model.safetensors", b"cut off"), "cannot be loaded as a language model"),
    (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "has no tokenizer that can be read"),
])  # fmt: skip
def test_damaged_folders_are_told_in_one_line(damage, message, tmp_path):
    path = saved(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(ModelError, match=message) as caught:
        load_model(ModelConfig(path))
    assert "\n" not in str(caught.value) and path in str(caught.value)


def test_pickled_weights_are_never_read(tmp_path):
    path = saved(tmp_path)
    torch.save(tiny_model().state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no other format is read"):
        load_model(ModelConfig(path))


def test_an_unknown_hub_id_offline_fails_at_once(monkeypatch):
    from huggingface_hub import HfApi

    def refuse(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(HfApi, "model_info", refuse)
    with pytest.raises(ModelError, match=r"'owner/name' is neither a local folder nor .* cannot be reached"):
        load_model(ModelConfig("owner/name"))


def test_devices_and_options_that_are_missing(tmp_path, monkeypatch):
    path = saved(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="device 'cuda' was asked for, but torch finds none here"):
        load_model(ModelConfig(path, device="cuda"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="needs bitsandbytes"):
        load_model(ModelConfig(path, quantization="4bit"))
    with pytest.raises(ModelError, match="no_such_kernel"):
        load_model(ModelConfig(path, attention="no_such_kernel"))


def test_the_attention_kernel_can_be_chosen(tmp_path):
    path = saved(tmp_path)
    for name in ("eager", "sdpa"):
        assert load_model(ModelConfig(path, attention=name)).model.config._attn_implementation == name


def test_a_tokenizer_comes_without_the_weights(tmp_path):
    path = saved(tmp_path)
    tokenizer, context = load_tokenizer(ModelConfig(path))
    assert (tokenizer.name_or_path, tokenizer.pad_token_id, context) == (path, 0, CONTEXT)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="has no chat template"):
        load_tokenizer(ModelConfig(path))


def test_the_lab_loads_as_fp32():
    loaded = load_model(ModelConfig())
    assert loaded.model.dtype == torch.float32 and loaded.model.name_or_path == "lab"
    assert 2e6 < loaded.model.num_parameters() < 5e6
