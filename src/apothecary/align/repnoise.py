"""RepNoise: harmful representations pushed towards noise.  Rosati et al. 2024, arXiv 2405.14577.

    update with grad of  l_stab + beta * (1/L) sum_l MMD^2(m * a_l, m * eps_l) - alpha * log(1 + mean_k l_k)

l_stab: loss on the alignment batch.  a_l: output of the l-th MLP, before the residual add, on harmful answers;
eps_l ~ N(0, I).  m is 1 at tokens of a harmful sequence where the refusal of the same prompt has another token or has
ended.  l_k, k = 0..L: loss of the harmful answers when final norm and head read the k-th hidden state; 0 is what enters
the first layer, L gives the model's ordinary loss.

The alignment batch is made of the training rows, whatever a selector kept; harmful answers, and refusals to compare
them with, come from auxiliary rows of role `pairs`.  So alpha = beta = 0 is SFT on the alignment rows.  In the paper
the refusals of the pairs themselves are the stability batch, which a recipe reproduces by giving the pairs as the
alignment rows too.

MMD and log are not linear in the batch.  Both are taken over the pairs of one micro-batch on one device, as Vaccine's
norm is, and weighted by its share of the step's pairs (of their tokens or rows, as `reduction` says), so that alpha and
beta mean the same at any accumulation.  The MMD of a single pair has a gradient but a constant value: give a
micro-batch several.  Noise is keyed by seed, row and draw.

Cost: 1 forward + 1 backward over alignment and harmful rows together (two forwards where one width would cost too much
padding); the head on the response tokens of L + 1 hidden states, chunk by chunk, each chunk's logits formed once.

The paper trains all parameters on 10,000 pairs with batch_size 8, learning_rate 2e-5, 1 epoch, schedule cosine,
warmup_ratio 0.1 and weight_decay 0 (methods.md 4.4).  Its main text swaps alpha and beta; here they are those of its
appendix and code.

Deviations from the authors' code (domenicrosati/representation-noising): no hook outlives its pass; every response
token counts in the losses, also the first, those of id 0 and those that both answers share; answers may differ in
length; the last hidden state meets the final norm once.  There it meets the norm twice and the ordinary loss is added
beside it, so that L + 2 losses are divided by L + 1; here the two are one of L + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from apothecary.errors import expect
from apothecary.registry import register
from apothecary.train.method import Needs, State, TrainingMethod

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from apothecary.train.batch import Batch
    from apothecary.train.context import Output, StepContext


@register("align", "repnoise", paper="2405.14577")
@dataclass(frozen=True)
class RepNoise(TrainingMethod):
    """Hyper-parameters of RepNoise."""

    alpha: float = 1.0  # >= 0, weight of the ascent on harmful losses (paper's appendix, authors' code)
    beta: float = 0.001  # >= 0, weight of the noise loss (paper's appendix, authors' code)
    kernels: int = 5  # >= 1, Gaussian kernels of the MMD (authors' code)
    factor: float = 2.0  # > 1, ratio of successive squared bandwidths, the middle one the mean squared distance (same)

    needs = Needs(roles=("pairs",))

    def __post_init__(self) -> None:
        expect(self, "at least 0", lambda x: x >= 0, "alpha", "beta")
        expect(self, "at least 1", lambda n: n >= 1, "kernels")
        expect(self, "above 1", lambda x: x > 1, "factor")

    def init(self, ctx: StepContext) -> State:
        from apothecary.models.anatomy import logit_head

        ctx.scratch["head"] = logit_head(ctx.model)
        return {}

    def step(self, ctx: StepContext, batch: Batch, state: State) -> Tensor:
        if not self.alpha and not self.beta:
            return ctx.backward(batch)
        stability, noise, ascent = self.terms(ctx, batch)
        for name, value in (("stability", stability), ("noise", noise), ("ascent", ascent)):
            ctx.log(name, value.detach())
        return ctx.backward(stability + self.beta * noise - self.alpha * ascent)

    def terms(self, ctx: StepContext, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """This micro-batch's shares of l_stab, of the noise loss and of the ascended logarithm."""
        from apothecary.train.heads import head_loss

        refusal, harmful = ctx.pairs()
        if not harmful.row_ids:  # fewer pairs than micro-batches of all processes
            loss = ctx.loss(batch)
            return loss, loss.new_zeros(()), loss.new_zeros(())
        stable, answer = ctx.forward_each([batch, harmful], ("embedded", "hidden", "mlp_out"), logits=False)
        share = harmful.share(ctx.config.reduction)
        noise = share * self.noise_loss(ctx, answer, differing(refusal, harmful), harmful)
        mean = head_loss(ctx, ctx.scratch["head"], answer.states, harmful) / share
        return head_loss(ctx, ctx.scratch["head"], stable.states[-1:], batch), noise, share * mean.log1p()

    def noise_loss(self, ctx: StepContext, answer: Output, mask_BT: Tensor, harmful: Batch) -> Tensor:
        """(1/L) sum_l MMD^2 over the positions from the first that differs in any row."""
        from apothecary.train.internals import total
        from apothecary.train.mmd import mmd

        first = int(mask_BT.any(0).int().argmax())
        drawn = ctx.auxiliary.drawn["pairs"]
        sources = [ctx.generator(row, drawn) for row in harmful.row_ids]
        distances = []
        for out_BTD in answer.collected["mlp_out"].values():
            mask = mask_BT[:, first:, None].to(out_BTD.device)
            eps_BTD = self.noise(sources, harmful, out_BTD.shape[-1])[:, first:].to(out_BTD.device)
            x_BF, y_BF = ((mask * tensor).flatten(1) for tensor in (out_BTD[:, first:], eps_BTD))
            distances.append(mmd(x_BF, y_BF, self.kernels, self.factor))
        return total(distances) / len(distances)

    @staticmethod
    def noise(sources: list[Generator], harmful: Batch, width: int) -> Tensor:
        """eps of one layer, [B, T, D]: each row's from its own generator, so that padding does not change it."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        lengths = harmful.attention_mask.sum(1).tolist()
        rows = [torch.randn(length, width, generator=source, device=source.device)
                for length, source in zip(lengths, sources, strict=True)]  # fmt: skip
        return pad_sequence(rows, batch_first=True)


def differing(refusal: Batch, harmful: Batch) -> Tensor:
    """m, [B, T of the harmful batch]: 1 at harmful tokens other than the refusal's at the same place, or beyond it."""
    from torch.nn.functional import pad

    width = harmful.input_ids.shape[1]
    cut = [getattr(refusal, name)[:, :width] for name in ("input_ids", "attention_mask")]
    ids, there = (pad(tensor, (0, width - tensor.shape[1])) for tensor in cut)
    same = (ids == harmful.input_ids) & there.bool()
    return harmful.attention_mask.bool() & ~same
