"""Which prompts are evaluated: the four roles of a suite, their sources and the settings of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from apothecary.data.formats import unique_ids
from apothecary.data.rows import Row
from apothecary.data.sources import DataSource, load_rows
from apothecary.errors import ConfigError, DataError, did_you_mean

T = TypeVar("T")
SUITES = ("harmful", "benign", "overrefusal", "task")


@dataclass(frozen=True)
class EvalConfig:
    """Sources for each suite (the defaults are the lab's held-out splits) and how answers are generated and judged."""

    harmful: tuple[DataSource, ...] = (DataSource("lab:eval_harmbench"), DataSource("lab:eval_jailbreakbench"))
    benign: tuple[DataSource, ...] = (DataSource("lab:eval_benign"),)
    overrefusal: tuple[DataSource, ...] = (
        DataSource("lab:overrefusal_xstest_safe"),
        DataSource("lab:overrefusal_jailbreakbench"),
    )
    task: tuple[DataSource, ...] = (DataSource("lab:customer_test"),)
    judge: str = "opening"
    max_new_tokens: int = 16  # tokens; the cheap proxies read the opening only
    batch_size: int = 64  # prompts
    limit: int | None = None  # prompts of each suite, spread evenly over it; None: all

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, expected a whole number of at least 1")


def spread(rows: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` rows, evenly spaced: sources that follow each other keep their proportions."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]


def load_suites(config: EvalConfig) -> dict[str, list[Row]]:
    """The prompts of each suite that has a source: those that `asked` leaves."""
    sources = {name: getattr(config, name) for name in SUITES if getattr(config, name)}
    rows = {name: [row for source in some for row in load_rows(source, "prompt")] for name, some in sources.items()}
    return asked(rows, config.limit)


def asked(suites: Mapping[str, Iterable[Row]], limit: int | None) -> dict[str, list[Row]]:
    """Which prompts are asked: of each suite every (prompt, expected answer) once, and at most `limit` of these."""
    found = {}
    for name, rows in suites.items():
        once: dict[tuple[object, ...], Row] = {}
        for row in rows:
            once.setdefault((row.prompt, row.response), row)
        found[name] = spread(unique_ids(once.values()), limit)
    return found


def check_suites(suites: Mapping[str, Sequence[Row]]) -> None:
    """Raise ConfigError for unknown suites, DataError for empty ones, repeated ids and task rows without an answer."""
    if not suites:
        raise DataError(f"got no suite to evaluate, expected at least one of {', '.join(SUITES)}")
    for name, rows in suites.items():
        if name not in SUITES:
            raise ConfigError(f"unknown suite '{name}'; {did_you_mean(name, SUITES)}")
        if not rows:
            raise DataError(f"suite '{name}' is empty, expected at least one prompt; check its sources")
        seen: set[str] = set()
        for row in rows:
            if row.id in seen:
                raise DataError(
                    f"suite '{name}' has two rows with the id '{row.id}', expected each prompt once; remove one of them"
                )
            seen.add(row.id)
            if name == "task" and not row.response:
                raise DataError(f"task row '{row.id}' has no response, expected the right answer; add one")
