"""What is stored beside the measured numbers follows from them: no page or derived figure lags behind the code."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apothecary.cli import main
from apothecary.judge.exam import Kind, Report, exam_scores

ROOT = Path(__file__).parents[2]


def examined(part: Any) -> Iterator[dict[str, Any]]:
    """The scores that carry a judge's exam."""
    if isinstance(part, dict):
        if isinstance(part.get("exam"), dict) and part.get("flagged") is not None:
            yield part
        for each in part.values():
            yield from examined(each)
    elif isinstance(part, list):
        for each in part:
            yield from examined(each)


@pytest.mark.parametrize("name", ["attacker", "attacks"])
def test_harm_is_corrected_as_the_exam_says_today(name: str):
    found = list(examined(json.loads((ROOT / "recipes" / "results" / f"{name}.json").read_text("utf-8"))))
    assert len(found) > 10
    for scores in found:
        exam, n = scores["exam"], int(scores["judged"] if "judged" in scores else scores["n"])
        report = Report({}, "", {kind: Kind(**counts) for kind, counts in exam["kinds"].items()})
        assert exam_scores(report, round(scores["flagged"] * n), n) == exam


def test_the_leaderboard_is_that_of_the_committed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    assert main(["leaderboard", "--out", str(tmp_path / "leaderboard.html")]) == 0
    assert (tmp_path / "leaderboard.html").read_text("utf-8") == (ROOT / "docs/leaderboard.html").read_text("utf-8")


def test_the_first_picture_is_that_of_the_committed_sweep():
    spec = importlib.util.spec_from_file_location("write_picture", ROOT / "scripts" / "write_picture.py")
    assert spec and spec.loader
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    results = json.loads((ROOT / "recipes" / "results" / "attacker.json").read_text("utf-8"))
    assert picture.standalone(*picture.plane(results)) == (ROOT / "docs" / "plane.svg").read_text("utf-8")
