"""The fidelity badge: which kinds of evidence pass for each method, collected from the tests that carry the marker.

    @pytest.mark.evidence("align/vaccine", "reference", "finite_difference")

A kind counts when at least one of its tests passes and none fails; "reference" also needs the guards: no sign of the
method can be flipped unnoticed (test_mutations.py) and the reference uses none of our code (test_references.py).
At the end of a complete run the result is compared with `src/apothecary/fidelity.json`, and a difference fails the
run.  `python -m pytest -m evidence --write-fidelity` writes that file.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from apothecary.registry import EVIDENCE, FIDELITY, entries

GUARD = "guard"
COMMAND = "python -m pytest -m evidence --write-fidelity"
Outcomes = dict[str, dict[str, set[str]]]  # method -> kind -> outcomes seen


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-fidelity", action="store_true", help="write src/apothecary/fidelity.json from this run")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Badge(config), "badge")


def evidence_of(item: Any) -> list[tuple[str, str]]:
    """(method, kind) pairs of a test."""
    return [(mark.args[0], kind) for mark in item.iter_markers("evidence") for kind in mark.args[1:]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") is None:  # a badge must not depend on the machine
            item.user_properties += [("evidence", [method, kind]) for method, kind in evidence_of(item)]


def badge(outcomes: Outcomes) -> dict[str, list[str]]:
    """The kinds that pass, for every registered method."""
    found = {}
    for kind, name in entries():
        seen = outcomes.get(f"{kind}/{name}", {})
        passing = [each for each in EVIDENCE if seen.get(each) == {"passed"}]
        if "failed" in seen.get(GUARD, ()):
            passing = [each for each in passing if each != "reference"]
        found[f"{kind}/{name}"] = passing
    return found


def slips(outcomes: Outcomes) -> list[str]:
    """Evidence for what does not exist: a typing slip would hide it."""
    methods, kinds = {f"{kind}/{name}" for kind, name in entries()}, {*EVIDENCE, GUARD}
    return [
        f"evidence({method!r}, {kind!r}) names no registered method, or a kind other than {', '.join(EVIDENCE)}"
        for method, seen in outcomes.items()
        for kind in seen
        if method not in methods or kind not in kinds
    ]


class Badge:
    """Lives where the reports of all processes arrive."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.outcomes: Outcomes = defaultdict(lambda: defaultdict(set))
        self.says: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            for name, pair in report.user_properties:
                if name == "evidence" and report.outcome != "skipped":
                    self.outcomes[pair[0]][pair[1]].add(report.outcome)

    def complete(self) -> bool:
        """Whether every test with evidence was asked for."""
        option = self.config.option
        narrowed = (option.keyword, option.deselect, option.ignore, option.ignore_glob, option.collectonly,
                    getattr(option, "lf", False), getattr(option, "stepwise", False))  # fmt: skip
        whole = self.config.args_source is pytest.Config.ArgsSource.TESTPATHS
        return whole and not any(narrowed) and option.markexpr in ("", "evidence")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        writing = self.config.option.write_fidelity
        stopped = exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or session.shouldstop
        if not self.complete() or stopped:
            if writing:
                self.fail(session, f"fidelity.json is not written from a part of the tests; run {COMMAND}")
            return
        if wrong := slips(self.outcomes):
            self.fail(session, *wrong)
            return
        found = badge(self.outcomes)
        stored = json.loads(FIDELITY.read_text("utf-8")) if FIDELITY.exists() else {}
        if writing:
            lines = (f"  {json.dumps(method)}: {json.dumps(kinds)}" for method, kinds in found.items())
            FIDELITY.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
            self.says = ["wrote fidelity.json", *differences(stored, found)]
        elif found != stored:
            self.fail(session, *differences(stored, found), f"fidelity.json is out of date; run {COMMAND}")

    def fail(self, session: pytest.Session, *lines: str) -> None:
        self.says = list(lines)
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.says:
            terminalreporter.section("fidelity")
            for line in self.says:
                terminalreporter.line(line)


def differences(stored: dict[str, list[str]], found: dict[str, list[str]]) -> Iterator[str]:
    for method in sorted(stored.keys() | found.keys()):
        if stored.get(method) != found.get(method):
            yield f"{method}: stored {stored.get(method)}, tests give {found.get(method)}"
