"""transformers.Trainer with one override of the step; batches and checkpoints go through the Trainer's own seams.

Gradients of several processes are summed once, at the last micro-batch: every pass runs on the plain model, so that a
method may make any number of passes without triggering a reduction (methods.md 1.4, rule 4).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerState

from apothecary.data.batching import plan, share
from apothecary.data.chat import Rendered
from apothecary.errors import TrainingError
from apothecary.train.batch import Batch, collate, weigh
from apothecary.train.context import StepContext
from apothecary.train.internals import total
from apothecary.train.method import State, TrainingMethod
from apothecary.train.on_demand import lengths_of

PREFIX = "checkpoint-"
METHOD_STATE = "method.pt"


class PlannedBatches(Sampler[list[int]]):
    """This process's micro-batches of an epoch's planned global batches; the epoch follows from the step reached."""

    def __init__(self, rows: Sequence[Rendered], batch_size: int, accumulation: int, seed: int,
                 processes: int, rank: int, step: Callable[[], int]) -> None:  # fmt: skip
        self.lengths = lengths_of(rows)
        self.batch_size, self.accumulation, self.seed = batch_size, accumulation, seed
        self.processes, self.rank, self.step = processes, rank, step

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.step() * self.accumulation // len(self)
        parts = self.accumulation * self.processes
        for global_batch in plan(self.lengths, self.batch_size, self.seed, epoch):
            for micro in range(self.accumulation):
                yield share(global_batch, parts, micro * self.processes + self.rank)


class MethodTrainer(transformers.Trainer):
    """Runs a method's `step`; everything else is the Trainer's."""

    def __init__(self, *, method: TrainingMethod, state: State, context: StepContext, rows: Sequence[Rendered],
                 pad_id: int, batch_size: int, seed: int, keep_checkpoints: int, stop: Callable[[], None],
                 **trainer: Any) -> None:  # fmt: skip
        super().__init__(train_dataset=rows, **trainer)  # type: ignore[arg-type]
        self.method, self.method_state, self.context = method, state, context
        self.pad_id, self.batch_size, self.plan_seed = pad_id, batch_size, seed
        self.keep_checkpoints, self.stop = keep_checkpoints, stop
        context.run_backward = self.accelerator.backward

    # -- data -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        sampler = PlannedBatches(
            self.train_dataset, self.batch_size, self.args.gradient_accumulation_steps, self.plan_seed,  # type: ignore
            self.context.processes, self.accelerator.process_index, lambda: self.state.global_step)  # fmt: skip
        return DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=list)  # type: ignore[arg-type]

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: Any) -> tuple[list, None]:
        groups: list[list[Rendered]] = list(islice(epoch_iterator, num_batches))
        total = torch.tensor(sum(weigh(group, self.context.config.reduction) for group in groups), dtype=torch.float64)
        if self.context.processes > 1:
            total = self._sum_over_processes(total)
        blank: Any = self.train_dataset[0]  # type: ignore[index]
        self.context.begin_step(len(groups))
        self._micro, self._step_rows = 0, [row.row_id for group in groups for row in group]
        return [collate(group, self.pad_id, float(total), blank) for group in groups], None

    # -- the step -------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.stop()
        self.context.model.train()
        batch: Batch = inputs.to(self.args.device)
        self.context.begin_micro_step(self._micro)
        self._micro += 1
        loss = self.method.step(self.context, batch, self.method_state)
        self._refuse_nonfinite(loss, batch.row_ids)
        if self.context.last_micro_step:
            self.context.sum_gradients()
            self.context.sum_logged()
            self._refuse_nonfinite(self._gradient_total(), self._step_rows)
        return loss.detach() * self.context.processes

    def _gradient_total(self) -> torch.Tensor:
        sums = [p.grad.sum() for p in self.context.model.parameters() if p.grad is not None]
        return total(sums) if sums else torch.zeros(())

    def _refuse_nonfinite(self, value: torch.Tensor, row_ids: Sequence[str]) -> None:
        if not torch.isfinite(value).all():
            raise TrainingError(
                f"the loss or its gradient is not finite at step {self.state.global_step + 1}, in the batch of rows "
                f"{', '.join(row_ids)}; lower the learning rate, or inspect these rows"
            )

    def _sum_over_processes(self, value: torch.Tensor) -> torch.Tensor:
        value = value.to(self.args.device)
        torch.distributed.all_reduce(value)
        return value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, **self.context.logged} if "loss" in logs else logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the Trainer's estimate needs a dictionary and knows nothing of a method's extra passes

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def train_from(self, checkpoint: Path | None) -> None:
        """Train on from a checkpoint, or from the start.  One of a finished training is loaded and not trained on:
        the Trainer itself would take one step more where training ended inside an epoch.
        """
        if checkpoint and torch.load(checkpoint / METHOD_STATE, weights_only=True)["ended"]:
            self._load_from_checkpoint(str(checkpoint))
            self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        else:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainable tensors, optimiser, schedule, random state and method state; counts once the folder is renamed."""
        final = Path(str(self.args.output_dir)) / f"{PREFIX}{self.state.global_step}"
        partial = final.with_name(final.name + ".partial")
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file({n: p.detach().contiguous() for n, p in self.context.parameters().items()},
                      partial / "trainable.safetensors")  # fmt: skip
            torch.save({"method": self.method_state, "drawn": self.context.auxiliary.drawn, "order": self._moved(),
                        "ended": self.control.should_training_stop}, partial / METHOD_STATE)  # fmt: skip
            self.state.save_to_json(str(partial / "trainer_state.json"))
        self._barrier()
        self._save_optimizer_and_scheduler(str(partial))
        self._save_rng_state(str(partial))
        self._barrier()
        if self.args.should_save:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            for old in complete_checkpoints(Path(str(self.args.output_dir)))[: -self.keep_checkpoints]:
                shutil.rmtree(old)
        self._barrier()

    def _moved(self) -> list[str]:
        """Names of the parameters in the order of the optimiser's state, which knows only their numbers."""
        names = {id(p): name for name, p in self.context.model.named_parameters()}
        return [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]  # type: ignore

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        tensors, parameters = load_file(folder / "trainable.safetensors"), self.context.parameters()
        if {n: t.shape for n, t in tensors.items()} != {n: p.shape for n, p in parameters.items()}:
            raise TrainingError(f"{folder} holds other parameters than the model trains; delete it to start again")
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(tensors[name])
        extra = torch.load(folder / METHOD_STATE, weights_only=True)
        self.method_state.clear()
        self.method_state.update(extra["method"])
        self.context.auxiliary.drawn.update(extra["drawn"])

    def _barrier(self) -> None:
        if self.context.processes > 1:
            torch.distributed.barrier()


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were finished, oldest first."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.suffix != ".partial"]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))
