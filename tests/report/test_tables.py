"""Groups, intervals and the table for the terminal."""

from __future__ import annotations

import math
import re

import pytest

from apothecary.report.summary import summarise
from apothecary.report.tables import table
from apothecary.report.text import duration, memory, number, ratio, shorten, signed
from apothecary.stats import mean_interval, wilson


def seeds(*complied, n=100, **harmful):
    models = [
        {"arm": "undefended", "p": 0.1, "seed": i, "align": "sft", "finetune": "sft",
         "scores": {"harmful": {"n": n, "counts": {"complies": k, "refuses": n - k, "neither": 0}, **harmful}}}
        for i, k in enumerate(complied)
    ]  # fmt: skip
    return summarise({"models": models}).tuned[0]


def test_one_seed_has_wilsons_interval():
    harm = seeds(84).get("harmful", "HS")
    assert (harm.low, harm.high) == pytest.approx(wilson(84, 100)) and harm.value == 0.84


def test_several_seeds_take_the_wider_interval():
    spread = seeds(60, 80, 95).get("harmful", "HS")
    low, high = mean_interval([0.6, 0.8, 0.95])
    assert (spread.low, spread.high) == (pytest.approx(low), min(1.0, high)) and spread.seeds == 3
    equal = seeds(84, 84, 84).get("harmful", "HS")
    assert (equal.low, equal.high) == pytest.approx(wilson(84, 100)), "equal seeds do not make the prompts certain"
    assert equal.n == 100


def test_extremes_stay_within_the_unit_interval():
    two = seeds(100, 98).get("harmful", "HS")
    assert 0 <= two.low <= two.value <= two.high == 1.0


def test_shares_without_counts_are_used():
    models = [{"arm": "a", "p": 0.1, "scores": {"benign": {"n": 50, "answered": 0.9}, "overrefusal": {"n": 0}}}]
    group = summarise({"models": models}).tuned[0]
    assert group.get("benign", "answered").value == pytest.approx(0.9)
    assert group.get("overrefusal", "refuses") is None and group.get("harmful", "HS") is None


def test_margin_keeps_the_interval_of_its_prompts():
    assert math.isnan(seeds(84, margin=-1.5).margin().low) and seeds(84).margin() is None
    one = seeds(84, margin=-1.5, intervals={"margin": [-1.7, -1.3]}).margin()
    assert (one.low, one.high) == pytest.approx((-1.7, -1.3))
    equal = seeds(84, 85, margin=-1.5, intervals={"margin": [-1.7, -1.3]}).margin()
    assert (equal.low, equal.high) == pytest.approx((-1.7, -1.3)), "equal seeds do not make the prompts certain"
    spread = seeds(84, 85, margin=-1.5)
    spread.models[1]["scores"]["harmful"]["margin"] = -0.5
    assert spread.margin().low == pytest.approx(mean_interval([-1.5, -0.5]).low)


def test_the_plus_score_adds_neither():
    counts = {"refuses": 20, "complies": 50, "neither": 30}
    group = summarise({"models": [{"arm": "a", "p": 0.1, "scores": {"harmful": {"n": 100, "counts": counts}}}]}).tuned[
        0
    ]
    assert group.get("harmful", "HS").value == 0.5 and group.get("harmful", "HS+").value == 0.8


def test_undefended_comes_first_and_has_its_own_colour(demo):
    demo["models"].reverse()
    view = summarise(demo)
    assert view.arms[0] == "undefended" and [view.slot(arm) for arm in view.arms] == [0, 1, 2, 3, 4]
    assert [group.p for group in view.of("vaccine")] == [0.0, 0.1]
    assert view.references[0].label == "base" and view.aligned().label == "aligned"


def test_aligned_models_of_one_name_are_told_apart():
    made = [{"arm": "aligned", "stage": "aligned", "align": align, "curate": curate}
            for align, curate in (("vaccine", None), ("sft", "random 50 %"))]  # fmt: skip
    labels = [group.label for group in summarise({"models": made}).references]
    assert labels == ["aligned (vaccine)", "aligned (sft, random 50 %)"]


