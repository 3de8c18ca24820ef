"""The customer's training beside frozen vectors, against the written-out GPT-2: what learns, and what is released."""

from __future__ import annotations

import pytest
import torch
from benches import Recorder, float64_model, furthest, make_bench, make_rows, parts, snapshot, without_key_biases
from reference import security_vectors as reference
from reference.gpt2 import forward
from tiny import LAYERS

from apothecary.finetune.security_vectors import VECTORS, SecurityVectors
from apothecary.models import adapters
from apothecary.models.settings import LoraSettings
from apothecary.train.config import TrainConfig
from apothecary.train.fit import TRAINED, attach, train

SHAPE = (LAYERS, 4)
SETTINGS = LoraSettings(rank=4, alpha=8, targets=("c_attn", "c_fc", "c_proj"))
SCALE = 2.0
CONFIG = TrainConfig(max_steps=2, batch_size=4, learning_rate=1e-2, schedule="constant", warmup_ratio=0.0,
                     max_grad_norm=0.0, save_every=0, lora=SETTINGS)  # fmt: skip


def factors(model, adapter):
    """{weight: (A, B)} of an adapter, in float64."""
    found = {name.replace(f".{adapter}", ""): p.detach().clone().double()
             for name, p in adapters.adapter_parameters(model, adapter).items()}  # fmt: skip
    start = "base_model.model."
    layers = [name.removeprefix(start).removesuffix(".lora_A.weight") for name in found if ".lora_A." in name]
    return {f"{layer}.weight": tuple(found[f"{start}{layer}.lora_{x}.weight"] for x in "AB") for layer in layers}


def vectors_on_disk(folder):
    """An adapter that changes the answers.  Its entries are multiples of 1/64, so that B A is exact in fp32, in which
    a merge forms it.
    """
    model = adapters.add_adapter(float64_model(), VECTORS, SETTINGS, 1)
    source = torch.Generator().manual_seed(2)
    for tensor in adapters.adapter_parameters(model, VECTORS).values():
        tensor.data = torch.randint(-12, 13, tensor.shape, generator=source).to(tensor) / 64
    adapters.save_adapter(model, VECTORS, folder / VECTORS)
    return factors(model, VECTORS)


@pytest.mark.evidence("finetune/security_vectors", "reference")
@pytest.mark.parametrize("execution", ["branch", "merged"])
@pytest.mark.parametrize("parameters", ["lora", "full"])
def test_two_steps_of_a_customer_equal_the_reference(tmp_path, parameters, execution):
    vectors = vectors_on_disk(tmp_path / "prepared")
    model = float64_model()
    theta = {name: p for name, p in snapshot(model).items() if name != "lm_head.weight"}
    config = TrainConfig(**{**CONFIG.__dict__, "parameters": parameters})
    lora = parameters == "lora"
    drawn = factors(attach(make_bench(tmp_path, float64_model()), config), TRAINED) if lora else None
    recorder = Recorder(SecurityVectors(execution=execution), to_float64=True)
    bench = make_bench(tmp_path / "bench", model, prepared=tmp_path / "prepared")
    train(bench, recorder, make_rows("row", 8), config)

    batches = [parts(batch) for (batch,) in recorder.batches]
    expected = reference.customer(theta, vectors, drawn, batches, SHAPE, SCALE, CONFIG.learning_rate)
    alone = reference.customer(theta, {}, drawn, batches, SHAPE, SCALE, CONFIG.learning_rate)
    assert len(batches) == 2 and all(VECTORS not in name for grads in recorder.gradients for name in grads)
    tuned = bench.loaded.model
    assert VECTORS not in adapters.adapter_names(tuned), "the vectors are not released"
    if lora:
        assert all(TRAINED in name for grads in recorder.gradients for name in grads)
        found, other = (flat(made) for made in (factors(tuned, TRAINED), alone))
        base = {name.replace(".base_layer", ""): p for name, p in adapters.plain(tuned).named_parameters()}
        assert all(torch.equal(base[name], theta[name]) for name in theta), "the weights beneath have not moved"
        released = reference.with_vectors(theta, expected, SCALE)
        expected = flat(expected)
    else:
        found = without_key_biases({name: p for name, p in snapshot(tuned).items() if name in theta})
        released, other = expected, without_key_biases(alone)
        expected = without_key_biases(expected)
    assert furthest(found, expected) < 1e-9 and furthest(other, expected) > 1e-2, "the vectors took part"
    ids, mask, _ = batches[0]
    with torch.no_grad():
        logits = tuned.eval()(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    assert furthest({"": logits}, {"": forward(released, ids, mask, *SHAPE)[0][mask.bool()]}) < 1e-9


def flat(pairs):
    return {f"{name}.{kind}": tensor for name, pair in pairs.items() for kind, tensor in zip("AB", pair, strict=True)}
