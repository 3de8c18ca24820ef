"""Fit a method on rows: render, attach what learns, train with checkpoints, hand over an adapter or full weights."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import parse_flag_from_env
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from apothecary.data.batching import padding_share, plan
from apothecary.data.chat import Rendered
from apothecary.data.rows import Row
from apothecary.errors import ConfigError, TrainingError
from apothecary.models import adapters
from apothecary.models.load import without_bars
from apothecary.models.merging import refuse_merged
from apothecary.train.config import TrainConfig
from apothecary.train.method import State, TrainingMethod
from apothecary.train.on_demand import OnDemand, lengths_of
from apothecary.train.progress import estimate
from apothecary.train.trainer import MethodTrainer, complete_checkpoints
from apothecary.train.workbench import Workbench

log = logging.getLogger(__name__)
TRAINED = "trained"  # the adapter that learns
LAUNCHES = ("fsdp", "deepspeed", "megatron_lm", "parallelism_config")  # of accelerate, in ACCELERATE_USE_...


@dataclass(frozen=True)
class FitResult:
    """What a training run reports; `history` has one dictionary for each logged step, `state` is the method's last."""

    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    state: State = field(default_factory=dict)


class _AfterStep(TrainerCallback):
    """Close the method's step and ask whether to end."""

    trainer: MethodTrainer

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.context.end_step()
        if self.trainer.method.converged(self.trainer.context, self.trainer.method_state):
            control.should_training_stop = True


def fit(bench: Workbench, method: TrainingMethod, rows: Sequence[Row], config: TrainConfig, out: Path,
        start: Path | None = None) -> FitResult:  # fmt: skip
    """Train, then write `out`/adapter (LoRA) or `out`/weights (full parameters).

    `start` is an adapter folder whose training goes on (the single-adapter pipeline, methods.md 1.1).  Killed at any
    moment, the same call continues from the last complete checkpoint under `bench.folder`.
    """
    result = train(bench, method, rows, config, start=start)
    if int(result.metrics["rank"]) == 0:
        export(bench, config, out)
    return result


def train(bench: Workbench, method: TrainingMethod, rows: Sequence[Row] | OnDemand, config: TrainConfig,
          name: str = TRAINED, start: Path | None = None) -> FitResult:  # fmt: skip
    """Train the bench's model in place; with LoRA, the adapter `name` learns.

    Rows on demand are trained on as they are, without the method's `rows`.
    """
    bench.require(method)
    _refuse_launch(method)
    given = rows.rows if isinstance(rows, OnDemand) else method.rows(rows, bench.aux, bench.seed)
    rendered = rows if isinstance(rows, OnDemand) else bench.render(given, config)
    args = _arguments(bench, config, len(rendered))
    _refuse_devices(args, method, bench.loaded.model)
    model = attach(bench, config, name, start)
    bench.loaded.model = model  # type: ignore
    context = bench.context(config, method.needs.roles, args.world_size, args.process_index)
    state = method.init(context)
    bench.loaded.model = context.model  # type: ignore
    if config.gradient_checkpointing:
        adapters.plain(model).gradient_checkpointing_enable({"use_reentrant": False})
        adapters.plain(model).disable_input_require_grads()  # a hook that only re-entrant checkpointing needs
    callback = _AfterStep()
    trainer = MethodTrainer(
        method=method, state=state, context=context, rows=rendered, pad_id=bench.pad_id,
        batch_size=config.batch_size, seed=bench.seed, keep_checkpoints=config.keep_checkpoints, stop=bench.stop,
        model=context.model, args=args, callbacks=[callback, *_progress(bench, method.name)])  # fmt: skip
    callback.trainer = trainer
    trainer.remove_callback(transformers.PrinterCallback)
    found = complete_checkpoints(Path(str(args.output_dir)))
    trainer.train_from(found[-1] if found else None)
    method.finish(context, trainer.method_state)
    bench.loaded.model = context.model  # type: ignore
    if config.gradient_checkpointing:
        adapters.plain(model).gradient_checkpointing_disable()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return FitResult({"steps": trainer.state.global_step, "loss": _mean_loss(history), "rows": len(rendered),
                      "dropped": len(given) - len(rendered),  # longer than the limit
                      "padding": _padding(rendered, config, bench.seed), "rank": args.process_index,
                      "resumed": bool(found)}, history, trainer.method_state)  # fmt: skip


def _padding(rendered: Sequence[Rendered], config: TrainConfig, seed: int) -> float:
    """The share of padding among the tokens of the first epoch's micro-batches on one process."""
    lengths = lengths_of(rendered)
    return padding_share(lengths, plan(lengths, config.batch_size, seed, epoch=0), config.accumulation)


def _mean_loss(history: Sequence[dict[str, Any]]) -> float | None:
    """The mean over the logged part of the whole training, resumed or not."""
    return sum(entry["loss"] for entry in history) / len(history) if history else None


