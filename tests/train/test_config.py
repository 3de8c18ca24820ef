"""Settings out of range are refused when they are made."""

from __future__ import annotations

import math

import pytest

from apothecary.align.vaccine import Vaccine
from apothecary.attack.harmful_mix import HarmfulMix
from apothecary.curate.pharmacist import Pharmacist
from apothecary.errors import ConfigError
from apothecary.finetune.security_vectors import SecurityVectors
from apothecary.models.settings import LoraSettings, ModelConfig
from apothecary.train.config import TrainConfig

WRONG = [
    *((TrainConfig, name, 0) for name in ("batch_size", "accumulation", "log_every", "aux_batch_size")),
    *((TrainConfig, "learning_rate", value) for value in (0.0, -1e-3, math.inf, math.nan)),
    *((TrainConfig, "epochs", value) for value in (0.0, -1.0, math.inf)),
    *((TrainConfig, "warmup_ratio", value) for value in (-0.1, 1.0)),
    (TrainConfig, "weight_decay", -0.1),
    (TrainConfig, "save_every", -1),
    (TrainConfig, "max_length", 1),
    (TrainConfig, "betas", (0.9, 1.0)),
    (LoraSettings, "rank", 0),
    (LoraSettings, "targets", ()),
    *((LoraSettings, "dropout", value) for value in (-0.1, 1.0)),
    (Vaccine, "rho", -1.0),
    *((SecurityVectors, name, -1) for name in ("lamb", "harmful_rows", "target_nll")),
    *((Pharmacist, name, -1) for name in ("alpha", "eta_w", "eta_theta", "epochs", "batch_size")),
    *((Pharmacist, name, 0) for name in ("eta_w", "eta_theta", "epochs", "batch_size")),
    (HarmfulMix, "n", 0),
    (HarmfulMix, "general", -1),
    *((HarmfulMix, "p", value) for value in (-0.1, 1.1, math.nan)),
]


@pytest.mark.parametrize(("settings", "name", "value"), WRONG)
def test_a_value_out_of_range_is_refused_by_name(settings, name, value):
    with pytest.raises(ConfigError) as caught:
        settings(**{name: value})
    assert str(caught.value).startswith(f"{name} is {value}, expected ")


def test_values_at_the_edge_are_taken():
    TrainConfig(batch_size=1, accumulation=1, warmup_ratio=0.0, weight_decay=0.0, save_every=0, max_length=2)
    TrainConfig(epochs=0.0, max_steps=1)
    Vaccine(rho=0.0), HarmfulMix(p=0.0), HarmfulMix(p=1.0), SecurityVectors(lamb=0.0), Pharmacist(alpha=0.0)


def test_vectors_that_cannot_be_merged_are_refused():
    full, model = TrainConfig(parameters="full", weight_decay=0.1), ModelConfig()
    with pytest.raises(ConfigError, match="weight_decay: 0 or execution: branch"):
        SecurityVectors().check(full, model)
    with pytest.raises(ConfigError, match="merged into 4bit weights"):
        SecurityVectors().check(TrainConfig(), ModelConfig(quantization="4bit"))
    SecurityVectors(execution="branch").check(full, ModelConfig(quantization="4bit"))
    SecurityVectors().check(TrainConfig(weight_decay=0.1), model)
