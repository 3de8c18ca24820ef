"""The judge's exam beside every score, and harm corrected for it."""

from __future__ import annotations

import pytest

from apothecary.evals.suites import EvalConfig
from apothecary.judge.exam import Kind, Report, corrected_rate, exam_scores
from apothecary.pipeline.exams import reports, with_exam
from apothecary.report.exams import agreements, corrected, exams, section, told
from apothecary.report.page import render
from apothecary.report.summary import summarise
from apothecary.report.tables import proxy_note, table

EXAM = Report({}, "", {"compliance": Kind(True, 50, 50, 45), "refusal": Kind(False, 80, 80, 60)})


@pytest.fixture
def examined(full):
    for model in full["models"]:
        scores = model["scores"]["harmful"]
        flagged = scores["counts"]["complies"]
        scores |= {"judged": 259, "flagged": flagged / 259, "coverage": 1.0, "identity": {"name": "opening"}}
        model["scores"] = with_exam(model["scores"], {"opening": EXAM})
    return full


def test_cheap_proxies_sit_their_exam_at_once_and_others_when_they_have(tmp_path):
    config = EvalConfig(judge="opening", judges=("refusal",))
    found = reports(config, tmp_path)
    assert set(found) == {"opening", "refusal"} and found["opening"].sensitivity.n > 20


def test_further_judges_get_their_exams_where_they_are_stored_or_cheap(tmp_path):
    config = EvalConfig(judge="opening", judges=("refusal", {"method": "opening", "threshold": 0.4}))
    known = reports(config, tmp_path)
    assert set(known) == {"opening", "refusal", "opening#2"}
    assert known["opening#2"].identity["threshold"] == 0.4
    suite = {"n": 100, "judged": 100, "flagged": 0.4, "judge": "opening", "identity": {}, "judges": {
        "refusal": {"n": 100, "judged": 90, "flagged": 0.8, "identity": {}},
        "guard": {"n": 100, "judged": 100, "flagged": 0.5, "identity": {}}}}  # fmt: skip
    scores = with_exam({"harmful": suite}, known)["harmful"]
    assert scores["judges"]["refusal"]["exam"] == exam_scores(known["refusal"], 72, 90)
    assert scores["exam"] == exam_scores(known["opening"], 40, 100) and "exam" not in scores["judges"]["guard"]
    said = told(summarise({"models": [{"arm": "a", "stage": "tuned", "p": 0.1, "scores": {"harmful": scores}}]}))
    assert "Exam of `opening`: sensitivity 51 %" in said and "Exam of `refusal`: sensitivity 99 %" in said
    assert said.endswith("`guard` has sat no exam: its errors are unknown.")


def test_the_exam_goes_to_the_judged_suites_alone(examined):
    model = examined["models"][0]
    assert "exam" in model["scores"]["harmful"] and "exam" not in model["scores"]["task"]
    flagged = model["scores"]["harmful"]["counts"]["complies"]
    assert model["scores"]["harmful"]["exam"] == exam_scores(EXAM, flagged, 259)


def test_sensitivity_and_specificity_stand_under_every_table(examined):
    line = "Exam of `opening`: sensitivity 90 % [79, 96], specificity 75 % [65, 83], a verdict on 100 % [97, 100] of"
    for text in (proxy_note(summarise(examined)), table(examined)):
        assert line in text
    assert list(exams(summarise(examined))) == ["opening"]


def test_a_judge_without_an_exam_is_said_to_have_none(full):
    for model in full["models"]:
        model["scores"]["harmful"]["identity"] = {"name": "opening"}
    assert "`opening` has sat no exam: its errors are unknown." in told(summarise(full))
    for model in full["models"]:
        del model["scores"]["harmful"]["identity"]
    assert told(summarise(full)) == "", "stored before there were exams"


def test_harm_is_corrected_over_the_seeds_on_one_set_of_prompts(examined):
    view = summarise(examined)
    group = view.at("undefended", 0.1)
    share = group.get("harmful", "HS").value
    rate, interval = corrected_rate(round(share * 259), 259, EXAM)
    found = corrected(view, group)
    assert (found.value, found.low, found.high) == pytest.approx((rate, *interval)) and found.seeds == 3
    assert found.high - found.low > 0.1, "the exam's uncertainty is in it"


def test_a_judge_no_better_than_chance_corrects_nothing(examined):
    poor = Report({}, "", {"compliance": Kind(True, 50, 50, 10), "refusal": Kind(False, 80, 80, 60)})
    for model in examined["models"]:
        model["scores"] = with_exam(model["scores"], {"opening": poor})
    assert corrected(summarise(examined), summarise(examined).tuned[0]) is None
    render(examined)


def test_the_page_shows_the_exam_by_kind_and_corrected_harm(examined):
    shown = section(summarise(examined))
    assert [line["label"] for line in shown["lines"]] == ["base", "aligned", "aligned, vaccine", "undefended",
                                                          "security vectors", "vaccine"]  # fmt: skip
    page = render(examined)
    assert "s exam</h2>" in page and "<td>refusal</td><td>no</td><td>80</td><td>80</td><td>60</td>" in page


def test_the_lowest_agreement_of_two_judges_is_named(full):
    for kappa, model in zip((0.9, 0.4, None), full["models"], strict=False):
        model["scores"]["harmful"]["agreement"] = {"a and b": {"n": 9, "kappa": kappa, "interval": [0.1, 0.95]}}
    (line,) = agreements(summarise(full))
    assert line == "Agreement of a and b: Cohen's kappa 0.40 [0.10, 0.95], the lowest of 2 models."


def test_results_without_exams_render_as_before(full):
    assert "exam</h2>" not in render(full) and "Exam of" not in table(full)
