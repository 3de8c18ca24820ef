"""Kill and resume: a run that was stopped anywhere ends with the same bytes."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from benches import Halt, halt_at, make_bench, make_rows, same_bits
from cases import CASES, params
from safetensors.torch import load_file
from tiny import tiny_model

from apothecary.align.sft import Sft
from apothecary.errors import TrainingError
from apothecary.models.settings import LoraSettings
from apothecary.train.config import TrainConfig
from apothecary.train.fit import fit
from apothecary.train.trainer import complete_checkpoints

ROWS = make_rows("row", 12)
CONFIG = TrainConfig(epochs=2, batch_size=4, accumulation=2, save_every=2, log_every=1, learning_rate=1e-2,
                     lora=LoraSettings(dropout=0.1), aux_batch_size=3)  # fmt: skip
CALLS = 2  # stop checks in a step: one for each micro-batch
STOPS = {  # 3 steps an epoch, checkpoints after 2, 4 and 6
    "before a checkpoint": 1,
    "at a checkpoint": 2 * CALLS,
    "between checkpoints": 3 * CALLS + 1,
    "second epoch": 5 * CALLS,
}


def go(folder, method, config, stop=lambda: None, bench=None):
    bench = bench or make_bench(folder, stop=stop)
    result = fit(bench, method, ROWS, config, folder / "out")
    (file,) = (folder / "out").rglob("*.safetensors")
    return load_file(file), result


def configured(parameters, **changes):
    return TrainConfig(**{**CONFIG.__dict__, "parameters": parameters, **changes})


@pytest.mark.parametrize("stop", STOPS)
def test_sft_stopped_anywhere_ends_with_the_same_bytes(tmp_path, stop):
    whole, result = go(tmp_path / "whole", Sft(), CONFIG)
    with pytest.raises(Halt):
        go(tmp_path / "killed", Sft(), CONFIG, halt_at(STOPS[stop]))
    calls = []
    resumed, again = go(tmp_path / "killed", Sft(), CONFIG, lambda: calls.append(0))
    assert same_bits(whole, resumed)
    done = STOPS[stop] // CALLS // 2 * 2  # steps up to the last checkpoint
    assert len(calls) == CALLS * (6 - done), "only the rest was trained"
    assert again.metrics["resumed"] == (stop != "before a checkpoint")
    kept = [{k: v for k, v in entry.items() if k != "epoch"} for entry in again.history]
    assert kept == [{k: v for k, v in entry.items() if k != "epoch"} for entry in result.history]
    result.metrics["resumed"] = again.metrics["resumed"]
    assert again.metrics == result.metrics


@pytest.mark.parametrize("case", params("resume"))
def test_every_method_resumes_twice(tmp_path, case):
    config = configured(case.parameters, **case.settings)

    def part(name, stop=lambda: None):
        bench = case.bench(tmp_path / "bench", tiny_model, stop=stop)
        bench.folder = tmp_path / name
        return go(tmp_path / name, case.make(), config, bench=bench)

    whole, _ = part("whole")
    for call in (STOPS["between checkpoints"], 2 * CALLS):
        with pytest.raises(Halt):
            part("killed", halt_at(call))
        assert not (tmp_path / "killed" / "out").exists()
    resumed, result = part("killed")
    assert result.metrics["resumed"] and same_bits(whole, resumed)


class LateDeath(Sft):
    """Dies after the last step, once."""

    def finish(self, ctx, state):
        if next(self.deaths) == 0:
            raise Halt


@pytest.mark.parametrize("ends", [{"max_steps": 4}, {"max_steps": 6}, {"epochs": 0.4}])
def test_killed_after_the_last_step_no_step_is_taken_twice(tmp_path, ends):
    """Training that ends inside an epoch must not go on to the epoch's next batch."""
    config = configured("lora", **ends)
    whole, result = go(tmp_path / "whole", Sft(), config)
    LateDeath.deaths = count()
    with pytest.raises(Halt):
        go(tmp_path / "killed", LateDeath(), config)
    resumed, again = go(tmp_path / "killed", LateDeath(), config)
    assert same_bits(whole, resumed) and again.metrics["steps"] == result.metrics["steps"]
    assert again.history == result.history


