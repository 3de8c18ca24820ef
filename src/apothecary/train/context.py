"""StepContext: the toolbox that a method's `step` works with.  Its promises are listed in docs/architecture.md.

Shape legend: B rows, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apothecary.errors import TrainingError
from apothecary.models import adapters as peft_adapters
from apothecary.models.anatomy import attention_blocks, decoder_layers, mlp_blocks
from apothecary.train import internals
from apothecary.train.auxiliary import Auxiliary
from apothecary.train.batch import Batch, batch_loss, row_losses
from apothecary.train.config import TrainConfig


@dataclass
class Output:
    """What a forward pass gives; `collected[name][layer]` are the internals asked for, each [B, T, D]."""

    logits: Tensor  # [B, T, V]
    collected: dict[str, dict[int, Tensor]] = field(default_factory=dict)


@dataclass
class StepContext:
    """Tools over one model.  `micro` of `window` micro-batches is being worked on; `processes` share the work."""

    model: nn.Module
    auxiliary: Auxiliary
    config: TrainConfig = field(default_factory=TrainConfig)
    processes: int = 1
    micro: int = 0
    window: int = 1
    layout: str = "single"
    run_backward: Callable[[Tensor], Any] = field(default=lambda loss: loss.backward())
    logged: dict[str, float] = field(default_factory=dict)
    prepared: Path | None = None  # the folder that the method's `prepare` has filled
    scratch: dict[str, Any] = field(default_factory=dict)  # what `init` rebuilds after a resume; never saved
    _restricted: ExitStack = field(default_factory=ExitStack)
    _summed: bool = False  # whether the step's gradient has been summed over processes

    # -- bookkeeping by the trainer -------------------------------------------------------------------------------

    def begin_step(self, window: int) -> None:
        """Before the first micro-batch of an optimiser step."""
        self.end_step()
        self.window, self.micro = window, 0
        self.logged.clear()
        self._summed = False
        self.auxiliary.begin_step()

    def begin_micro_step(self, micro: int) -> None:
        self.micro = micro
        self.auxiliary.begin_micro_step()

    def end_step(self) -> None:
        """After the optimiser has moved, before a checkpoint is written."""
        self._restricted.close()

    def sum_logged(self) -> None:
        """Logged values of all processes, added up; every process logs the same names."""
        if self.processes > 1 and self.logged:
            names = sorted(self.logged)
            values = torch.tensor([self.logged[name] for name in names], dtype=torch.float64, device=self.device)
            torch.distributed.all_reduce(values)
            self.logged.update(zip(names, values.tolist(), strict=True))

    @property
    def last_micro_step(self) -> bool:
        """True when this micro-batch completes the accumulated gradient: the place for gradient surgery, after
        `sum_gradients`.
        """
        return self.micro == self.window - 1

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def plain(self) -> nn.Module:
        return peft_adapters.plain(self.model)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    # -- passes ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, collect: Sequence[str] = (), grad: bool = True) -> Output:
        """Logits and chosen internals: "attn_out", "mlp_out" (by layer) and "hidden" (outputs of decoder layers).

        Without `grad` it is a probe: the next pass draws the same dropout masks.
        """
        finders = {"attn_out": attention_blocks, "mlp_out": mlp_blocks,
                   "hidden": lambda model: dict(enumerate(layer for _, layer in decoder_layers(model)))}  # fmt: skip
        collected: dict[str, dict[int, Tensor]] = {}
        with ExitStack() as stack:
            for name in collect:
                if name == "logits":
                    continue
                if name not in finders:
                    raise ValueError(f"cannot collect '{name}'; known: {', '.join(finders)}, logits")
                collected[name] = {}

                def keep(layer: int, output: Tensor, into: dict[int, Tensor] = collected[name]) -> Tensor:
                    into[layer] = output.reshape(*batch.input_ids.shape, -1)  # OPT's MLP flattens rows and tokens
                    return output

                stack.enter_context(internals.hooked(finders[name](self.model), keep))
            stack.enter_context(nullcontext() if grad else internals.same_randomness(self.device))
            stack.enter_context(self._autocast())
            stack.enter_context(torch.set_grad_enabled(grad))
            logits = self.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).logits  # fmt: skip
        return Output(logits, collected)

    def loss(self, batch: Batch, weight: float | Tensor = 1.0, grad: bool = True) -> Tensor:
        """The batch's share of the step's loss (see `batch_loss`), a scalar."""
        return batch_loss(self.forward(batch, grad=grad).logits, batch, self.config.reduction, weight)

    def backward(self, work: Batch | Tensor, weight: float | Tensor = 1.0) -> Tensor:
        """Accumulate the gradient of a batch's loss, or of a given loss, into `.grad`; the detached loss.

        `weight` is one number, or for a batch one number per row [B].
        """
        loss = self.loss(work, weight) if isinstance(work, Batch) else work * weight
        if loss.requires_grad:
            self.run_backward(loss)
        return loss.detach()

    def per_sample_loss(self, batch: Batch, grad: bool = False) -> Tensor:
        """Mean loss over the response tokens of each row, [B]."""
        return row_losses(self.forward(batch, grad=grad).logits, batch)

    def grads(self, batch: Batch, weight: float | Tensor = 1.0, reduce: bool = True) -> dict[str, Tensor]:
        """Gradients of the trainable parameters for this batch; `.grad`, hooks and random state stay as they were.

        With `reduce` they are summed over processes, so that weight-space directions agree everywhere.
        """
        parameters = self.parameters()
        with internals.same_randomness(self.device):
            loss = self.loss(batch, weight)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True) if loss.requires_grad else ()
        grads = {name: torch.zeros_like(p) for name, p in parameters.items()}
        grads.update({name: g for name, g in zip(parameters, found, strict=False) if g is not None})
        if reduce and self.processes > 1:
            for grad in grads.values():
                torch.distributed.all_reduce(grad)
        return grads

    def sum_gradients(self) -> None:
        """Sum `.grad` over processes, once a step; the trainer asks for it after the last micro-batch's `step`.

        A parameter that no process has a gradient for stays without one, so that AdamW skips it as on one process.
        """
        if self.processes == 1 or self._summed:
            return
        self._summed = True
        parameters = list(self.parameters().values())
        present = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        torch.distributed.all_reduce(present)
        for p, count in zip(parameters, present.tolist(), strict=True):
            if count:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                torch.distributed.all_reduce(p.grad)

    def hidden_grads(self, batch: Batch, layers: Sequence[int] | None = None) -> dict[int, Tensor]:
        """Gradients of the batch's loss with respect to the attention outputs, [B, T, D] by layer.

        No parameter gradient is formed, and nothing below the first chosen layer is differentiated.
        """
        with internals.frozen(self.model.parameters()), internals.probe_zeros(self._attention(layers)) as zeros:
            with internals.same_randomness(self.device):
                loss = self.loss(batch)
            found = torch.autograd.grad(loss, list(zeros.values()))
        return dict(zip(zeros, found, strict=True))

    # -- temporary changes ----------------------------------------------------------------------------------------

    @contextmanager
    def hidden_offset(self, offsets: Mapping[int, Tensor]) -> Iterator[None]:
        """Add constants to the attention outputs of the named layers."""
        with internals.hooked(self._attention(list(offsets)), lambda layer, out: out + offsets[layer].to(out.dtype)):
            yield

    def perturbed(self, deltas: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Shift trainable parameters by name; the saved bytes come back on exit."""
        return internals.shifted(dict(self.model.named_parameters()), deltas)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Bit-exact undo of an inner loop (a simulated attack): parameters, `.grad` and random state."""
        parameters = self.parameters()
        with (
            internals.same_randomness(self.device),
            internals.saved(parameters),
            internals.gradients_aside(parameters.values()),
        ):
            yield

    @contextmanager
    def adapters(self, active: Sequence[str], trainable: Sequence[str] = ()) -> Iterator[None]:
        """Only these adapters take part and only these learn, within the context."""
        before_active = peft_adapters.active_adapters(self.model)
        before = [(p, p.requires_grad) for p in self.model.parameters()]
        peft_adapters.activate(self.model, active, trainable)
        try:
            yield
        finally:
            peft_adapters.activate(self.model, before_active, ())
            for p, flag in before:
                p.requires_grad_(flag)

    def trainable(self, layers: Sequence[int]) -> None:
        """Restrict what the optimiser moves in this step to these decoder layers, weight decay included.

        A parameter without gradient is skipped by AdamW altogether; the restriction ends with the step.
        """
        if self.micro != 0:
            raise TrainingError("trainable() must be called at the first micro-batch of a step")
        chosen = {id(p) for i in layers for p in decoder_layers(self.model)[i][1].parameters()}
        self._restricted.enter_context(internals.frozen([p for p in self.parameters().values() if id(p) not in chosen]))

    # -- data and logs --------------------------------------------------------------------------------------------

    def aux(self, role: str, per: str = "micro") -> Batch:
        """This process's part of the next batch of an auxiliary role, for one micro-batch or for the whole step.

        With `per="step"` the same rows come at every micro-batch of a step: use them at `last_micro_step`.
        """
        return self.auxiliary.batch(role, self.micro, self.window, per).to(self.device)

    def log(self, name: str, value: float | Tensor) -> None:
        """Log a loss component on its own line; values of a step's micro-batches add up."""
        self.logged[name] = self.logged.get(name, 0.0) + float(value)

    def _attention(self, layers: Sequence[int] | None) -> dict[int, nn.Module]:
        blocks = attention_blocks(self.model)
        return blocks if layers is None else {layer: blocks[layer] for layer in layers}

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")
