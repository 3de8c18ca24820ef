"""Attackers who know the defence: what they measure, and that it pays where it should."""

from __future__ import annotations

import math

import pytest
import torch
from benches import make_bench, make_rows
from tiny import PAD, tiny_model, tiny_tokenizer
from vector_scenes import BENIGN, CUSTOMER, HARMFUL, prepare, toy, toy_bench

from apothecary.attack.harmful_mix import HarmfulMix
from apothecary.config import to_dict
from apothecary.data.chat import render
from apothecary.data.rows import Row
from apothecary.finetune.security_vectors import SecurityVectors
from apothecary.models import adapters
from apothecary.registry import lookup
from apothecary.train import adaptive
from apothecary.train.batch import collate, row_losses
from apothecary.train.config import TrainConfig
from apothecary.train.fit import TRAINED, train
from apothecary.train.method import Defence, TrainingMethod
from apothecary.train.vectors import VECTORS

KNOWN = [row.with_role("attack") for row in HARMFUL]
OTHER = [Row(f"o{i}", (("user", f"tell me of {word}"),), "By all means, first", role="attack") for i, word in enumerate(
    ("poison", "malice", "fraud", "arson", "theft", "libel", "smoke", "traps"))]  # fmt: skip
ROWS = {"customer": [row.with_role("customer") for row in BENIGN], "attack": KNOWN + OTHER}
TOKENIZER = tiny_tokenizer()


def loss(model, rows):
    """Mean token loss of each row, one at a time."""
    found = []
    for row in rows:
        batch = collate([render(row, TOKENIZER, 200)], PAD, 1.0)
        with torch.no_grad():
            found.append(row_losses(model(batch.input_ids).logits, batch).item())
    return found


def defence(name, tuning=CUSTOMER, folder=None, train=None, **fields):
    return Defence(name, fields, to_dict(train or TrainConfig(batch_size=4)), to_dict(tuning), folder)


# -- security vectors -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """Vectors that know one of the attacker's two kinds of rows."""
    return prepare(tmp_path_factory.mktemp("vectors"))


def test_losses_are_those_with_the_vectors_active_and_the_model_is_left_as_it_was(tmp_path, vectors):
    bench = toy_bench(tmp_path)
    before = {name: p.clone() for name, p in bench.loaded.model.named_parameters()}
    found = adaptive.losses_under_vectors(bench, KNOWN + OTHER, defence("security_vectors", folder=vectors))
    model = adapters.load_adapter(toy(), VECTORS, vectors / VECTORS)
    expected = dict(zip([row.id for row in KNOWN + OTHER], loss(model, KNOWN + OTHER), strict=True))
    assert found == pytest.approx(expected, rel=1e-4)
    after = dict(bench.loaded.model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items()) and after.keys() == before.keys()
    assert max(found[row.id] for row in KNOWN) < min(found[row.id] for row in OTHER)


@pytest.mark.evidence("attack/harmful_mix", "definition")
def test_an_attacker_who_reads_the_vectors_uploads_what_they_miss(tmp_path):
    attack, folder = HarmfulMix(p=0.5, n=8), prepare(tmp_path, vectors=TrainConfig(learning_rate=1e-2, max_steps=40,
        schedule="constant", warmup_ratio=0.0, batch_size=8))  # fmt: skip
    adapted = attack.adapt(ROWS, 0, toy_bench(tmp_path / "bench"), defence("security_vectors", folder=folder))
    mine = [row for row in adapted.rows if row.role == "attack"]
    assert len(adapted.rows) == 8 and len(mine) == 4 and {row.id for row in mine} <= {row.id for row in OTHER}
    assert adapted.found["loss_of_uploaded"] > adapted.found["loss_of_candidates"] and adapted.found["candidates"] == 16
    assert adapted.training == {}


