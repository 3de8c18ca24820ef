"""The badge says what the tests showed, and the mutation check sees what it should."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import pytest
from fidelity import badge, mutation

from apothecary.registry import EVIDENCE, FIDELITY, Entry, entries

WHOLE = pytest.Config.ArgsSource.TESTPATHS
SOURCE = '''
from __future__ import annotations
LIMIT = -1.0

class Method:
    steps: int = -1

    def __post_init__(self):
        expect(1 - self.alpha)

    def step(self, x: "a - b", rows: list[int]) -> float:
        """text - text"""
        last = rows[len(rows) - 1] + x.sum(-1)
        last -= 2 * x
        name = "a" + self.name + f"{x}"
        if last < 0:
            raise ValueError(name, 1 - x)
        return -self.scale(x)

    @staticmethod
    def scale(x):
        def inner(y):
            return y - x
        return inner(x) * -0.5

    @property
    def half(self):
        return 1 - 0.5
'''


def test_a_kind_counts_when_its_tests_pass_and_the_guards_hold():
    outcomes = {"align/sft": {"reference": {"passed"}, "definition": {"passed", "failed"}, "resume": {"passed"}}}
    assert badge.badge(outcomes)["align/sft"] == ["reference", "resume"]
    assert badge.badge({"align/sft": {"reference": {"passed"}, "guard": {"passed"}}})["align/sft"] == ["reference"]
    assert badge.badge({"align/sft": {"reference": {"passed"}, "guard": {"passed", "failed"}}})["align/sft"] == []
    assert badge.badge({}) == {f"{kind}/{name}": [] for kind, name in entries()}


def test_a_method_without_a_reference_says_so():
    assert Entry("align", "x", "m", evidence=()).status == "no reference test"
    assert Entry("align", "x", "m", evidence=("definition",)).status == "definition, no reference test"
    assert Entry("align", "x", "m", evidence=("reference", "two_processes")).status == "reference, two processes"
    assert Entry("attack", "x", "m", evidence=("definition",)).status == "definition, no reference test"
    assert Entry("attack", "benign", "m", evidence=("definition",)).status == "definition"
    assert Entry("judge", "x", "m", evidence=("definition",)).status == "definition"
    assert Entry("align", "x", "m").status == "not tested here"


def test_the_stored_badges_are_of_registered_methods():
    stored = json.loads(FIDELITY.read_text("utf-8"))
    assert set(stored) <= {f"{kind}/{name}" for kind, name in entries()}
    assert all(kinds == [kind for kind in EVIDENCE if kind in kinds] for kinds in stored.values())


def test_only_signs_of_maths_are_flipped():
    found = [(sign.owner[-1], sign.text) for sign in mutation.signs(SOURCE)]
    assert found == [
        ("step", "rows[len(rows) - 1] + x.sum(-1)"),
        ("step", "last -= 2 * x"),
        ("step", "-self.scale(x)"),
        ("scale", "y - x"),
        ("scale", "-0.5"),
        ("half", "1 - 0.5"),
    ]


def test_a_flipped_sign_is_seen_by_every_reference_and_undone(tmp_path):
    path = tmp_path / "method.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("method_for_mutation", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    scale, method = module.Method.scale, module.Method()
    values = {}
    for sign in mutation.signs(SOURCE):
        if sign.owner[-1] != "step":
            with mutation.mutated(module, sign):
                values[sign.text] = scale(3.0), method.half
    assert values == {"y - x": (-3.0, 0.5), "-0.5": (0.0, 0.5), "1 - 0.5": (0.0, 1.5)}
    assert (scale(3.0), method.half) == (0.0, 0.5)


class Session:
    """A finished run: what was asked for, and its exit code."""

    def __init__(self, **asked):
        self.exitstatus, self.shouldstop = asked.pop("exitstatus", 0), False
        names = ("keyword", "deselect", "ignore", "ignore_glob", "collectonly", "markexpr", "write_fidelity")
        self.config = SimpleNamespace(option=SimpleNamespace(**dict.fromkeys(names, "") | asked), args_source=WHOLE)


def finished(monkeypatch, tmp_path, session, stored=None, outcome="passed"):
    """(exit code, lines for the terminal, what the file holds) at the end of a run."""
    file = tmp_path / "fidelity.json"
    monkeypatch.setattr(badge, "FIDELITY", file)
    if stored is not None:
        file.write_text(json.dumps(stored))
    plugin = badge.Badge(session.config)
    for when, kind, result in (("setup", "definition", "passed"), ("call", "definition", "passed"),
                               ("call", "reference", "passed"), ("call", "guard", outcome)):  # fmt: skip
        report = SimpleNamespace(when=when, outcome=result, failed=result == "failed",
                                 user_properties=[("evidence", ["align/sft", kind])])  # fmt: skip
        plugin.pytest_runtest_logreport(report)  # type: ignore[arg-type]
    plugin.pytest_sessionfinish(session, session.exitstatus)
    return session.exitstatus, plugin.says, json.loads(file.read_text()) if file.exists() else None


NOTHING = {f"{kind}/{name}": [] for kind, name in entries()}


def test_a_complete_run_fails_when_the_file_is_out_of_date(monkeypatch, tmp_path):
    shown = NOTHING | {"align/sft": ["definition", "reference"]}
    assert finished(monkeypatch, tmp_path, Session(), shown) == (0, [], shown)
    code, lines, kept = finished(monkeypatch, tmp_path, Session(), NOTHING)
    assert code == 1 and kept == NOTHING and badge.COMMAND in lines[-1]
    assert lines[0] == "align/sft: stored [], tests give ['definition', 'reference']"
    _, lines, written = finished(monkeypatch, tmp_path, Session(write_fidelity=True, markexpr="evidence"), NOTHING)
    assert written == shown and lines[0] == "wrote fidelity.json"
    _, _, written = finished(monkeypatch, tmp_path, Session(write_fidelity=True), NOTHING, outcome="failed")
    assert written == NOTHING | {"align/sft": ["definition"]}, "a flipped sign that nothing notices"


@pytest.mark.parametrize("asked", [{"keyword": "sft"}, {"markexpr": "gpu"}, {"deselect": ["x"]}, {"exitstatus": 2}])
def test_a_part_of_the_tests_decides_nothing(monkeypatch, tmp_path, asked):
    code = asked.get("exitstatus", 0)
    assert finished(monkeypatch, tmp_path, Session(**asked), NOTHING) == (code, [], NOTHING)
    code, lines, kept = finished(monkeypatch, tmp_path, Session(write_fidelity=True, **asked), NOTHING)
    assert code and kept == NOTHING and "not written from a part of the tests" in lines[0]
    some = Session(write_fidelity=True)
    some.config.args_source = pytest.Config.ArgsSource.ARGS
    assert finished(monkeypatch, tmp_path, some, NOTHING)[0] == 1


def test_evidence_for_an_unknown_method_is_named():
    assert "'align/stf'" in badge.slips({"align/stf": {"reference": {"passed"}}})[0]
    assert "'refrence'" in badge.slips({"align/sft": {"refrence": {"passed"}}})[0]
