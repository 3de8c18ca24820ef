"""The cost benchmark: it runs, counts what it says, and compares implementations of the same mathematics."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from apothecary.align.repnoise import RepNoise
from benchmarks import repnoise_leak, step_cost, tables
from benchmarks.configurations import CONFIGURATIONS, product
from benchmarks.memory import Allocations, SavedForBackward, memory_of
from benchmarks.reference import repnoise
from benchmarks.subjects import LAYOUTS, SHAPES, make_subject
from benchmarks.summary import measured, targets

TINY = SHAPES["tiny"]


def gradients(subject, opened):
    """The gradients of one step, with the same auxiliary rows and draws at every call."""
    subject.ctx.auxiliary.drawn.clear()
    subject.draws = count(1)
    subject.begin()
    with opened(subject) as passes:
        passes()
    found = {name: p.grad for name, p in subject.ctx.parameters().items() if p.grad is not None}
    subject.optimiser.zero_grad()
    subject.ctx.end_step()
    return found


@contextmanager
def repnoise_with_the_same_noise(subject):
    """The reference under the product's noise, with a weight under which it matters."""
    ctx = subject.ctx

    def passes():
        refusal, harmful = ctx.pairs()
        sources = [ctx.generator(row, ctx.auxiliary.drawn["pairs"]) for row in harmful.row_ids]
        repnoise.step(ctx.model, subject.batch, refusal, harmful, beta=1.0,
                      noise=lambda _layer: RepNoise.noise(sources, harmful, TINY.hidden))  # fmt: skip

    yield passes


PAIRS = {
    "vaccine": (CONFIGURATIONS["vaccine"].opened, CONFIGURATIONS["vaccine, reference"].opened),
    "vaccine, merged probe": (
        CONFIGURATIONS["vaccine, merged probe"].opened,
        CONFIGURATIONS["vaccine, reference"].opened,
    ),
    "t_vaccine": (CONFIGURATIONS["t_vaccine"].opened, CONFIGURATIONS["t_vaccine, reference"].opened),
    "booster": (CONFIGURATIONS["booster"].opened, CONFIGURATIONS["booster, reference"].opened),
    "repnoise": (product(lambda: RepNoise(beta=1.0)), repnoise_with_the_same_noise),
}


@pytest.mark.parametrize("name, layout", [(name, layout) for name in PAIRS for layout in CONFIGURATIONS[name].layouts])
def test_product_and_reference_have_the_same_gradients(name, layout):
    subject = make_subject(TINY, layout)
    ours, reference = (gradients(subject, opened) for opened in PAIRS[name])
    assert ours.keys() == reference.keys() and ours
    assert name != "t_vaccine" or len(ours) < len(subject.ctx.parameters())
    sft = gradients(subject, CONFIGURATIONS["sft"].opened)
    whole = torch.cat([ours[n].flatten() for n in ours])
    assert (whole - torch.cat([reference[n].flatten() for n in ours])).norm() < 1e-4 * whole.norm()
    assert (whole - torch.cat([sft[n].flatten() for n in ours])).norm() > 1e-2 * whole.norm()


def test_every_step_leaves_weights_and_hooks_as_they_were():
    subject = make_subject(TINY, "lora")
    before = {name: p.detach().clone() for name, p in subject.ctx.model.named_parameters()}
    hooks = []
    for _ in range(2):
        for configuration in CONFIGURATIONS.values():
            subject.begin()
            with configuration.opened(subject) as passes:
                passes()
            subject.update()
        hooks.append(repnoise_leak.hooks_on(subject.ctx.model))
    after = dict(subject.ctx.model.named_parameters())
    assert before.keys() == after.keys()
    assert hooks[0] == hooks[1], "transformers keeps a few of its own, once"
    assert all(torch.allclose(after[name], tensor, atol=1e-6) for name, tensor in before.items()), "references add back"


# -- memory -----------------------------------------------------------------------------------------------------------


def test_saved_bytes_of_a_known_case():
    a, b, linear = torch.ones(100, requires_grad=True), torch.ones(100, requires_grad=True), nn.Linear(100, 50)
    meter = SavedForBackward()
    with meter:
        product_ = a * b  # saves both, 400 bytes each
        assert meter.bytes == 800
        y = (product_ * product_).exp()  # saves its factor once, and its result
        assert meter.bytes == 1600
        z = linear(y)  # saves its input, which is saved already; the weight is a parameter
        assert meter.bytes == meter.peak == 1600
    z.sum().backward()
    del y, z, product_
    assert meter.bytes == 0 and meter.peak == 1600


