import hashlib
import json
import subprocess
import sys

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from apothecary.errors import ModelError
from apothecary.models.digest import commit, is_local, tensors_digest, weights_digest
from apothecary.models.settings import ModelConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_digest_follows_the_content_not_the_place(folder, tmp_path):
    first = weights_digest(ModelConfig(str(folder)))
    folder.rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    (moved / "README.md").write_text("not part of the model")
    assert weights_digest(ModelConfig(str(moved))) == first and len(first) == 64


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_every_part_counts(folder, name):
    before = weights_digest(ModelConfig(str(folder)))
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)
    assert weights_digest(ModelConfig(str(folder))) != before


def test_adapter_and_template_count(folder, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "template").write_text("{{ messages }}")
    configs = [
        ModelConfig(str(folder)),
        ModelConfig(str(folder), adapter=str(tmp_path / "adapter")),
        ModelConfig(str(folder), chat_template=str(tmp_path / "template")),
    ]
    assert len({weights_digest(config) for config in configs}) == 3


def test_missing_weights_are_an_error(tmp_path):
    with pytest.raises(ModelError, match=r"no \*\.safetensors file"):
        weights_digest(ModelConfig(str(tmp_path)))


def test_local_paths_are_told_from_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert all(is_local(path) for path in ("lab", "mine", "./x", "../x", "/x", "~/x", "a/b/c", str(tmp_path)))
    assert not any(is_local(path) for path in ("owner/name", "gpt2"))


def hub(monkeypatch, tmp_path, answer):
    """A hub that answers with a commit or raises, and an empty local cache."""
    from huggingface_hub import HfApi, constants

    def model_info(self, path, revision=None, timeout=None):
        if isinstance(answer, Exception):
            raise answer
        return type("Info", (), {"sha": answer})

    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def cache(tmp_path, monkeypatch, revision):
    """The local cache knows `owner/name` at `revision`."""
    repository = tmp_path / "cache" / "models--owner--name"
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    (repository / "snapshots" / COMMIT / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / revision).write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def test_hub_ids_are_known_by_their_commit(monkeypatch, tmp_path):
    hub(monkeypatch, tmp_path, COMMIT)
    digest = weights_digest(ModelConfig("owner/name"))
    assert digest == hashlib.sha256(f"owner/name@{COMMIT}".encode()).hexdigest()
    hub(monkeypatch, tmp_path, ConnectionError("no network"))
    assert weights_digest(ModelConfig("owner/name", revision=COMMIT)) == digest
    assert commit(ModelConfig("owner/name", revision="v1")) == "v1"
    with pytest.raises(ModelError, match="'owner/name' is neither a local folder nor in the hub's local cache"):
        weights_digest(ModelConfig("owner/name"))


def test_offline_the_local_cache_tells_the_commit(monkeypatch, tmp_path):
    hub(monkeypatch, tmp_path, ConnectionError("no network"))
    cache(tmp_path, monkeypatch, "main")
    assert commit(ModelConfig("owner/name")) == COMMIT


def test_a_name_that_cannot_be_a_hub_id():
    with pytest.raises(ModelError, match=r"neither an existing folder nor a hub id"):
        commit(ModelConfig("two words/and more"))


def test_tensor_digest_sees_names_types_shapes_and_bytes():
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, 2, dtype=torch.bfloat16), "c": torch.tensor(1.5)}
    digest = tensors_digest(tensors)
    assert digest == tensors_digest(reversed(list(tensors.items())))
    assert digest == tensors_digest(
        {"a": torch.arange(12.0).reshape(6, 2)[:, 0] / 2, **dict(list(tensors.items())[1:])}
    )
    changes = [
        {"a": torch.arange(6.0) + torch.tensor([0, 0, 0, 0, 0, 1e-6])},
        {"a": torch.arange(6.0).reshape(2, 3)},
        {"a": torch.arange(6.0).view(torch.int32)},
        {"d": torch.zeros(0)},
    ]
    assert len({digest, *(tensors_digest({**tensors, **change}) for change in changes)}) == 5


def test_no_torch_is_needed_for_weights(folder):
    code = (
        "import sys; from apothecary.models.digest import weights_digest; "
        "from apothecary.models.settings import ModelConfig; "
        f"print(weights_digest(ModelConfig({str(folder)!r}))); "
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
    assert output[:2] == [weights_digest(ModelConfig(str(folder))), "[]"]


def test_configuration_is_part_of_the_digest(folder):
    before = weights_digest(ModelConfig(str(folder)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert weights_digest(ModelConfig(str(folder))) != before
