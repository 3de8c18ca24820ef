"""What the verbs share: the terminal, progress lines, and `--key.sub=value` arguments."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from apothecary.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from apothecary.pipeline.run import Progress

OVERRIDES: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}  # settings of a verb's context


def overrides(context: typer.Context) -> list[str]:
    """The `--key.sub=value` arguments; ConfigError for whatever else was not understood."""
    for word in context.args:
        if not word.startswith("--") or "=" not in word:
            names = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
            what = "option" if word.startswith("-") else "argument"
            raise ConfigError(
                f"unknown {what} '{word}' of '{context.info_name}', expected its options or --key.sub=value; "
                f"{did_you_mean(word, names)}"
            )
    return list(context.args)


def is_terminal() -> bool:
    """Whether pictures may be drawn: progress bars, tables, colours."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def width() -> int | None:
    """Characters of a line in the terminal; None where lines may have any length."""
    return shutil.get_terminal_size().columns if is_terminal() else None


def console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


class Lines:
    """One line for each thing that happens in a run."""

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, update: Progress) -> None:
        detail = update.detail
        if update.event == "cached":
            self.say(f"cached    {update.stage}", detail)
        elif update.event == "started":
            self.say(f"started   {update.stage}", detail)
        elif update.event == "finished":
            self.say(f"finished  {update.stage} ({detail.get('seconds', 0):.0f} s)", detail)
        elif update.event == "waiting":
            self.say(f"waiting   {update.stage}: another process works on it", detail)

    def say(self, text: str, detail: Mapping[str, Any]) -> None:
        total = detail.get("total")
        count = f"[{min(detail.get('done', 0) + 1, total):>2}/{total}] " if total else ""
        print(f"{count}{text}", flush=True)


class Bar(Lines):
    """The same for a terminal: a bar, with a line above it for each stage that was worked on."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars
        from rich.table import Column

        name = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
        columns = (name, BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
        self.bars = Bars(*columns, console=console(), transient=True)
        self.task = self.bars.add_task("planning", total=None)

    def __enter__(self) -> Bar:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def __call__(self, update: Progress) -> None:
        from rich.markup import escape

        name = escape(update.stage)
        detail = update.detail
        if update.event == "finished":
            self.bars.print(f"[green]done[/]  {name} [dim]{detail.get('seconds', 0):.0f} s[/]")
        words = {"started": name, "waiting": f"waiting for another process: {name}"}
        total, done = detail.get("total"), detail.get("done")
        self.bars.update(self.task, total=total, completed=done, description=words.get(update.event))


def progress() -> Lines:
    """What shows a run's progress here."""
    return Bar() if is_terminal() else Lines()


def print_table(headings: list[str], rows: list[list[str]]) -> None:
    """A table in a terminal; elsewhere lines with tabs, which other programs can read."""
    if not is_terminal():
        for row in [headings, *rows]:
            print("\t".join(row))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(*headings, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*map(Text, row))
    console().print(table)
