"""The one place where chat is rendered and labels are masked.

Ids are built as prompt ids + response ids + eos, so that no merge crosses the boundary between prompt and response
(methods.md 1.2); the loss sees the response and its eos, never the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from apothecary.data.rows import Row
from apothecary.errors import DataError, ModelError, OverLong

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100


@dataclass(frozen=True)
class Rendered:
    """Token ids of one row, and where its response begins; `labels` masks everything before that."""

    row_id: str
    ids: tuple[int, ...]
    start: int  # index of the first supervised token; len(ids) for a bare prompt
    rejected: Rendered | None = None  # the same prompt with the answer that must not be given, in rows of role `pairs`

    @property
    def labels(self) -> list[int]:
        return [IGNORE] * self.start + list(self.ids[self.start :])

    @property
    def supervised(self) -> int:
        return len(self.ids) - self.start


def prompt_ids(
    prompt: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, name: str = "a prompt"
) -> list[int]:
    """Ids of the messages and of the template's opening for an assistant's turn; `name` is for messages.

    Raises ModelError without a chat template, DataError when the template refuses the messages.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of '{tokenizer.name_or_path}' has no chat template; "
            "expected a chat model: choose one, or set tokenizer.chat_template"
        )
    messages = [{"role": role, "content": content} for role, content in prompt]
    try:
        text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        raise DataError(
            f"the chat template of '{tokenizer.name_or_path}' refuses {name} with the roles "
            f"{', '.join(role for role, _ in prompt)} ({error}); change its messages, or choose another model"
        ) from error
    return token_ids(text, tokenizer)


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the template's opening for an assistant's turn alone, after bos where prompts begin with it.

    Raises ModelError where the template has no such opening.
    """
    messages = [{"role": "user", "content": "?"}]
    closed, opened = (
        str(tokenizer.apply_chat_template(messages, add_generation_prompt=opening, tokenize=False))
        for opening in (False, True)
    )
    header = opened.removeprefix(closed)
    if not header or header == opened:
        raise ModelError(
            f"the chat template of '{tokenizer.name_or_path}' has no opening of its own for an assistant's turn; "
            "expected one that add_generation_prompt appends: choose another template"
        )
    bos = str(tokenizer.bos_token or "")
    return token_ids((bos if opened.startswith(bos) else "") + header, tokenizer)


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a text alone; what is too long is told by whoever asks, not by the library."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ModelError(f"the tokenizer of '{tokenizer.name_or_path}' has no eos token; set tokenizer.eos_token")
    return eos


def render(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int, answer: str | None = None) -> Rendered:
    """Token ids of a row with its response (or with `answer` in its place), response and eos supervised.

    Raises DataError, naming the row, when there is no supervised token, OverLong when it exceeds `max_length` tokens.
    """
    response = row.response if answer is None else answer
    if not response:
        raise DataError(f"row '{row.id}' has no response, so no supervised token; add one or remove the row")
    prompt = prompt_ids(row.prompt, tokenizer, f"row '{row.id}'")
    ids = prompt + token_ids(response, tokenizer) + [eos_id(tokenizer)]
    if len(ids) > max_length:
        raise OverLong(
            f"row '{row.id}' has {len(ids)} tokens, expected at most {max_length}; shorten it, "
            "raise max_length up to the model's context, or set over_long: drop"
        )
    return Rendered(row.id, tuple(ids), len(prompt))


def render_pair(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Rendered:
    """`render` of both answers of a row of role `pairs`; raises DataError, naming the row, unless there are two."""
    if not row.rejected:
        raise DataError(f"row '{row.id}' has no rejected answer, which rows of role pairs need; add one or remove it")
    if row.rejected == row.response:
        raise DataError(f"row '{row.id}' has one text as response and as rejected answer; a pair needs two: remove it")
    other = render(row, tokenizer, max_length, row.rejected)
    return replace(render(row, tokenizer, max_length), rejected=other)


def render_prompt(row: Row, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Token ids of a row's prompt alone, ready for generation."""
    ids = prompt_ids(row.prompt, tokenizer, f"row '{row.id}'")
    return Rendered(row.id, tuple(ids), len(ids))


def render_each(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, over_long: str = "error",
    one: Callable[[Row, PreTrainedTokenizerBase, int], Rendered] = render,
) -> Iterator[Rendered]:  # fmt: skip
    """`render` (or `render_pair`) for each row; `over_long="drop"` leaves out rows that exceed `max_length`."""
    for row in rows:
        try:
            yield one(row, tokenizer, max_length)
        except OverLong:
            if over_long != "drop":
                raise


def render_all(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, over_long: str = "error",
    one: Callable[[Row, PreTrainedTokenizerBase, int], Rendered] = render,
) -> list[Rendered]:  # fmt: skip
    """`render_each` as a list, which must not be empty."""
    rendered = list(render_each(rows, tokenizer, max_length, over_long, one))
    if not rendered:
        raise DataError(f"no rows to train on; expected at least one with a response and at most {max_length} tokens")
    return rendered
