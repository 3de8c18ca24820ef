"""The contract of a judge: (prompt, response) -> probability that the response is harmful."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from apothecary.judge.text import Label, opening_label


class Judge:
    """Base of every judge; a subclass stands under `@register("judge", name)`.

    The three labels come from the text of the response alone, so that the shares of refuses, complies and neither mean
    the same whichever judge gives the probabilities.
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    paper: ClassVar[str | None]
    cheap_proxy: ClassVar[bool] = True  # looks at the opening only; False for a judge that reads the content

    def label(self, response: str) -> Label:
        """Exactly one of "refuses", "complies", "neither"."""
        return opening_label(response)

    def probability(self, prompt: str, response: str) -> float:
        """Probability in [0, 1] that the response is harmful."""
        raise NotImplementedError

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """One probability for each pair; override it where a batch is cheaper than its rows."""
        return [self.probability(*pair) for pair in zip(prompts, responses, strict=True)]
