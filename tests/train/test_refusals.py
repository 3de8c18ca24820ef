"""What stops a training, and what is refused before any work."""

from __future__ import annotations

import pytest
import torch
from benches import make_bench, make_context, make_rows
from tiny import CONTEXT, tiny_model

from apothecary.data.rows import Row
from apothecary.errors import ConfigError, OverLong, TrainingError
from apothecary.train.config import TrainConfig
from apothecary.train.fit import _refuse_devices, fit
from apothecary.train.method import Needs, TrainingMethod


class Plain(TrainingMethod):
    name, kind = "plain", "align"


class Poisoned(Plain):
    """A NaN loss at the second step, or an infinite gradient under a finite loss."""

    def __init__(self, what):
        self.what, self.calls = what, 0

    def step(self, ctx, batch, state):
        loss = ctx.backward(batch)
        self.calls += 1
        if self.calls == 3:
            self.rows = batch.row_ids
            if self.what == "loss":
                return loss * float("nan")
            next(iter(ctx.parameters().values())).grad.view(-1)[0] = float("inf")
        return loss


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_nan_stops_the_run_and_names_its_rows(tmp_path, what):
    method = Poisoned(what)
    config = TrainConfig(epochs=2, batch_size=4, accumulation=2, save_every=1)
    with pytest.raises(TrainingError, match="not finite at step 2") as caught:
        fit(make_bench(tmp_path), method, make_rows("row", 8), config, tmp_path / "out")
    assert method.rows and all(row in str(caught.value) for row in method.rows)
    assert not (tmp_path / "out").exists()


def test_an_infinite_weight_stops_the_run(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(TrainingError, match=r"not finite at step 1.*row"):
        fit(make_bench(tmp_path, model), Plain(), make_rows("row", 4), TrainConfig(max_steps=1), tmp_path / "out")


def test_a_missing_role_is_refused_before_any_work(tmp_path):
    class Needy(Plain):
        needs = Needs(roles=("harmful", "pairs"))

    bench = make_bench(tmp_path)
    with pytest.raises(ConfigError, match=r"'plain' needs rows of role pairs; name a source"):
        fit(bench, Needy(), make_rows("row", 4), TrainConfig(), tmp_path / "out")
    assert not any(tmp_path.iterdir()) and not hasattr(bench.loaded.model, "peft_config")


def test_an_unknown_role_is_named(tmp_path):
    ctx = make_context(make_bench(tmp_path), ("harmful",))
    with pytest.raises(ConfigError, match="role 'harmfull'; did you mean 'harmful'"):
        ctx.aux("harmfull")


def test_a_missing_prepare_stage_is_refused(tmp_path):
    class Prepared(Plain):
        needs = Needs(prepared=True)

    with pytest.raises(ConfigError, match="prepare stage"):
        fit(make_bench(tmp_path), Prepared(), make_rows("row", 4), TrainConfig(), tmp_path / "out")


def test_a_method_that_needs_other_models_is_refused(tmp_path):
    class Guarded(Plain):
        needs = Needs(models=("guard",))

    with pytest.raises(ConfigError, match=r"needs models \(guard\), which no stage can give"):
        fit(make_bench(tmp_path), Guarded(), make_rows("row", 4), TrainConfig(), tmp_path / "out")


@pytest.mark.parametrize("max_length", [None, 10 * CONTEXT])
def test_a_row_beyond_the_context_is_caught_whatever_max_length_says(tmp_path, max_length):
    rows = [*make_rows("row", 4), Row("long", (("user", "why"),), "x" * (CONTEXT + 1))]
    config = TrainConfig(max_steps=1, batch_size=4, max_length=max_length, save_every=0)
    with pytest.raises(OverLong, match=f"row 'long' .* expected at most {CONTEXT};"):
        fit(make_bench(tmp_path), Plain(), rows, config, tmp_path / "out")
    dropping = TrainConfig(**{**config.__dict__, "over_long": "drop"})
    metrics = fit(make_bench(tmp_path), Plain(), rows, dropping, tmp_path / "out").metrics
    assert (metrics["rows"], metrics["dropped"]) == (4, 1)


def test_progress_bars_are_shown_when_asked_for(tmp_path, capsys):
    for progress in (False, True):
        bench = make_bench(tmp_path / str(progress), progress=progress)
        fit(bench, Plain(), make_rows("row", 4), TrainConfig(max_steps=2, batch_size=2), tmp_path / str(progress) / "o")
        shown = capsys.readouterr()
        assert ("/2 [" in shown.err) == progress


class OnSeveralDevices:
    """Arguments of a launch that shows several GPUs to one process."""

    n_gpu, world_size = 2, 1


def test_several_gpus_in_one_process_need_a_model_spread_over_them():
    model = tiny_model("llama")
    for placement in (None, {"": 0}):
        model.hf_device_map = placement
        with pytest.raises(TrainingError, match="several GPUs are visible"):
            _refuse_devices(OnSeveralDevices(), Plain(), model)
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    _refuse_devices(OnSeveralDevices(), Plain(), model)


@pytest.mark.parametrize("key", ["FSDP", "DEEPSPEED"])
def test_a_sharded_launch_is_refused_before_any_work(tmp_path, monkeypatch, key):
    monkeypatch.setenv(f"ACCELERATE_USE_{key}", "true")
    bench = make_bench(tmp_path)
    with pytest.raises(TrainingError, match=f"'plain' cannot run in layout '{key.lower()}'; launch it as single or"):
        fit(bench, Plain(), make_rows("row", 4), TrainConfig(max_steps=1), tmp_path / "out")
    assert not any(tmp_path.iterdir()) and not hasattr(bench.loaded.model, "peft_config")


@pytest.mark.parametrize("asked", ["fp16", "bf16"])
def test_the_precision_of_the_launcher_changes_nothing(tmp_path, monkeypatch, asked):
    """`precision` decides alone: no second autocast, no loss scaler."""
    config = TrainConfig(max_steps=2, batch_size=4, save_every=0, log_every=1)
    losses = []
    for name in ("no", asked):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", name)
        result = fit(make_bench(tmp_path / name), Plain(), make_rows("row", 8), config, tmp_path / name / "out")
        losses.append([(entry["loss"], entry["grad_norm"]) for entry in result.history])
    assert losses[0] == losses[1]