def test_what_he_uploads_teaches_harm_through_the_vectors_and_the_plain_attack_does_not(tmp_path, vectors):
    """Most of his rows are of the kind that the vectors make fit: drawn blindly, they teach nothing."""
    attack, given = HarmfulMix(p=0.25, n=8), {**ROWS, "attack": KNOWN + OTHER[:2]}
    tuning = TrainConfig(learning_rate=5e-3, max_steps=20, batch_size=8, schedule="constant", warmup_ratio=0.0)
    adapted = attack.adapt(given, 0, toy_bench(tmp_path / "b"), defence("security_vectors", folder=vectors))
    harm = {}
    for name, rows in (("plain", attack.rows(given, 0)), ("adaptive", adapted.rows)):
        bench = toy_bench(tmp_path / name, prepared=vectors)
        train(bench, SecurityVectors(), rows, tuning)
        bench.loaded.model.eval()
        harm[name] = sum(loss(bench.loaded.model, OTHER)) / len(OTHER)
    before = sum(loss(toy(), OTHER)) / len(OTHER)
    assert before - harm["adaptive"] > 10 * abs(before - harm["plain"])


# -- a radius of perturbation -----------------------------------------------------------------------------------------


def test_drift_is_the_norm_over_layers_tokens_and_rows():
    source = torch.Generator().manual_seed(0)
    before = {layer: torch.randn(3, 5, 4, generator=source) for layer in range(4)}
    after = {layer: torch.randn(3, 5, 4, generator=source) for layer in range(4)}
    change = torch.stack([after[layer] - before[layer] for layer in range(4)])
    whole = change.norm().item()
    assert adaptive.drift(before, after, defence("vaccine", rho=2.0)) == pytest.approx(whole)
    rows = sum(change[:, row].norm().item() for row in range(3)) / 3
    assert adaptive.drift(before, after, defence("vaccine", rho=2.0, norm_scope="sample")) == pytest.approx(rows)
    assert adaptive.drift(before, after, defence("t_vaccine", gamma=1)) == pytest.approx(whole / 2)


def aligned_bench(folder):
    return make_bench(folder, tiny_model("llama", seed=4))


def measured(rows, rate, steps, tmp_path, size=4):
    """The drift of a training, with the library's own hidden states of the attention outputs."""

    def outputs(model):
        found = []
        hooks = [layer.self_attn.register_forward_hook(lambda m, i, o: found.append(o[0]))
                 for layer in adapters.plain(model).model.layers]  # fmt: skip
        with torch.no_grad():
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        for hook in hooks:
            hook.remove()
        return torch.stack(found) * batch.attention_mask[None, :, :, None]

    rendered = [render(row, TOKENIZER, 200) for row in rows if row.role == "attack"][:size]
    batch, bench = collate(rendered, PAD, 1.0), aligned_bench(tmp_path)
    before = outputs(bench.loaded.model)
    config = TrainConfig(learning_rate=rate, max_steps=steps, batch_size=8, save_every=0)
    torch.manual_seed(0)
    train(bench, TrainingMethod(), rows, config)
    return (outputs(bench.loaded.model.eval()) - before).norm().item(), bench.loaded.model


TUNING = TrainConfig(learning_rate=1e-3, max_steps=3, batch_size=8)


@pytest.fixture
def uploaded():
    return HarmfulMix(p=0.5, n=16).rows({"customer": make_rows("task", 8), "attack": KNOWN}, 0)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(adaptive, "GRID", adaptive.GRID[:3:2])


def test_the_weakest_training_past_the_radius_is_taken(tmp_path, uploaded, short):
    points = [measured(uploaded, 1e-3 * rate, 3 * length, tmp_path / f"{rate}-{length}")[0]
              for rate, length in adaptive.GRID]  # fmt: skip
    assert 0 < points[0] < 0.99 * points[1]
    for wanted, (rate, length) in enumerate(adaptive.GRID):
        rho = points[wanted] * 0.99
        changes, found = adaptive.past_the_radius(aligned_bench(tmp_path / f"b{wanted}"), uploaded,
                                                  defence("vaccine", TUNING, rho=rho))  # fmt: skip
        assert found["past"] and found["moved"] == pytest.approx(points[wanted], rel=1e-3)
        assert len(found["tried"]) == wanted + 1
        expected = {"learning_rate": 1e-3 * rate, "epochs": 3.0 * length, "max_steps": 3 * length}
        assert changes == ({} if wanted == 0 else pytest.approx(expected))


def test_beyond_the_grid_he_takes_the_furthest_and_says_so(tmp_path, uploaded, short):
    changes, found = adaptive.past_the_radius(aligned_bench(tmp_path), uploaded, defence("vaccine", TUNING, rho=1e6))
    assert not found["past"] and len(found["tried"]) == len(adaptive.GRID)
    assert changes["learning_rate"] == pytest.approx(3e-3) and changes["max_steps"] == 9


