"""What a user looks at before anything else: rows as the model will see them, lengths, duplicates, problems."""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from apothecary.data.batching import padding_share, plan
from apothecary.data.chat import Rendered, render, render_prompt
from apothecary.data.near import near_pairs
from apothecary.data.rows import Row
from apothecary.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

MOST_PAIRS = 1000  # near duplicates looked up: their number may grow with the square of the rows
MOST_BUCKETS = 12
PADDING_BATCH = 16  # rows
MOST_IDS = 8  # named for each problem
MOST_CHARACTERS = 1500  # of a prompt or a response on the screen
# Controls could rewrite the terminal, direction marks hide text: both are shown as their code.
_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; lists of ids are in the order of the rows."""

    rows: tuple[Rendered, ...]
    max_length: int
    lengths: tuple[int, ...]  # tokens of each row: prompt, response and eos
    supervised: int  # tokens that the loss sees, over all rows
    histogram: tuple[tuple[int, int, int], ...]  # (low, high, rows with low <= tokens < high)
    duplicates: tuple[tuple[str, ...], ...]  # groups of ids with the same prompt and response but for case and spaces
    near_duplicates: tuple[tuple[str, str], ...]  # ids of rows whose prompts are close; at most MOST_PAIRS
    empty: tuple[str, ...]  # a response of spaces only, or of nothing
    over_long: tuple[str, ...]  # more than max_length tokens with the response or the rejected answer
    unsupervised: tuple[str, ...]  # no response, so no supervised token
    refused: tuple[str, ...]  # messages that the chat template does not accept; shown as rows of no token
    special: tuple[str, ...]  # text that holds one of the tokenizer's special tokens, which can forge a turn
    roles: dict[str, int]
    sources: dict[str, int]
    decode: Callable[[Sequence[int]], str] = field(repr=False, compare=False)

    @property
    def problems(self) -> list[tuple[str, list[str]]]:
        """(what is wrong, ids of the rows) for each kind of problem that occurs."""
        more = " or more" if len(self.near_duplicates) == MOST_PAIRS else ""
        limit = f"{self.max_length} tokens"
        close = [" ~ ".join(pair) for pair in self.near_duplicates]
        found = [
            (f"{len(self.unsupervised)} rows without a supervised token", list(self.unsupervised)),
            (f"{len(self.refused)} rows that the chat template refuses", list(self.refused)),
            (f"{len(self.empty)} empty responses", list(self.empty)),
            (f"{len(self.over_long)} rows longer than {limit} with either answer", list(self.over_long)),
            (f"{len(self.special)} rows with special tokens in their text", list(self.special)),
            (f"{len(self.duplicates)} groups of duplicates", [" = ".join(group) for group in self.duplicates]),
            (f"{len(self.near_duplicates)}{more} pairs of near duplicates", close),
        ]
        return [(what, ids) for what, ids in found if ids]


def inspect(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Inspection:
    """Render every row and collect what would trouble training; nothing here raises for a single bad row.

    `max_length` is in tokens.  Raises ModelError when the tokenizer cannot render chat at all.
    """
    rendered, refused = _render(rows, tokenizer)
    lengths = tuple(len(row.ids) for row in rendered)
    longest = [
        max(n, len(render(row, tokenizer, sys.maxsize, row.rejected).ids)) if n and row.rejected else n
        for n, row in zip(lengths, rows, strict=True)
    ]
    groups = _duplicates(rows)
    return Inspection(
        rows=rendered,
        max_length=max_length,
        lengths=lengths,
        supervised=sum(row.supervised for row in rendered),
        histogram=histogram(lengths),
        duplicates=groups,
        near_duplicates=tuple(islice(_near(rows, groups), MOST_PAIRS)),
        empty=tuple(row.id for row in rows if row.response is not None and not row.response.strip()),
        over_long=tuple(row.id for row, n in zip(rows, longest, strict=True) if n > max_length),
        unsupervised=tuple(row.id for row in rows if not row.response),
        refused=refused,
        special=tuple(row.id for row in rows if _has_special(row, tokenizer)),
        roles=dict(Counter(row.role for row in rows)),
        sources=dict(Counter(row.source for row in rows)),
        decode=lambda ids: str(tokenizer.decode(list(ids))),
    )


def _render(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[Rendered, ...], tuple[str, ...]]:
    rendered, refused = [], []
    for row in rows:
        try:
            rendered.append(render(row, tokenizer, sys.maxsize) if row.response else render_prompt(row, tokenizer))
        except DataError:
            rendered.append(Rendered(row.id, (), 0))
            refused.append(row.id)
    return tuple(rendered), tuple(refused)


def histogram(lengths: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """(low, high, count) with low <= length < high: at most MOST_BUCKETS buckets of a round width, empty ends cut."""
    if not lengths:
        return ()
    low, high = min(lengths), max(lengths)
    widths = (digit * 10**power for power in range(20) for digit in (1, 2, 5))
    width = next(w for w in widths if high // w - low // w < MOST_BUCKETS)
    count = Counter(length // width for length in lengths)
    return tuple((i * width, (i + 1) * width, count[i]) for i in range(low // width, high // width + 1))


def _duplicates(rows: Sequence[Row]) -> tuple[tuple[str, ...], ...]:
    groups: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        parts = [*(content for _, content in row.prompt), row.response or ""]
        groups["\0".join(" ".join(part.split()).casefold() for part in parts)].append(row.id)
    return tuple(tuple(ids) for ids in groups.values() if len(ids) > 1)


def _near(rows: Sequence[Row], groups: Sequence[Sequence[str]]) -> Iterator[tuple[str, str]]:
    """Pairs with close prompts that are in no common group of duplicates."""
    group_of = {row_id: number for number, ids in enumerate(groups) for row_id in ids}
    for i, j in near_pairs(_varying([row.text for row in rows])):
        a, b = rows[i].id, rows[j].id
        if a not in group_of or group_of[a] != group_of.get(b):
            yield a, b


def _varying(texts: Sequence[str]) -> list[str]:
    """The texts without lines that most of them share: a fixed instruction would make every short row look alike."""
    lines = Counter(line for text in texts for line in set(text.split("\n")))
    shared = {line for line, count in lines.items() if count > max(2, len(texts) / 2)}
    stripped = ("\n".join(line for line in text.split("\n") if line not in shared) for text in texts)
    return [rest if rest.strip() else text for rest, text in zip(stripped, texts, strict=True)]


def _has_special(row: Row, tokenizer: Any) -> bool:
    texts = [*(content for _, content in row.prompt), row.response or "", row.rejected or ""]
    return any(token in text for token in tokenizer.all_special_tokens for text in texts)


def show(inspection: Inspection, console: Console, limit: int = 5) -> None:
    """Print the first `limit` rows, the lengths and the problems; without colour, [[ ]] mark what is supervised."""
    from rich.text import Text

    def line(text: str | Text = "") -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    coloured = console.is_terminal and not console.no_color
    for row in inspection.rows[:limit]:
        line(Text(f"{_visible(row.row_id)}  {len(row.ids)} tokens, {row.supervised} supervised", style="bold"))
        line(_picture(row, inspection.decode, coloured))
        line()
    count, lengths = len(inspection.rows), inspection.lengths
    line(f"{count} rows, {sum(lengths)} tokens, {inspection.supervised} supervised, "
         f"{max(lengths, default=0)} in the longest row")  # fmt: skip
    for what, number_of in (("roles", inspection.roles), ("sources", inspection.sources)):
        if any(number_of):
            line(f"{what}: " + ", ".join(f"{_visible(name) or 'none'} {number}" for name, number in number_of.items()))
    if count:
        share = padding_share(lengths, plan(lengths, PADDING_BATCH, seed=0, epoch=0))
        line(f"padding: {share:.1%} of the tokens of length-grouped batches of {PADDING_BATCH} rows")
    _show_lengths(inspection, line, "█" if console.encoding.lower().startswith("utf") else "#")
    line(Text("no problems found" if not inspection.problems else "problems", style="bold"))
    for what, ids in inspection.problems:
        more = f", and {len(ids) - MOST_IDS} more" if len(ids) > MOST_IDS else ""
        line(f"  {what}: {_visible(', '.join(ids[:MOST_IDS]))}{more}")


def _picture(row: Rendered, decode: Callable[[Sequence[int]], str], coloured: bool) -> Text:
    from rich.text import Text

    text = Text(_visible(decode(row.ids[: row.start])), style="dim")
    if row.supervised:
        response, eos = decode(row.ids[row.start : -1]), decode(row.ids[-1:])
        text.append("" if coloured else "[[")
        text.append(_visible(response), style="not dim green")
        text.append(_visible(eos), style="not dim bold green reverse")
        text.append("" if coloured else "]]")
    return text


def _show_lengths(inspection: Inspection, line: Callable[[str], None], block: str) -> None:
    line("tokens per row")
    most = max((count for _, _, count in inspection.histogram), default=0)
    for low, high, count in inspection.histogram:
        bar = block * max(round(40 * count / most), count > 0)
        line(f"  {low:>6}{f'-{high - 1}' if high - low > 1 else '':<7} {bar} {count}")


def _visible(text: str) -> str:
    text = _HIDDEN.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}... ({len(text)} characters)"
