"""LoRA adapters on one model: several at a time, each on or off, learning or frozen (PEFT underneath).

PEFT marks every active adapter trainable; `activate` is the one place that decides what learns, and it checks.
A PeftModel wraps the Hugging Face model in place: `plain` gives that model with whatever adapters are attached,
`remove_adapter` takes the last wrapper off again.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from apothecary.errors import ModelError, did_you_mean
from apothecary.models.settings import ALL_LINEAR, ATTENTION, LoraSettings

__all__ = [
    "LoraSettings",
    "activate",
    "active_adapters",
    "adapter_delta",
    "adapter_names",
    "adapter_parameters",
    "add_adapter",
    "base_parameters",
    "load_adapter",
    "merge_adapters",
    "plain",
    "remove_adapter",
    "save_adapter",
    "trainable_adapters",
]

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def plain(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model itself: `model`, or what a PeftModel wraps.

    The same object, not a copy: adapters that are attached stay inside its linear layers and keep acting as
    `activate` left them.  Without adapters its modules and parameter names are those of the original model.
    """
    return _tuner(model).model if isinstance(model, PeftModel) else cast(PreTrainedModel, model)


def _tuner(model: PeftModel) -> Any:
    """PEFT's LoraModel, which sits between the PeftModel and the Hugging Face model."""
    return model.base_model


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the attached adapters, in the order of attaching."""
    return list(model.peft_config) if isinstance(model, PeftModel) else []


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The tensors of one adapter by their names in `model.named_parameters()`."""
    return {key: value for key, value in model.named_parameters() if f".{name}." in f"{key}."}


def base_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The tensors that belong to no adapter."""
    own = {id(tensor) for tensors in _tensors(model).values() for tensor in tensors}
    return [parameter for parameter in model.parameters() if id(parameter) not in own]


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that take part in the forward pass."""
    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    return [] if layer is None or layer.disable_adapters else list(layer.active_adapters)


def trainable_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that learn."""
    return [name for name, tensors in _tensors(model).items() if any(tensor.requires_grad for tensor in tensors)]


def _tensors(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The tensors of each adapter, in one pass over the model."""
    found: dict[str, list[nn.Parameter]] = {name: [] for name in adapter_names(model)}
    for key, parameter in model.named_parameters() if found else ():
        for name in found.keys() & set(key.split(".")):
            found[name].append(parameter)
    return found


def activate(model: nn.Module, active: Sequence[str], trainable: Sequence[str] = ()) -> None:
    """Let exactly `active` take part in the forward pass and exactly `trainable`, a part of them, learn.

    `active=()` gives the base model bit for bit.  `requires_grad` of base weights is not touched.  Raises ModelError
    for an unknown adapter or one that should learn while inactive.
    """
    known, active, trainable = adapter_names(model), list(dict.fromkeys(active)), list(dict.fromkeys(trainable))
    for name in (*active, *trainable):
        if name not in known:
            raise ModelError(f"the model has no adapter '{name}'; {did_you_mean(name, known)}")
    idle = sorted(set(trainable) - set(active))
    if idle:
        raise ModelError(f"adapter '{idle[0]}' cannot learn while inactive; name it among the active ones too")
    if not isinstance(model, PeftModel):
        return
    if active:
        model.active_adapter = active[0]  # PeftModel reads one configuration here; LoraModel holds the whole list
        _tuner(model).set_adapter(active)
        _tuner(model).enable_adapter_layers()
    else:
        _tuner(model).disable_adapter_layers()
    tensors = _tensors(model)
    for name, parameters in tensors.items():
        for parameter in parameters:
            parameter.requires_grad_(name in trainable)
    frozen = all(p.requires_grad == (name in trainable) for name, parameters in tensors.items() for p in parameters)
    if active_adapters(model) != active or not frozen:
        raise AssertionError(f"adapters {active_adapters(model)} are active, expected {active}, {trainable} learning")


