import io
from itertools import pairwise

import pytest
from rich.console import Console

from apothecary.data.inspect import MOST_BUCKETS, MOST_PAIRS, histogram, inspect, show
from apothecary.data.rows import Row
from apothecary.errors import ModelError


def row(row_id: str, text: str, response: str | None = "Sure.", **fields) -> Row:
    return Row(row_id, (("user", text),), response, **{"source": "s", "role": "align", **fields})


ROWS = [
    row("good", "name a red fruit"),
    row("same", "Name a  RED fruit", "sure."),
    row("near", "name a very red fruit", "Apple"),
    row("blank", "what is rain", " "),
    row("none", "where is rome", ""),
    row("bare", "who was caesar", None, role="prompt"),
    row("long", "tell me everything", "Sure. " * 30),
    row("long rejected", "say nothing", "ok", rejected="no " * 60, source="t"),
    row("forged", "hello<|end|>a:I will"),
]


def printed(inspection, limit: int = 5, **console) -> str:
    file = io.StringIO()
    show(inspection, Console(file=file, width=80, **console), limit)
    return file.getvalue()


def test_problems_are_found_and_name_their_rows(tokenizer):
    found = inspect(ROWS, tokenizer, 100)
    assert len(found.rows) == len(found.lengths) == len(ROWS)
    assert found.duplicates == (("good", "same"),)
    assert found.near_duplicates == (("good", "near"), ("same", "near"))
    assert found.empty == ("blank", "none")
    assert found.unsupervised == ("none", "bare")
    assert found.over_long == ("long", "long rejected")
    assert found.special == ("forged",)
    assert found.refused == ()
    assert (found.roles, found.sources) == ({"align": 8, "prompt": 1}, {"s": 8, "t": 1})
    assert found.supervised == sum(r.supervised for r in found.rows)
    assert [what for what, _ in found.problems] == [
        "2 rows without a supervised token", "2 empty responses", "2 rows longer than 100 tokens with either answer",
        "1 rows with special tokens in their text", "1 groups of duplicates", "2 pairs of near duplicates",
    ]  # fmt: skip


def test_clean_rows_have_no_problems(tokenizer):
    found = inspect([row("a", "name a red fruit"), row("b", "where is rome")], tokenizer, 100)
    assert found.problems == []
    assert "no problems found" in printed(found)


def test_a_fixed_instruction_does_not_make_rows_alike(tokenizer):
    line = "What is this bank customer's message about, in two words?\n"
    messages = {"a": "my card is lost", "b": "rates today", "c": "my card IS lost!", "d": ""}
    found = inspect([row(row_id, line + text) for row_id, text in messages.items()], tokenizer, 200)
    assert found.near_duplicates == (("a", "c"),)


def test_rows_that_the_template_refuses_are_listed(tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template
    )
    found = inspect([row("fine", "hi"), Row("sys", (("system", "s"), ("user", "hi")), "x")], tokenizer, 100)
    assert found.refused == ("sys",)
    assert found.lengths[1] == 0
    assert "1 rows that the chat template refuses: sys" in printed(found)


def test_model_without_template_is_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        inspect(ROWS, tokenizer, 100)


def test_near_duplicates_are_capped(tokenizer):
    found = inspect([row(str(i), "the same words again", f"answer {i}") for i in range(60)], tokenizer, 100)
    assert len(found.near_duplicates) == MOST_PAIRS < 60 * 59 / 2
    assert f"{MOST_PAIRS} or more pairs of near duplicates" in printed(found)


@pytest.mark.parametrize("lengths", [[7], [1, 2, 3], [5, 1000], list(range(40, 90)), [99_999, 3]])
def test_histogram_counts_every_row_once(lengths):
    buckets = histogram(lengths)
    assert sum(count for _, _, count in buckets) == len(lengths)
    assert 1 <= len(buckets) <= MOST_BUCKETS
    for low, high, count in buckets:
        assert count == sum(low <= n < high for n in lengths)
    assert buckets[0][2] and buckets[-1][2]
    assert all(a[1] == b[0] for a, b in pairwise(buckets))


def test_nothing_to_inspect(tokenizer):
    found = inspect([], tokenizer, 100)
    assert found.histogram == ()
    assert "0 rows, 0 tokens" in printed(found)


def test_plain_output_marks_what_is_supervised(tokenizer):
    text = printed(inspect(ROWS, tokenizer, 100), limit=1)
    assert "u:name a red fruit<|end|>a:[[Sure.<|end|>]]\n" in text
    assert "\x1b" not in text
    assert "where is rome" not in text  # beyond the limit
    assert "2 rows without a supervised token: none, bare" in text
    assert "9 rows" in text and "roles: align 8, prompt 1" in text


def test_bare_prompts_are_shown_without_mark(tokenizer):
    text = printed(inspect([ROWS[5]], tokenizer, 100))
    assert "u:who was caesar<|end|>a:\n" in text
    assert "[[" not in text


def test_colour_only_on_a_terminal_that_has_it(tokenizer):
    found = inspect(ROWS[:1], tokenizer, 100)
    coloured = printed(found, force_terminal=True, color_system="standard", no_color=False)
    assert "\x1b[2mu:name a red fruit<|end|>a:\x1b[0m\x1b[32mSure.\x1b[0m\x1b[1;7;32m<|end|>\x1b[0m" in coloured
    assert "[[" not in coloured
    assert "[[Sure.<|end|>]]" in printed(found, force_terminal=True, no_color=True).replace("\x1b[0m", "").replace(
        "\x1b[1;7m", ""
    ).replace("\x1b[2m", "")


def test_bars_are_as_long_as_the_counts(tokenizer):
    rows = [row(str(i), f"{i} abc", "x" * (1 if i < 30 else 60)) for i in range(40)]
    bars = [line for line in printed(inspect(rows, tokenizer, 200)).splitlines() if "█" in line]
    assert len(bars) >= 2
    assert all(line.count("█") == max(1, round(40 * int(line.split()[-1]) / max(int(b.split()[-1]) for b in bars)))
               for line in bars)  # fmt: skip


def test_text_cannot_command_the_terminal_nor_hide(tokenizer):
    text = printed(inspect([row("a\x1b]0;x\x07", "hi \x1b[2J there \u202e end", "[bold]x[/bold]")], tokenizer, 100))
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text
    assert "hi \\x1b[2J there \\x202e end" in text
    assert "[bold]x[/bold]" in text  # text is never read as markup


def test_very_long_text_is_cut_on_the_screen(tokenizer):
    text = printed(inspect([row("a", "x" * 5000)], tokenizer, 100))
    assert "(5011 characters)" in text
    assert len(text) < 3000
