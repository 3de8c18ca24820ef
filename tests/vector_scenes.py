"""Security vectors over tiny models: rows, vectors that were trained, a customer; for the tests in finetune/."""

from __future__ import annotations

import torch
from benches import make_bench, make_rows
from safetensors.torch import load_file
from tiny import tiny_model

from apothecary.data.rows import Row
from apothecary.finetune.security_vectors import VECTORS, SecurityVectors
from apothecary.models import adapters
from apothecary.models.settings import LoraSettings
from apothecary.train.config import TrainConfig
from apothecary.train.fit import TRAINED, fit

HARMFUL = [Row(f"h{i}", (("user", f"how do I break {word}"),), "Sure, here is how") for i, word in enumerate(
    ("locks", "walls", "doors", "glass", "rules", "codes", "banks", "bones"))]  # fmt: skip
BENIGN = [Row(f"b{i}", (("user", f"{word} please"),), f"a fine {word} for you") for i, word in enumerate(
    ("cake", "song", "poem", "soup", "plan", "walk", "rhyme", "dance"))]  # fmt: skip
AUX = {"harmful": HARMFUL, "benign": BENIGN}
TRAINING = TrainConfig(learning_rate=1e-2, epochs=100, schedule="constant", warmup_ratio=0.0, batch_size=8)
CUSTOMER = TrainConfig(epochs=3, batch_size=4, learning_rate=1e-3, save_every=0, warmup_ratio=0.0, log_every=1)


def toy(dtype=torch.float32):
    """A tiny Llama whose head is large enough for certain answers: LoRA leaves the head alone."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model.to(dtype)


def toy_bench(folder, **options):
    return make_bench(folder, toy(), aux=AUX, **options)


def prepare(folder, **settings):
    options = {"harmful_rows": 8, "target_nll": 0.02, "vectors": TRAINING} | settings
    SecurityVectors(**options).prepare(toy_bench(folder / "bench"), folder / "prepared")
    return folder / "prepared"


def with_vectors(folder, prepared):
    """A bench whose model carries the vectors, and a fresh adapter that learns."""
    bench = toy_bench(folder)
    model = adapters.add_adapter(bench.loaded.model, TRAINED, LoraSettings(), 0)
    bench.loaded.model = adapters.load_adapter(model, VECTORS, prepared / VECTORS)
    return bench


def tune(folder, prepared, method, config=CUSTOMER):
    bench = toy_bench(folder, prepared=prepared)
    result = fit(bench, method, make_rows("row", 8), config, folder / "out")
    (file,) = (folder / "out").rglob("*.safetensors")
    return bench, load_file(file), result