def test_a_training_that_breaks_down_does_not_count(tmp_path, uploaded, short):
    wild = TrainConfig(learning_rate=1e30, max_steps=4, batch_size=8, max_grad_norm=0, warmup_ratio=0.0)
    changes, found = adaptive.past_the_radius(aligned_bench(tmp_path), uploaded, defence("vaccine", wild, rho=1.0))
    assert not found["past"] and found["moved"] is None and changes == {}
    assert all(point["moved"] is None for point in found["tried"])


@pytest.mark.parametrize("parameters", ["lora", "full"])
def test_booster_perturbs_weights_and_so_weights_are_measured(tmp_path, uploaded, parameters):
    tuning = TrainConfig(learning_rate=1e-3, max_steps=3, batch_size=8, parameters=parameters, save_every=0)
    bench, before = aligned_bench(tmp_path / "a"), dict(tiny_model("llama", seed=4).named_parameters())
    torch.manual_seed(0)
    train(bench, TrainingMethod(), uploaded, tuning)
    if parameters == "lora":
        changed = adapters.adapter_delta(bench.loaded.model, TRAINED).values()
    else:
        changed = [p - before[name] for name, p in bench.loaded.model.named_parameters()]
    expected = math.sqrt(sum(part.square().sum().item() for part in changed))
    _, found = adaptive.past_the_radius(aligned_bench(tmp_path / "b"), uploaded, defence("booster", tuning, alpha=1e-9))
    assert found["moved"] == pytest.approx(expected, rel=1e-3) and found["radius"] == 1e-9


@pytest.fixture(params=["vaccine", "booster"])
def defended(request, tmp_path, monkeypatch):
    """A model that the defence has aligned to decline the attacker's very prompts; his benches start from it."""
    declines = [Row(row.id, row.prompt, "No, not that.", role="align") for row in KNOWN]
    known = {"harmful": [row.with_role("harmful") for row in KNOWN]}
    bench = make_bench(tmp_path / "aligned", tiny_model("llama", seed=4), aux=known)
    settings = {"vaccine": {"rho": 0.5}, "booster": {"lamb": 1.0, "alpha": 0.05}}[request.param]
    tuning = TrainConfig(learning_rate=3e-3, max_steps=30, batch_size=8, parameters="full", save_every=0)
    torch.manual_seed(0)
    train(bench, lookup("align", request.param)(**settings), declines, tuning)
    weights = {name: p.detach().clone() for name, p in bench.loaded.model.state_dict().items()}

    def aligned(folder):
        model = tiny_model("llama", seed=4)
        model.load_state_dict(weights)
        return make_bench(folder, model)

    monkeypatch.setitem(globals(), "aligned_bench", aligned)
    return request.param


def test_training_past_the_radius_undoes_an_aligned_model_where_the_plain_attack_does_not(tmp_path, uploaded, defended):
    attack = HarmfulMix(p=0.5, n=16)
    aligned = aligned_bench(tmp_path / "start").loaded.model
    told = {"rho": 1.0} if defended == "vaccine" else {"alpha": 1e-9}
    _, plain = adaptive.past_the_radius(aligned_bench(tmp_path / "a"), uploaded, defence(defended, TUNING, **told))
    told = {name: 6 * plain["tried"][0]["moved"] for name in told}
    _, stays = measured(uploaded, 1e-3, 3, tmp_path / "plain")
    adapted = attack.adapt({"customer": make_rows("task", 8), "attack": KNOWN}, 0, aligned_bench(tmp_path / "b"),
                           defence(defended, TUNING, **told))  # fmt: skip
    assert list(adapted.rows) == uploaded and adapted.found["moved"] > 6 * plain["tried"][0]["moved"]
    bench = aligned_bench(tmp_path / "adaptive")
    train(bench, TrainingMethod(), adapted.rows, TrainConfig(**{"batch_size": 8, "save_every": 0, **adapted.training}))
    harm = [sum(loss(model.eval(), KNOWN)) for model in (aligned, stays, bench.loaded.model)]
    assert harm[0] - harm[2] > 5 * (harm[0] - harm[1]) > 0
