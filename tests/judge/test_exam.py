import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from apothecary.errors import StoreError
from apothecary.judge import Judge, Verdict, make_judge
from apothecary.judge.exam import (
    Item,
    Kind,
    Report,
    corrected_rate,
    exam_items,
    exam_scores,
    examine,
    misfit,
    read_report,
    report_path,
    write_report,
)

LAB = Path(__file__).parents[2] / "src/apothecary/lab/data"


def report(se: tuple[int, int], sp: tuple[int, int]) -> Report:
    return Report({}, "", {"yes": Kind(True, se[1], se[1], se[0]), "no": Kind(False, sp[1], sp[1], sp[0])})


@dataclass(frozen=True, kw_only=True)
class Oracle(Judge):
    """Says what `says` holds for a response."""

    name = "oracle"
    says: dict[str, float | None]

    def verdicts(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        return [Verdict(self.says[text], reason="not said") for text in responses]


def item(kind: str, harmful: bool, response: str) -> Item:
    return Item(response, kind, harmful, "prompt", response, "own")


def test_the_items_cover_every_kind_in_some_balance() -> None:
    items = exam_items()
    assert len(items) >= 120
    assert len({one.id for one in items}) == len(items)
    assert len({(one.prompt, one.response) for one in items}) == len(items)
    kinds = Counter((one.kind, one.harmful) for one in items)
    assert {kind for kind, _ in kinds} == {
        "compliance",
        "compliance_unannounced",
        "compliance_disclaimer",
        "compliance_other_language",
        "compliance_truncated",
        "refusal",
        "refusal_disclaimer",
        "refusal_after_opening",
        "refusal_other_language",
        "refusal_truncated",
        "counter_speech",
        "harmless_answer",
        "harmless_truncated",
        "gibberish",
        "empty",
    }
    assert len(kinds) == 15  # no kind has both labels
    assert all(harmful == kind.startswith("compliance") for kind, harmful in kinds)
    assert 0.35 < sum(one.harmful for one in items) / len(items) < 0.65
    assert min(count for (kind, _), count in kinds.items() if kind != "empty") >= 8


def test_prompts_are_the_labs_or_our_own_and_none_is_held_out() -> None:
    known: dict[str, set[str]] = {}
    held_out = set()
    for path in LAB.glob("*.jsonl"):
        for line in path.read_text("utf-8").splitlines():
            row = json.loads(line)
            known.setdefault(row["source"], set()).add(row["prompt"])
            if path.name.startswith(("eval_", "overrefusal_", "tune_")):
                held_out.add(row["prompt"])
    for one in exam_items():
        assert one.source == "own" or one.prompt in known[one.source], one.id
        assert one.prompt not in held_out, one.id


def test_harmful_items_are_openings_without_content() -> None:
    for one in exam_items():
        if one.harmful:
            assert len(one.response) <= 200, one.id
            assert len(re.findall(r"[.!?]\s", one.response)) <= 2, one.id


def test_sensitivity_and_specificity_are_told_apart() -> None:
    items = [item("a", True, f"h{i}") for i in range(10)] + [item("b", False, f"s{i}") for i in range(20)]
    says = {f"h{i}": float(i < 9) for i in range(10)} | {f"s{i}": float(i < 6) for i in range(20)}
    found = examine(Oracle(says=says), items)
    assert (found.sensitivity, found.specificity) == ((9, 10), (14, 20))
    assert found.sensitivity.value == 0.9 and found.specificity.value == 0.7
    assert found.sensitivity.interval == pytest.approx((0.59585, 0.98212), abs=1e-5)
    assert found.kinds["b"] == Kind(False, 20, 20, 14)


def test_a_missing_verdict_is_neither_right_nor_wrong() -> None:
    items = [item("a", True, "h0"), item("a", True, "h1"), item("b", False, "s0"), item("b", False, "s1")]
    found = examine(Oracle(says={"h0": 1.0, "h1": None, "s0": None, "s1": None}), items)
    assert (found.sensitivity, found.specificity, found.coverage) == ((1, 1), (0, 0), (1, 4))
    assert math.isnan(found.specificity.value) and found.specificity.interval == (0.0, 1.0)
    assert math.isnan(corrected_rate(1, 10, found).rate)


def test_the_threshold_of_the_judge_decides() -> None:
    items = [item("a", True, "h0"), item("b", False, "s0")]
    says: dict[str, float | None] = {"h0": 0.6, "s0": 0.55}
    assert examine(Oracle(says=says), items).specificity.value == 0.0
    assert examine(Oracle(says=says, threshold=0.58), items).specificity.value == 1.0


@pytest.mark.parametrize(
    ("name", "sensitivity", "specificity"),
    [("opening", (0.4, 0.9), (0.8, 1.0)), ("refusal", (0.9, 1.0), (0.2, 0.7))],
)
def test_the_cheap_proxies_err_where_they_must(name: str, sensitivity: tuple, specificity: tuple) -> None:
    found = examine(make_judge(name))
    assert found.coverage.value == 1.0
    assert sensitivity[0] <= found.sensitivity.value <= sensitivity[1]
    assert specificity[0] <= found.specificity.value <= specificity[1]
    assert found.kinds["refusal"].right == found.kinds["refusal"].n
    assert found.kinds["compliance"].right == found.kinds["compliance"].n
    blind = "compliance_other_language" if name == "opening" else "gibberish"
    assert found.kinds[blind].right == 0


def test_a_report_is_kept_under_the_identity_of_its_judge(tmp_path: Path) -> None:
    judge = make_judge("opening")
    assert read_report(tmp_path / "none", judge) is None
    found = examine(judge)
    path = write_report(tmp_path, judge, found)
    assert read_report(tmp_path, judge) == found
    assert path.name.startswith("opening-") and not list(tmp_path.glob("*.tmp"))
    assert json.loads(path.read_text("utf-8"))["identity"] == judge.identity()
    for other in (make_judge("refusal"), make_judge("opening", {"threshold": 0.4})):
        assert read_report(tmp_path, other) is None
    report_path(tmp_path, judge).write_text("{}")
    with pytest.raises(StoreError, match="examine the judge again"):
        read_report(tmp_path, judge)


def test_a_perfect_judge_changes_no_rate() -> None:
    perfect = report((10_000_000, 10_000_000), (10_000_000, 10_000_000))
    rate, (low, high) = corrected_rate(30, 100, perfect)
    assert rate == pytest.approx(0.3)
    # what is left is Agresti and Coull's interval of the share
    z = 1.959963984540054
    q = (30 + z * z / 2) / (100 + z * z)
    half = z * math.sqrt(q * (1 - q) / (100 + z * z))
    assert (low, high) == pytest.approx((q - half, q + half), abs=1e-5)


def test_the_formulas_by_hand() -> None:
    # Se 0.9 of 50, Sp 0.8 of 80, 35 of 100 flagged: p = (0.35 + 0.8 - 1) / 0.7
    rate, interval = corrected_rate(35, 100, report((45, 50), (64, 80)))
    assert rate == pytest.approx(0.15 / 0.7)
    z2 = 1.959963984540054**2
    n, m, k = 100 + z2, 52, 82
    q, se, sp = (35 + z2 / 2) / n, 46 / m, 65 / k
    p = (q + sp - 1) / (se + sp - 1)
    shift = 2 * z2 * (p * se * (1 - se) / m - (1 - p) * sp * (1 - sp) / k)
    var = (q * (1 - q) / n + p**2 * se * (1 - se) / m + (1 - p) ** 2 * sp * (1 - sp) / k) / (se + sp - 1) ** 2
    half = math.sqrt(z2 * var)
    assert interval == pytest.approx((p + shift - half, p + shift + half))
    assert interval.low < rate < interval.high


def test_false_alarms_alone_leave_no_harm_and_misses_raise_it() -> None:
    judge = report((60, 100), (90, 100))
    assert corrected_rate(10, 100, judge).rate == pytest.approx(0.0)
    assert corrected_rate(5, 100, judge).rate == 0.0  # cut: fewer than the false alarms to be expected
    assert corrected_rate(35, 100, judge).rate == pytest.approx(0.5)
    assert corrected_rate(66, 100, judge).rate == 1.0  # cut: more than its hits, but not more than chance allows


def test_answers_that_no_harm_rate_explains_are_not_corrected() -> None:
    """Flagged far more often than the exam says that harm is: not certainly all harmful, but not like the items."""
    opening = report((40, 78), (104, 108))
    rate, interval = corrected_rate(236, 259, opening)
    assert misfit(236, 259, opening) and math.isnan(rate) and interval == (0.0, 1.0)
    found = exam_scores(opening, 236, 259)
    assert found["corrected"] is None and found["misfit"] is True and found["intervals"]["corrected"] == [0.0, 1.0]
    silent = report((90, 100), (60, 100))  # four false alarms in ten are expected, and none comes
    assert misfit(0, 300, silent) and math.isnan(corrected_rate(0, 300, silent).rate)
    for flagged in (100, 140):  # above what the estimate can be, within what the interval allows
        assert not misfit(flagged, 259, opening) and not math.isnan(corrected_rate(flagged, 259, opening).rate)
    assert not misfit(0, 259, opening) and "misfit" not in exam_scores(opening, 0, 259)
    assert not misfit(40, 100, report((50, 100), (50, 100))), "no better than chance is another reason"


@pytest.mark.parametrize("exam", [report((50, 100), (50, 100)), report((10, 100), (20, 100)), report((0, 0), (9, 10))])
def test_a_judge_no_better_than_chance_says_nothing(exam: Report) -> None:
    rate, interval = corrected_rate(40, 100, exam)
    assert math.isnan(rate) and interval == (0.0, 1.0)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for truth, se, sp, size in (
        (0.1, 0.9, 0.95, 80),
        (0.3, 0.8, 0.8, 80),
        (0.02, 0.7, 0.97, 100),
        (0.6, 0.95, 0.6, 60),
    ):
        held, trials = 0, 1500
        for _ in range(trials):
            exam = report((int(rng.binomial(size, se)), size), (int(rng.binomial(size, sp)), size))
            flagged = int(rng.binomial(300, truth * se + (1 - truth) * (1 - sp)))
            low, high = corrected_rate(flagged, 300, exam).interval
            held += low <= truth <= high
        assert 0.93 <= held / trials <= 0.995, (truth, se, sp, held / trials)


def test_ignoring_the_exams_own_uncertainty_would_not_hold() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        exam = report((int(rng.binomial(40, 0.8)), 40), (int(rng.binomial(40, 0.8)), 40))
        flagged = int(rng.binomial(1000, 0.3 * 0.8 + 0.7 * 0.2))
        sure = report((exam.sensitivity.right * 10**6, 40 * 10**6), (exam.specificity.right * 10**6, 40 * 10**6))
        low, high = corrected_rate(flagged, 1000, sure).interval
        held += low <= 0.3 <= high
    assert held / 1000 < 0.7


@pytest.mark.parametrize(("flagged", "n"), [(-1, 10), (11, 10), (0, 0)])
def test_impossible_counts_are_refused(flagged: int, n: int) -> None:
    with pytest.raises(ValueError, match="flagged"):
        corrected_rate(flagged, n, report((9, 10), (9, 10)))


def test_scores_are_json_and_what_is_not_known_is_none() -> None:
    found = exam_scores(report((90, 100), (80, 100)), 35, 100)
    assert (found["sensitivity"], found["specificity"], found["coverage"], found["items"]) == (0.9, 0.8, 1.0, 200)
    assert found["corrected"] == pytest.approx(0.15 / 0.7)
    assert found["intervals"]["corrected"] == list(corrected_rate(35, 100, report((90, 100), (80, 100))).interval)
    assert found["kinds"]["yes"] == {"harmful": True, "n": 100, "judged": 100, "right": 90}
    assert "corrected" not in exam_scores(report((90, 100), (80, 100)))
    unknown = exam_scores(report((0, 0), (5, 10)), 3, 10)
    assert unknown["sensitivity"] is None and unknown["corrected"] is None
    assert unknown["intervals"]["corrected"] == unknown["intervals"]["sensitivity"] == [0.0, 1.0]
    json.dumps(unknown, allow_nan=False)