def test_allocations_of_a_known_case():
    weight = nn.Parameter(torch.zeros(20, 7))
    with Allocations([weight], vocabulary=20) as meter:
        logits = torch.ones(3, 7) @ weight.T  # 84 + 240 bytes
        copy = weight.clone()  # 560
        del copy
        logits.sum().backward()
    assert meter.peak["logits"] == 240 and meter.peak["weights"] == 560 and meter.held["weights"] == 560
    assert meter.peak["new"] >= 84 + 240 + 560
    del logits
    weight.grad = None
    assert meter.held["weights"] == 0


def test_the_measured_memory_tells_the_methods_apart():
    found = {}
    for layout in LAYOUTS:
        subject = make_subject(TINY, layout)
        for name in ("sft", "booster", "booster, reference", "repnoise", "repnoise, reference"):
            subject.begin()
            with CONFIGURATIONS[name].opened(subject) as passes:
                found[layout, name] = memory_of(passes, subject.ctx.model, TINY.vocabulary)
            subject.update()
        trainable = sum(p.numel() * 4 for p in subject.ctx.parameters().values())
        assert found[layout, "sft"]["weights"] == pytest.approx(trainable, rel=0.2)
        assert found[layout, "sft"]["weights"] * 2 < found[layout, "booster, reference"]["weights"]
        assert found[layout, "booster"]["weights"] < 0.8 * found[layout, "booster, reference"]["weights"]
        assert found[layout, "repnoise"]["saved"] < found[layout, "repnoise, reference"]["saved"]


# -- the run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def unchanged_allocator(monkeypatch):
    for module in (step_cost, repnoise_leak):
        monkeypatch.setattr(module, "keep_freed_memory", lambda: None)


def run(out, rounds, *more):
    step_cost.main(["--out", str(out), "--shape", "tiny", "--rounds", str(rounds), "--layouts", "lora",
                    "--only", "vaccine", "vaccine, reference", "t_vaccine", *more])  # fmt: skip
    return json.loads(out.read_text())


def test_rounds_are_measured_resumed_and_written_into_the_page(tmp_path):
    out = tmp_path / "step_cost.json"
    first = run(out, 1)
    result = run(out, 3)
    assert result["rounds"][:1] == first["rounds"] and len(result["rounds"]) == 3
    assert run(out, 3) == result, "nothing is left to measure"
    names = [set(entry["lora"]) for entry in result["rounds"]]
    assert names[0] == {"sft", "vaccine", "vaccine, reference", "t_vaccine"}
    assert names[1] == names[2] == {"sft", "vaccine", "t_vaccine"}, "a reference is measured in every fourth round"
    assert len(first["rounds"][0]["lora"]["t_vaccine"]) == 10 and len(result["rounds"][1]["lora"]["t_vaccine"]) == 4
    assert {t["name"] for t in result["summary"]["targets"]} == {"vaccine", "t_vaccine"}
    page = tables.filled("a\n<!-- step_cost -->\nold\n<!-- end -->\nb\n<!-- step_cost_7b -->\n<!-- end -->\n", tmp_path)
    assert "old" not in page and "| vaccine, reference |" in page and page.count("Not measured yet.") == 1
    assert tables.filled(page, tmp_path) == page
    with pytest.raises(SystemExit, match="measured with settings"):
        run(out, 4, "--dtype", "bf16")


def test_ratios_are_formed_within_a_round():
    def entry(sft, vaccine):
        step = [{"passes": seconds, "optimiser": 1.0} for seconds in sft]
        return {"lora": {"sft": step, "vaccine": [{"passes": vaccine, "optimiser": 1.0}]}}

    rounds = [entry([1.0, 3.0], 5.0), entry([9.0, 9.0], 9.0), {"full": {}}]
    assert measured(rounds, "lora", "vaccine", "sft", "step") == {"ratio": 1.5, "least": 1.0, "most": 2.0, "rounds": 2}
    assert measured(rounds, "lora", "vaccine", "sft", "passes")["ratio"] == 1.75
    assert measured(rounds, "full", "vaccine", "sft", "step") is None
    assert all(t.name in CONFIGURATIONS and t.against in (None, *CONFIGURATIONS) for t in targets(1))


def test_half_precision_runs(tmp_path):
    assert run(tmp_path / "bf16.json", 1, "--dtype", "bf16", "--only", "booster")["rounds"]


def test_the_leak_is_seen(tmp_path):
    repnoise_leak.main(["--out", str(tmp_path / "leak.json"), "--shape", "tiny", "--steps", "3"])
    curves = json.loads((tmp_path / "leak.json").read_text())["curves"]
    first, second, third = (step["hooks"] for step in curves["leaking"])
    assert third - second == second - first > 100
    assert len({step["hooks"] for step in curves["clean"]}) == 1