class Ending(LateDeath):
    """Converges at the fourth step, which has a checkpoint; its verdict depends on its state."""

    def init(self, ctx):
        return {"steps": 0}

    def step(self, ctx, batch, state):
        state["steps"] += ctx.micro == 0
        return ctx.backward(batch)

    def converged(self, ctx, state):
        return state["steps"] == 4


def test_killed_after_convergence_training_stays_ended(tmp_path):
    Ending.deaths = count(1)
    whole, result = go(tmp_path / "whole", Ending(), CONFIG)
    assert result.metrics["steps"] == 4
    Ending.deaths = count()
    with pytest.raises(Halt):
        go(tmp_path / "killed", Ending(), CONFIG)
    resumed, again = go(tmp_path / "killed", Ending(), CONFIG)
    assert again.metrics["steps"] == 4 and same_bits(whole, resumed)


def test_an_incomplete_checkpoint_does_not_count(tmp_path):
    whole, _ = go(tmp_path / "whole", Sft(), CONFIG)
    folder = tmp_path / "killed"
    with pytest.raises(Halt):
        go(folder, Sft(), CONFIG, halt_at(3 * CALLS))
    partial = folder / "checkpoints" / "checkpoint-4.partial"
    partial.mkdir()
    (partial / "trainable.safetensors").write_bytes(b"half")
    assert [p.name for p in complete_checkpoints(folder / "checkpoints")] == ["checkpoint-2"]
    resumed, result = go(folder, Sft(), CONFIG)
    assert result.metrics["resumed"] and same_bits(whole, resumed) and not partial.exists()


def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    from apothecary.train import trainer

    saved, real = count(), trainer.torch.save

    def full_disk(*args):
        if next(saved) == 1:  # the method state of the second checkpoint
            raise OSError(28, "No space left on device")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.torch, "save", full_disk)
        patch.setattr(trainer.MethodTrainer, "_save_optimizer_and_scheduler", lambda self, folder: None)
        patch.setattr(trainer.MethodTrainer, "_save_rng_state", lambda self, folder: None)
        with pytest.raises(OSError, match="No space"):
            go(tmp_path, Sft(), CONFIG)
    assert [p.name for p in complete_checkpoints(tmp_path / "checkpoints")] == ["checkpoint-2"]


def test_only_the_last_checkpoints_are_kept_in_numeric_order(tmp_path):
    config = configured("lora", epochs=4, save_every=1, keep_checkpoints=2)
    go(tmp_path, Sft(), config)
    assert [p.name for p in complete_checkpoints(tmp_path / "checkpoints")] == ["checkpoint-11", "checkpoint-12"]


@pytest.mark.parametrize("lora", [LoraSettings(rank=4), LoraSettings(targets=("q_proj",))])
def test_a_checkpoint_of_other_parameters_is_refused(tmp_path, lora):
    with pytest.raises(Halt):
        go(tmp_path, Sft(), CONFIG, halt_at(3 * CALLS))
    with pytest.raises(TrainingError, match="other parameters than the model trains; delete it"):
        go(tmp_path, Sft(), configured("lora", lora=lora))


def test_the_checkpoint_holds_the_methods_state_without_pickled_code(tmp_path):
    config = configured("lora", max_steps=4)
    bench = make_bench(tmp_path)
    fit(bench, CASES["vectors"].make(), ROWS, config, tmp_path / "out")
    stored = torch.load(tmp_path / "checkpoints" / "checkpoint-4" / "method.pt", weights_only=True)
    assert set(stored["method"]) == {"nll"} and len(stored["method"]["nll"]) == 4
    assert stored["drawn"] == {"benign": 4} and stored["ended"]


def test_a_started_adapter_goes_on_learning(tmp_path):
    """The single-adapter pipeline: `start` is loaded, trained on and saved under the same names."""
    first, _ = go(tmp_path / "first", Sft(), CONFIG)
    bench = make_bench(tmp_path / "second", tiny_model("llama"))
    start, out = tmp_path / "first" / "out" / "adapter", tmp_path / "second" / "out"
    fit(bench, Sft(), ROWS, configured("lora", max_steps=2), out, start)
    second = load_file(out / "adapter" / "adapter_model.safetensors")
    assert second.keys() == first.keys() and not same_bits(first, second)
    gap = max((second[k] - first[k]).abs().max() for k in first)
    assert gap < 0.05, "two steps of 1e-2 away from where the first training ended"