def _attach(model: nn.Module, name: str, config: PeftConfig, seed: int) -> PeftModel:
    """Attach a fresh adapter, drawn from its own random stream, in the mode (training or not) of the base.

    What was there before keeps its `requires_grad`; which adapters are active is for `activate` to say.
    """
    base = plain(model)
    if name in adapter_names(model):
        raise ModelError(f"the model already has an adapter '{name}'; remove it first or choose another name")
    parts = {part for key, _ in base.named_modules() for part in key.split(".")} | {"base_layer"}
    if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name) or name in parts or name.startswith("lora") or name in "lora_":
        raise ModelError(
            f"'{name}' cannot name an adapter; expected letters, digits and underscores, not 'lora', no module's name"
        )
    known = {id(module) for module in model.modules()}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # PEFT asks transformers
            warnings.filterwarnings("ignore", ".*base_model_name_or_path.*")  # `lab` and its folder are one model
            torch.default_generator.manual_seed(seed)  # LoRA is drawn on the CPU; torch.manual_seed resets GPUs too
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
                wrapped = model
            else:
                wrapped = cast(PeftModel, get_peft_model(base, config, adapter_name=name))
    except ValueError as error:
        if not isinstance(model, PeftModel) and hasattr(base, "peft_config"):
            del base.peft_config
        raise ModelError(
            f"this adapter does not fit {type(base).__name__} ({str(error).splitlines()[0]}); name linear layers of "
            f"the model as targets, or use '{ALL_LINEAR}'"
        ) from error
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    for module in wrapped.modules():
        if id(module) not in known:
            module.training = base.training
    return wrapped


def _targets(model: nn.Module, targets: str | tuple[str, ...]) -> str | list[str]:
    """What PEFT takes for `LoraSettings.targets`."""
    if targets == ATTENTION:
        from apothecary.models.anatomy import attention_linears  # it builds on this module

        return attention_linears(model)
    return targets if isinstance(targets, str) else list(targets)


def add_adapter(model: nn.Module, name: str, settings: LoraSettings, seed: int) -> PeftModel:
    """Attach a fresh adapter that changes nothing yet (B = 0, A drawn from `seed`): active on top of those that are.

    The new adapter learns; other adapters stay active and learning as they were; base weights are frozen.  Its
    tensors are fp32 even over a half-precision base.  A plain model is wrapped in place.
    """
    active, trainable = active_adapters(model), trainable_adapters(model)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        target_modules=_targets(model, settings.targets),
        lora_dropout=settings.dropout,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in plain(model).modules()),
        task_type="CAUSAL_LM",
    )
    wrapped = _attach(model, name, config, seed)
    wrapped.requires_grad_(False)
    activate(wrapped, [*active, name], [*trainable, name])
    return wrapped


