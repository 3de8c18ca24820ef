"""The benchmark of gradient scores: it compares like with like, and writes down what it measured."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import selection
from benchmarks.subjects import SHAPES, make_subject


@pytest.mark.parametrize("layout", ["lora", "full"])
def test_quick_and_single_scores_are_the_same_numbers(layout):
    subject = make_subject(replace(SHAPES["tiny"], rows=7), layout)
    subject.begin()
    subject.ctx.model.eval()
    ways = selection.slopes(subject.ctx, subject.batch, 3)
    if layout == "lora":
        ways |= selection.less(subject.ctx, subject.batch, 3)
    for quick in selection.AGAINST.keys() & ways.keys():
        found, exact = ways[quick](), ways[selection.AGAINST[quick]]()
        assert found.shape == (7,) and torch.corrcoef(torch.stack([found, exact]))[0, 1] > 0.999
        torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-3 * exact.abs().max().item())


def test_rounds_are_added_to_the_file_and_summed_up(tmp_path):
    out = tmp_path / "selection.json"
    given = ["--out", str(out), "--shape", "tiny", "--rows", "6", "--batch", "3"]
    selection.main([*given, "--rounds", "1"])
    first = json.loads(out.read_text())["rounds"]
    selection.main([*given, "--rounds", "2"])
    result = json.loads(out.read_text())
    assert result["rounds"][:1] == first and len(result["rounds"]) == 2
    assert result["summary"].keys() == {"lora: fast", "lora: less", "full: fast"}
    for entry in result["summary"].values():
        assert entry["least"] <= entry["ratio"] <= entry["most"] and entry["correlation"] > 0.999
    assert result["settings"]["rows"] == 6 and result["settings"]["pool"] == 5000


def test_a_target_is_met_by_speed_and_by_agreement():
    def rounds(slow, agreement):
        seconds = {"fast": 1.0, "single": slow, "less": 1.0, "less, single": 1.0}
        entry = {"seconds": seconds, "correlation": {"fast": agreement, "less": 1.0}}
        return {"settings": {"device": "cpu", "rows": 10}, "rounds": [{"lora": entry, "full": entry}]}

    def met(slow, agreement):
        found = selection.summarise(rounds(slow, agreement))
        return found["lora: fast"]["met"], found["full: fast"]["met"]

    assert met(2.1, 1.0) == (True, True) and met(1.7, 1.0) == (True, False) and met(2.1, 0.99) == (False, False)