def export(bench: Workbench, config: TrainConfig, out: Path) -> None:
    """Write what was trained: a standard PEFT folder, or the full weights in safetensors.

    Raises TrainingError while an adapter that only helped the training is still there, and ModelError while one is
    merged into the weights: nothing is written then.
    """
    model, own = bench.loaded.model, [TRAINED] if config.parameters == "lora" else []
    if left := [name for name in adapters.adapter_names(model) if name not in own]:
        raise TrainingError(f"adapter '{left[0]}' is still in the model, expected what was trained alone; take it out "
                            "in the method's `finish`")  # fmt: skip
    refuse_merged(model)
    if own:
        adapters.save_adapter(model, TRAINED, out / "adapter")
    else:
        with without_bars():
            adapters.plain(model).save_pretrained(out / "weights")


def attach(bench: Workbench, config: TrainConfig, name: str = TRAINED, start: Path | None = None) -> Any:
    """The bench's model with what learns: an adapter, fresh or from `start`, or every parameter in at least fp32."""
    model = bench.loaded.model
    if config.parameters == "full":
        if start is not None:
            raise ConfigError("adapter: single keeps training an adapter; with parameters: full choose adapter: merged")
        if bench.loaded.config.quantization:
            raise ConfigError("parameters: full cannot train a quantised model; choose parameters: lora")
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.promote_types(tensor.dtype, torch.float32))
        return model.requires_grad_(True)
    if not hasattr(model, "peft_config"):
        model.requires_grad_(False)
    if start is not None:
        model = adapters.load_adapter(model, name, start)
    else:
        model = adapters.add_adapter(model, name, config.lora, bench.seed)
    adapters.activate(model, [name], [name])
    return model


def _arguments(bench: Workbench, config: TrainConfig, rows: int) -> TrainingArguments:
    device = next(bench.loaded.model.parameters()).device.type
    spread = int(os.environ.get("WORLD_SIZE", "1")) > 1
    per_epoch = -(-rows // config.batch_size)
    total = config.max_steps if config.max_steps > 0 else math.ceil(config.epochs * per_epoch)
    if total <= 0:
        raise ConfigError(f"training needs at least one step; got epochs {config.epochs}, max_steps {config.max_steps}")
    arguments = TrainingArguments(
        output_dir=str(bench.folder / "checkpoints"), use_cpu=device == "cpu", report_to="none", seed=bench.seed,
        learning_rate=config.learning_rate, num_train_epochs=config.epochs, max_steps=config.max_steps,
        per_device_train_batch_size=1, gradient_accumulation_steps=config.accumulation,
        lr_scheduler_type=config.schedule, warmup_steps=round(config.warmup_ratio * total),
        weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm, adam_beta1=config.betas[0],
        adam_beta2=config.betas[1], save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 500, logging_steps=config.log_every, logging_nan_inf_filter=False,
        full_determinism=config.deterministic and device != "cpu", disable_tqdm=True, remove_unused_columns=False,
        dataloader_pin_memory=False, ddp_backend="gloo" if device == "cpu" and spread else None)  # fmt: skip
    arguments.mixed_precision = "no"  # `precision` alone decides; a launcher's setting would come on top of it
    return arguments


def _refuse_devices(args: TrainingArguments, method: TrainingMethod, model: Any) -> None:
    spread = getattr(adapters.plain(model), "hf_device_map", None) or {}
    if args.n_gpu > 1 and len(set(spread.values())) < 2:  # a model over several devices needs them in one process
        raise TrainingError("several GPUs are visible to one process; launch with torchrun --nproc-per-node, "
                            "or set CUDA_VISIBLE_DEVICES to one of them")  # fmt: skip
    _refuse_layout(method, "single" if args.world_size == 1 else "data_parallel")


def _refuse_launch(method: TrainingMethod) -> None:
    """What a launcher asks for in the environment, where the Trainer would find it."""
    for layout in LAUNCHES:
        if parse_flag_from_env(f"ACCELERATE_USE_{layout.upper()}"):
            _refuse_layout(method, layout)


def _refuse_layout(method: TrainingMethod, layout: str) -> None:
    if layout not in method.needs.layouts:
        raise TrainingError(f"method '{method.name}' cannot run in layout '{layout}'; "
                            f"launch it as {' or '.join(method.needs.layouts)}")  # fmt: skip


class _Estimate(TrainerCallback):
    """Tell after the first step what the whole training takes, where that is worth knowing."""

    def __init__(self, bench: Workbench, name: str) -> None:
        self.bench, self.name, self.began = bench, name, 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.told = False

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.told and state.is_world_process_zero:
            left = state.max_steps - state.global_step
            seconds = (time.perf_counter() - self.began) * left
            estimate(self.bench, f"training {self.name}: {left:,} more steps", seconds)
        self.told = True


class _Bar(transformers.trainer_callback.ProgressCallback):
    """The library's bar with the loss at its end, in place of a dictionary for each logged step."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        bar: Any = self.training_bar
        if bar is not None and logs and "loss" in logs:
            bar.set_postfix(loss=f"{logs['loss']:.3f}")


def _progress(bench: Workbench, name: str) -> list[TrainerCallback]:
    return [_Estimate(bench, name), *([_Bar()] if bench.progress else [])]