def _read(folder: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise ModelError(
                f"'{folder}' has no {file}, expected a PEFT adapter folder with {CONFIG} and {WEIGHTS}; "
                "check the path, or save the adapter as safetensors"
            )
    try:
        config = PeftConfig.from_pretrained(str(folder))
        state = load_file(folder / WEIGHTS)
    except Exception as error:  # json, safetensors and peft each raise their own
        raise ModelError(f"the adapter in '{folder}' cannot be read ({error}); save it again") from error
    if not isinstance(config, LoraConfig):
        raise ModelError(f"'{folder}' holds a {config.peft_type} adapter, expected LORA; convert or merge it first")
    return config, state


def load_adapter(model: nn.Module, name: str, folder: Path) -> PeftModel:
    """Attach the adapter of a PEFT folder under `name`: active on top of those that are, frozen.

    What learns stays as it was, base weights included.  Raises ModelError where the folder is not a LoRA adapter in
    safetensors or does not fit the model.
    """
    config, state = _read(Path(folder))
    active, trainable = active_adapters(model), trainable_adapters(model)
    wrapped = _attach(model, name, config, seed=0)
    try:
        result = set_peft_model_state_dict(wrapped, state, adapter_name=name)
        missing = sorted(set(adapter_parameters(wrapped, name)) & set(result.missing_keys))
        unexpected, problem = list(result.unexpected_keys), ""
    except (RuntimeError, KeyError) as error:  # sizes differ
        missing, unexpected, problem = [], [], str(error).splitlines()[-1].strip()
    if missing or unexpected or problem:
        remove_adapter(wrapped, name)
        problem = problem or f"{len(missing)} tensors missing, {len(unexpected)} unknown: {(missing + unexpected)[0]}"
        raise ModelError(f"the adapter in '{folder}' was made for another model ({problem}); use its base model")
    activate(wrapped, [*active, name], trainable)
    return wrapped


def save_adapter(model: nn.Module, name: str, folder: Path) -> None:
    """Write one adapter as a standard PEFT folder: its configuration and its tensors, nothing of other adapters.

    Raises ModelError while another adapter is merged into the weights for a while.
    """
    from apothecary.models.merging import refuse_merged  # it builds on this module

    refuse_merged(model)
    if not isinstance(model, PeftModel) or name not in model.peft_config:
        raise ModelError(f"the model has no adapter '{name}' to save; {did_you_mean(name, adapter_names(model))}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    save_file(
        {key: value.detach().cpu().contiguous() for key, value in state.items()}, folder / WEIGHTS, {"format": "pt"}
    )
    config = model.peft_config[name].to_dict()
    config.update({key: sorted(value) for key, value in config.items() if isinstance(value, set)})  # a stable digest
    config["inference_mode"] = True
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n", "utf-8")


def adapter_delta(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What the adapter adds to each weight, s B A, by the parameter's name in the plain model.

    Shapes are the weights' own (transposed for GPT-2's Conv1D); at least fp32.
    """
    if name not in adapter_names(model):
        raise ModelError(f"the model has no adapter '{name}'; {did_you_mean(name, adapter_names(model))}")
    deltas = {}
    for key, layer in plain(model).named_modules():
        if not isinstance(layer, LoraLayer) or name not in layer.lora_A:
            continue
        if name in cast(dict, layer.lora_variant):
            raise ModelError(f"adapter '{name}' is not plain LoRA ({key}), so it has no delta s B A; merge it instead")
        a, b = (cast(Tensor, factors[name].weight).detach() for factors in (layer.lora_A, layer.lora_B))
        dtype = torch.promote_types(a.dtype, torch.float32)
        delta = (b.to(dtype) @ a.to(dtype)) * layer.scaling[name]
        deltas[f"{key}.weight"] = delta.T.contiguous() if getattr(layer, "fan_in_fan_out", False) else delta
    return deltas


def is_embedding(model: nn.Module, layer: nn.Module) -> bool:
    """Whether a layer is the input embedding or the output head."""
    base = plain(model)
    return layer in (base.get_input_embeddings(), base.get_output_embeddings())


def is_tied(model: nn.Module, layer: nn.Module) -> bool:
    """Whether a layer is an embedding whose weight is the other one's too, so that a merge would change both."""
    return is_embedding(model, layer) and plain(model).config.get_text_config().tie_word_embeddings


def remove_adapter(model: nn.Module, name: str) -> nn.Module:
    """Take one adapter off; return the model to go on with.

    While other adapters are left that is the PeftModel, with the others active and learning as they were.  With the
    last one the wrappers go too, and it is the plain Hugging Face model; the PeftModel must not be used again.
    """
    if not isinstance(model, PeftModel) or name not in model.peft_config:
        raise ModelError(f"the model has no adapter '{name}' to remove; {did_you_mean(name, adapter_names(model))}")
    active = [other for other in active_adapters(model) if other != name]
    trainable = [other for other in trainable_adapters(model) if other != name]
    if len(model.peft_config) == 1:
        return _tuner(model).unload()
    activate(model, [next(other for other in model.peft_config if other != name)])  # PEFT warns on losing an active one
    model.delete_adapter(name)
    activate(model, active, trainable)
    return model


@torch.no_grad()
def merge_adapters(model: nn.Module, folders: Sequence[Path]) -> PreTrainedModel:
    """Add the adapters of PEFT folders to the weights of a plain model, in order; return it without wrappers.

    Sums are formed in at least fp32 and rounded to the weight's dtype once, after the last adapter.
    """
    from apothecary.models.merging import refuse_merged  # it builds on this module

    refuse_merged(model)
    if adapter_names(model):
        raise ModelError("adapters can be merged only into a model without attached ones; remove them first")
    for index, folder in enumerate(folders):
        model = load_adapter(model, f"merge_{index}", folder)
    if not isinstance(model, PeftModel):
        return plain(model)
    names = adapter_names(model)
    for key, layer in plain(model).named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if is_tied(model, cast(nn.Module, layer)):
            raise ModelError(f"an adapter changes '{key}', which is tied to the other embedding; untie them to merge")
        linear: Any = layer.get_base_layer()
        dtype = linear.weight.dtype
        half = dtype in (torch.float16, torch.bfloat16)
        if half:
            linear.weight.data = linear.weight.data.float()
        layer.merge(adapter_names=[name for name in names if name in layer.lora_A])
        if half:
            linear.weight.data = linear.weight.data.to(dtype)
    return _tuner(model).unload()
