"""How a model is loaded and what its adapters look like: settings only, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from apothecary.errors import expect

ALL_LINEAR = "all-linear"  # every linear layer but the output head
ATTENTION = "attention"  # the linear layers inside attention blocks


@dataclass(frozen=True)
class ModelConfig:
    """A causal language model of the Hugging Face hub, of a local folder, or the embedded `lab`."""

    path: str = "lab"
    revision: str | None = None  # commit or tag of a hub id
    adapter: str | None = None  # folder of a PEFT adapter, merged after loading
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: float32 on a CPU, else the checkpoint's
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    device_map: str | None = None  # accelerate's placement over several devices
    quantization: Literal["4bit"] | None = None
    attention: str | None = None  # eager, sdpa, flash_attention_2
    chat_template: str | None = None  # file with a Jinja template, for models that bring none
    trust_remote_code: bool = False


@dataclass(frozen=True)
class LoraSettings:
    """A LoRA adapter (Hu et al. 2021, arXiv 2106.09685): the weight changes by alpha / rank * B A."""

    rank: int = 8  # >= 1
    alpha: float = 16.0
    targets: str | tuple[str, ...] = ALL_LINEAR  # all-linear, attention, or names of linear layers
    dropout: float = 0.0  # in [0, 1)

    def __post_init__(self) -> None:
        expect(self, "at least 1", lambda n: n >= 1, "rank")
        expect(self, "a share in [0, 1)", lambda x: 0 <= x < 1, "dropout")
        expect(self, "at least one layer, all-linear or attention", bool, "targets")

    @property
    def scale(self) -> float:
        """alpha / rank: learning rates do not transfer between scales (methods.md 1.3)."""
        return self.alpha / self.rank
