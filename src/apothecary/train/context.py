"""StepContext: the toolbox that a method's `step` works with.  Its promises are listed in docs/architecture.md.

Shape legend: B rows, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apothecary.errors import TrainingError
from apothecary.models import adapters as peft_adapters
from apothecary.models import merging
from apothecary.models.anatomy import attention_blocks, decoder_layers, mlp_blocks
from apothecary.train import internals
from apothecary.train.auxiliary import Auxiliary
from apothecary.train.batch import Batch, batch_loss, joined, row_losses
from apothecary.train.config import TrainConfig

PADDING = 1.05  # tokens of a common pass, over those of separate ones, up to which it is worth while


@dataclass
class Output:
    """What a forward pass gives; `collected[name][layer]` are the internals asked for, each [B, T, D]."""

    logits: Tensor  # [B, T, V]; [B, 1, V] where they were not asked for
    collected: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    @property
    def states(self) -> list[Tensor]:
        """The hidden states before, between and after the decoder layers; needs "embedded" and "hidden"."""
        return [*self.collected["embedded"].values(), *self.collected["hidden"].values()]


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
    _reused: int = 0  # layers that a pass does not run anew

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

    def forward(self, batch: Batch, collect: Sequence[str] = (), grad: bool = True,
                logits: bool | int = True) -> Output:  # fmt: skip
        """Logits and chosen internals: "attn_out", "mlp_out" (by layer), "hidden" (outputs of decoder layers) and
        "embedded" (what enters the first of them, as layer 0).

        Without `grad` it is a probe: the next pass draws the same dropout masks.  Without `logits` the head reads the
        last token alone; with a number, that many of the last ones.
        """
        finders = {"attn_out": attention_blocks, "mlp_out": mlp_blocks,
                   "hidden": lambda model: dict(enumerate(layer for _, layer in decoder_layers(model)))}  # fmt: skip
        collected: dict[str, dict[int, Tensor]] = {}
        with ExitStack() as stack:
            for name in collect:
                if name == "logits":
                    continue
                collected[name] = {}
                if name == "embedded":
                    store = partial(collected[name].setdefault, 0)
                    stack.enter_context(internals.entered(decoder_layers(self.model)[0][1], store))
                    continue
                if name not in finders:
                    raise ValueError(f"cannot collect '{name}'; known: {', '.join(finders)}, embedded, logits")

                def keep(layer: int, output: Tensor, into: dict[int, Tensor] = collected[name]) -> Tensor:
                    into[layer] = output.reshape(*batch.input_ids.shape, -1)  # OPT's MLP flattens rows and tokens
                    return output

                stack.enter_context(internals.hooked(finders[name](self.model), keep))
            stack.enter_context(nullcontext() if grad else internals.same_randomness(self.device))
            stack.enter_context(self.autocast())
            stack.enter_context(torch.set_grad_enabled(grad))
            found = self.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False,
                **({} if logits is True else {"logits_to_keep": _last(batch, logits or 1)}),
            )  # fmt: skip
        return Output(found.logits, collected)

    def forward_each(self, batches: Sequence[Batch], collect: Sequence[str] = (), grad: bool = True,
                     logits: bool = True) -> list[Output]:  # fmt: skip
        """`forward` of several batches, in one pass where padding them to one width costs little."""
        whole = joined(batches)
        if whole.input_ids.numel() > PADDING * sum(batch.input_ids.numel() for batch in batches):
            return [self.forward(batch, collect, grad, logits) for batch in batches]
        output, outputs, start = self.forward(whole, collect, grad, logits), [], 0
        for rows, width in (batch.input_ids.shape for batch in batches):
            part = (slice(start, start + rows), slice(width))
            cut = {name: {layer: t[part] for layer, t in found.items()} for name, found in output.collected.items()}
            outputs.append(Output(output.logits[part], cut))
            start += rows
        return outputs

    def last_hidden(self, batch: Batch) -> Tensor:
        """What the output head reads, [B, T, D]: the last hidden states after the final norm.  A probe, no logits."""
        with torch.no_grad(), internals.same_randomness(self.device), self.autocast():
            decoder: Any = self.plain.get_decoder()  # type: ignore[operator]
            found = decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        return found.last_hidden_state

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
        """Mean loss over the response tokens of each row, [B]; where all rows hold prompt, there are no logits."""
        return row_losses(self.forward(batch, grad=grad, logits=batch.tail).logits, batch)

    def grads(self, batch: Batch, weight: float | Tensor = 1.0, reduce: bool = True) -> dict[str, Tensor]:
        """Gradients of the trainable parameters for this batch; `.grad`, hooks and random state stay as they were.

        With `reduce` they are summed over processes, so that weight-space directions agree everywhere.
        """
        return self.value_and_grads(batch, weight, reduce)[1]

    def value_and_grads(self, batch: Batch, weight: float | Tensor = 1.0,
                        reduce: bool = True) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """This process's share of the loss, detached, and the gradients as in `grads`."""
        parameters = self.parameters()
        with internals.same_randomness(self.device):
            loss = self.loss(batch, weight)
        inputs = list(parameters.values())
        found = [torch.zeros_like(p) for p in inputs] if not loss.requires_grad else torch.autograd.grad(
            loss, inputs, allow_unused=True, materialize_grads=True)  # fmt: skip
        grads = dict(zip(parameters, found, strict=True))
        if reduce and self.processes > 1:
            for grad in grads.values():
                torch.distributed.all_reduce(grad)
        return loss.detach(), grads

    def hessian_vector(self, batch: Batch, vector: Mapping[str, Tensor], reduce: bool = True) -> dict[str, Tensor]:
        """H v: the Hessian of this batch's loss over the trainable parameters, times a vector, by double backward.

        What `grads` leaves as it was stays so here; with `reduce` the result is summed over processes.
        """
        parameters = self.parameters()
        inputs = list(parameters.values())
        with internals.same_randomness(self.device), internals.double_backward(self.plain):
            loss = self.loss(batch)
            grads = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
            slopes = [(g * vector[name]).sum() for name, g in zip(parameters, grads, strict=True) if g is not None]
            found = torch.autograd.grad(internals.total(slopes), inputs, allow_unused=True, materialize_grads=True)
        if reduce and self.processes > 1:
            for product in found:
                torch.distributed.all_reduce(product)
        return dict(zip(parameters, found, strict=True))

    def accumulate(self, grads: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Add `weight` times gradients that are the same on every process, such as those of `grads`, to `.grad`.

        Each process adds its share, so that the sum over processes counts them once.  A parameter without gradient
        stays without one where there is nothing to add, so that AdamW skips it.
        """
        share = weight if self._summed else weight / self.processes
        parameters = self.parameters()
        for name, grad in grads.items():
            p = parameters[name]
            if p.grad is not None:
                p.grad.add_(grad, alpha=share)
            elif grad.any():
                p.grad = share * grad

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

        No parameter gradient is formed, nothing below the first chosen layer is differentiated, and the head reads
        nothing before the first response of any row.
        """
        with internals.frozen(self.model.parameters()), internals.probe_zeros(self._attention(layers)) as zeros:
            with internals.same_randomness(self.device):
                logits = self.forward(batch, logits=batch.tail).logits
            loss = batch_loss(logits, batch, self.config.reduction)
            found = torch.autograd.grad(loss, list(zeros.values()))
        return dict(zip(zeros, found, strict=True))

    # -- temporary changes ----------------------------------------------------------------------------------------

    @contextmanager
    def hidden_offset(self, offsets: Mapping[int, Tensor]) -> Iterator[None]:
        """Add constants to the attention outputs of the named layers."""
        with internals.hooked(self._attention(list(offsets)), lambda layer, out: out + offsets[layer].to(out.dtype)):
            yield

    @contextmanager
    def reusing(self, lowest: int) -> Iterator[None]:
        """Passes over one batch run the decoder layers below `lowest` once: the first without a graph, the others start
        from what it gave, with the dropout masks of whole passes.  Nothing may learn or be offset below `lowest`.
        """
        layers = [layer for _, layer in decoder_layers(self.model)[:lowest]]
        before, self._reused = self._reused, lowest
        try:
            with internals.run_once(layers, self.device):
                yield
        finally:
            self._reused = before

    @contextmanager
    def merged(self) -> Iterator[None]:
        """The active adapters inside the weights, W + s B A in the weights' dtype, in place of branches beside them.

        For probes: nothing learns within the context, after which the weights hold their own bytes again.  Refused
        for adapters with dropout, for which this is another model.
        """
        weights = merging.merged_weights(self.model, peft_adapters.active_adapters(self.model))
        with self.adapters(active=()), internals.exchanged(dict(self.model.named_parameters()), weights):
            yield

    def perturbed(self, deltas: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Shift trainable parameters by name; their own bytes come back on exit."""
        return internals.shifted(dict(self.model.named_parameters()), deltas)

    def at(self, values: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Give trainable parameters other values by name; their own bytes come back on exit, and no copy is made."""
        return internals.exchanged(dict(self.model.named_parameters()), values)

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
    def adapters(self, active: Sequence[str], trainable: Sequence[str] = (), base: bool = False) -> Iterator[None]:
        """Only these adapters take part and only these learn, within the context; with `base` so do all the weights
        beneath them.
        """
        before_active = peft_adapters.active_adapters(self.model)
        before = [(p, p.requires_grad) for p in self.model.parameters()]
        peft_adapters.activate(self.model, active, trainable)
        for p in peft_adapters.base_parameters(self.model) if base else ():
            p.requires_grad_(True)
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
        found = decoder_layers(self.model)
        chosen = {id(p) for i in layers for p in found[i][1].parameters()}
        self._restricted.enter_context(internals.frozen([p for p in self.parameters().values() if id(p) not in chosen]))

    # -- data and logs --------------------------------------------------------------------------------------------

    def aux(self, role: str, per: str = "micro") -> Batch:
        """This process's part of the next batch of an auxiliary role, for one micro-batch or for the whole step.

        With `per="step"` the same rows come at every micro-batch of a step: use them at `last_micro_step`.
        """
        return self.auxiliary.batch(role, self.micro, self.window, per).to(self.device)

    def pairs(self, per: str = "micro") -> tuple[Batch, Batch]:
        """`aux` of role `pairs` with both answers of the same rows: (responses, rejected answers)."""
        responses, rejected = self.auxiliary.pair(self.micro, self.window, per)
        return responses.to(self.device), rejected.to(self.device)

    def generator(self, *key: str | int) -> torch.Generator:
        """Randomness that follows from the run's seed and `key`, such as a row's id and `drawn`, alone: how a step is
        divided over micro-batches and processes does not change it.
        """
        digest = sha256(repr((self.auxiliary.seed, *key)).encode()).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest[:7], "big"))

    def sum_over_processes(self, value: Tensor) -> Tensor:
        """The sum of every process's tensor, in its place."""
        if self.processes > 1:
            torch.distributed.all_reduce(value)
        return value

    def log(self, name: str, value: float | Tensor) -> None:
        """Log a loss component on its own line; values of a step's micro-batches add up."""
        self.logged[name] = self.logged.get(name, 0.0) + float(value)

    def _attention(self, layers: Sequence[int] | None) -> dict[int, nn.Module]:
        blocks = attention_blocks(self.model)
        chosen = blocks if layers is None else {layer: blocks[layer] for layer in layers}
        if min(chosen, default=self._reused) < self._reused:
            raise TrainingError(f"layer {min(chosen)} is not run anew while those below {self._reused} are reused; "
                                "ask for higher layers")  # fmt: skip
        return chosen

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")


def _last(batch: Batch, count: int) -> Tensor:
    """The last positions by their numbers: what they pick is contiguous, and multiplied faster than a slice."""
    width = batch.input_ids.shape[1]
    return torch.arange(width - count, width, device=batch.input_ids.device)