def test_table_is_aligned_and_complete(full):
    lines = table(full).splitlines()
    rule = next(i for i, line in enumerate(lines) if set(line) == {"─"})
    body = lines[rule + 1 : lines.index("")]
    assert len(body) == 3 + 15 and {len(line) for line in body} == {len(lines[rule])}
    view = summarise(full)
    harm = view.at("undefended", 0.1).get("harmful", "HS")
    row = next(line for line in body if line.startswith("undefended") and " 10 % " in line)
    assert row.split("10 %")[1].split()[0] == f"{100 * harm.value:.0f}"
    assert f"[{100 * harm.low:.0f}, {100 * harm.high:.0f}]" in row
    assert row.endswith(" 50"), "28.5 s of alignment and 21 s of fine-tuning"
    assert "lower is better" in lines[-2] and "cheap proxy" in lines[-1]
    assert max(map(len, lines)) <= 140


def test_a_narrow_terminal_gets_a_table_in_blocks(full):
    wide, narrow = table(full).splitlines(), table(full, 80).splitlines()
    *blocks, _notes = table(full, 80).split("\n\n")
    assert len(blocks) > 1 and len({len(block.split("─\n")[1].splitlines()) for block in blocks}) == 1
    assert all(word in blocks[0].splitlines()[0] for word in ("HS", "HS+", "refuses", "neither"))
    assert max(map(len, narrow[: narrow.index("")])) <= 90 and table(full, 200).splitlines() == wide
    intervals = [re.findall(r"\[\d+, \d+\]", text) for text in ("\n".join(blocks), "\n".join(wide))]
    assert sorted(intervals[0]) == sorted(intervals[1])


def test_table_of_nothing_and_of_a_part(build):
    assert table({}) == "No model has been evaluated yet."
    part = build(("undefended",), (0.1,), 1)
    for model in part["models"]:
        del model["scores"]["task"]
    part["stages"] = []
    assert "accuracy" not in table(part) and "seconds" not in table(part)


def test_another_judge_is_named(build):
    results = build(("undefended",), (0.1,), 1)
    for model in results["models"]:
        model["scores"]["harmful"]["judge"] = "guard"
    assert "Judge: guard." in table(results) and "cheap proxy" not in table(results)


def test_every_cheap_proxy_is_called_one(build):
    results = build(("undefended",), (0.1,), 1)

    def note(judge, cheap):
        for model in results["models"]:
            model["scores"]["harmful"].update(judge=judge, cheap_proxy=cheap)
        return table(results).splitlines()[-1]

    refusal = "The judge `refusal` is a cheap proxy: it looks at how a response begins and measures whether it refuses"
    assert note("refusal", True).startswith(refusal)
    assert "`words` is a cheap proxy: it does not read" in note("words", True)
    assert "cheap proxy" not in note("guard", False) and "a judge can be wrong" in note("guard", False)
    results["models"][0]["scores"]["harmful"].update(judge="refusal", cheap_proxy=True)
    both = table(results).splitlines()[-1]
    assert "`refusal` is a cheap proxy" in both and "Judge: guard." in both


def test_numbers_as_written():
    assert [number(x) for x in (0, 0.004, 0.01, 0.5, 0.996, 1)] == ["0", "0.4", "1", "50", "99.6", "100"]
    assert [ratio(p) for p in (0.0, 0.05, 0.125, 1.0, None)] == ["0 %", "5 %", "12.5 %", "100 %", "not stated"]
    assert [duration(s) for s in (None, 1.25, 59.6, 150, 3725)] == [
        "\u2013",
        "1.2 s",
        "60 s",
        "2 min 30 s",
        "1 h 02 min",
    ]
    assert [memory(m) for m in (None, 812.4, 2048)] == ["\u2013", "812 MB", "2.0 GB"]
    assert signed(-1.5) == "\u22121.50" and signed(0.25) == "+0.25"
    assert (
        shorten("one two  three", 9) == "one two…" and shorten("w" * 20, 6) == "wwwww…" and shorten("fits", 4) == "fits"
    )
