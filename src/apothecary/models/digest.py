"""Content digests of models, without torch: what a stage's key and a manifest say about the weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from apothecary.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from apothecary.models.settings import ModelConfig

LAB = "lab"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "vocab.json",
              "merges.txt", "added_tokens.json", "chat_template.jinja", "generation_config.json")  # fmt: skip
_COMMIT = re.compile("[0-9a-f]{40}")


def is_local(path: str) -> bool:
    """True for the lab, an existing folder, and whatever is written like a path rather than like `owner/name`."""
    written = path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path
    return path == LAB or written or Path(path).is_dir()


def resolve(config: ModelConfig) -> str:
    """The folder of a local model, or the hub id itself."""
    if config.path == LAB:
        folder = Path(str(files("apothecary.lab") / "model"))
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"the embedded model is missing from this installation ({folder}); install apothecary again"
            )
        return str(folder)
    return str(Path(config.path).expanduser()) if is_local(config.path) else config.path


def folder_digest(folder: Path) -> str:
    """sha256 over the safetensors files, configuration and tokenizer files of a model or adapter folder."""
    names = ("config.json", "adapter_config.json", *_TOKENIZER)
    found = sorted([*folder.glob("*.safetensors"), *(folder / name for name in names if (folder / name).is_file())])
    if not any(path.suffix == ".safetensors" for path in found):
        raise ModelError(f"'{folder}' has no *.safetensors file, expected a folder with weights; check the path")
    state = hashlib.sha256()
    for path in found:
        with path.open("rb") as file:
            state.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return state.hexdigest()


def weights_digest(config: ModelConfig) -> str:
    """What the weights and the tokenizer of `config` are, as sha256: file contents, or the commit of a hub id.

    Adapter and chat template are part of it.  Raises ModelError for a hub id that names no commit while offline.
    """
    base = folder_digest(Path(resolve(config))) if is_local(config.path) else f"{config.path}@{commit(config)}"
    state = hashlib.sha256(base.encode())
    if config.adapter is not None:
        state.update(folder_digest(Path(config.adapter)).encode())
    if config.chat_template is not None:
        try:
            state.update(Path(config.chat_template).read_bytes())
        except OSError as error:
            raise ModelError(f"chat_template '{config.chat_template}' cannot be read ({error})") from error
    return state.hexdigest()


def pin(config: ModelConfig) -> tuple[str, bool]:
    """(commit of a hub id, whether the hub answered): from the hub, else from its local cache, else the revision.

    Asked before anything is downloaded, so that a machine without network learns it at once, not after retries.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    at = f" at revision '{config.revision}'" if config.revision else ""
    try:
        return str(HfApi().model_info(config.path, revision=config.revision, timeout=10).sha), True
    except HFValidationError as error:
        raise ModelError(
            f"'{config.path}' is neither an existing folder nor a hub id (owner/name); check it"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ModelError(
            f"the hub has no model '{config.path}'{at}, or not for you; check the name or log in"
        ) from error
    except Exception as error:  # no network: httpx and huggingface_hub each raise their own
        cached = try_to_load_from_cache(config.path, "config.json", revision=config.revision)
        if isinstance(cached, str):
            return Path(cached).parent.name, False
        if config.revision:
            return config.revision, False
        raise ModelError(
            f"model '{config.path}' is neither a local folder nor in the hub's local cache, and the hub cannot be "
            "reached; connect, or give a local folder"
        ) from error


def commit(config: ModelConfig) -> str:
    """The commit of a hub id; no network is needed where the revision is one."""
    return config.revision if config.revision and _COMMIT.fullmatch(config.revision) else pin(config)[0]


def tensors_digest(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, dtypes, shapes and bytes of named tensors, in the order of their names."""
    import torch

    state = hashlib.sha256()
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    for name, tensor in sorted(pairs, key=lambda pair: pair[0]):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        state.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return state.hexdigest()
