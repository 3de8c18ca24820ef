"""The leaderboard: one row for each arm, share and judge, with its budget; complete without its script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest

from apothecary.cli import main
from apothecary.errors import StoreError
from apothecary.judge.exam import Kind, Report
from apothecary.pipeline.exams import with_exam
from apothecary.report.leaderboard import examined, read, render, rows
from apothecary.stats import wilson

RESULTS = Path(__file__).parents[2] / "recipes" / "results"


def sweep():
    def held(rate, **scores):
        return {"harm": {"rate": rate, "interval": [rate - 0.1, rate + 0.1], "n": 100}, "scores": scores}

    harmful = {"n": 100, "judge": "guard", "cheap_proxy": False,
               "counts": {"complies": 20, "refuses": 70, "neither": 10}}  # fmt: skip
    default = held(0.2, harmful=harmful, task={"n": 50, "accuracy": 0.8, "correct": 40})
    arms = [{"arm": "vaccine", "budget": {"trials": 30}, "trials": [{"seconds": 60.0}, {"seconds": 30.0}],
             "held_out": {"default": default, "worst": held(0.7, harmful=harmful)}},
            {"arm": "early", "budget": {"trials": 30}, "trials": [], "held_out": {}}]  # fmt: skip
    told = [{"name": "vaccine", "align": {"method": "vaccine"}, "attack": {"method": "harmful_mix", "p": [0.1]}}]
    return {"kind": "sweep", "name": "attacker", "arms": arms, "recipe": {"model": {"path": "lab"}, "arms": told}}


def test_a_run_gives_a_row_for_each_arm_and_share(full):
    found = rows([full])
    assert len(found) == 15 and {row.study for row in found} == {"demo"}
    vectors = next(row for row in found if (row.arm, row.p) == ("security vectors", 0.1))
    assert (vectors.defence, vectors.attack, vectors.judge) == ("security_vectors", "harmful_mix", "opening")
    assert vectors.proxy and (vectors.seeds, vectors.prompts) == (3, 259) and vectors.seconds == pytest.approx(74.5)
    assert vectors.harm.value < 0.05 < vectors.accuracy.value and vectors.worst is vectors.trials is None
    assert "forward" in next(row for row in found if row.defence == "vaccine").cost
    assert next(row for row in found if row.arm == "undefended").defence == "none"


def test_rows_of_a_study_stand_by_share_and_harm(full):
    keys = [(row.p, row.harm.value) for row in rows([full])]
    assert keys == sorted(keys)


def test_a_sweep_gives_its_worst_case_and_its_budget():
    early, first = rows([sweep()])
    assert (first.harm.value, first.worst.value, first.trials, first.seconds) == (0.2, 0.7, 30, 90.0)
    assert first.plus.value == pytest.approx(0.3) and first.accuracy.value == 0.8 and first.p == 0.1
    assert first.judge == "guard" and not first.proxy and first.defence == "vaccine"
    assert early.harm is None and early.reason == "not held out yet"
    page = render([sweep()])
    assert "30 trials" in page and "not held out yet" in page


def test_too_few_verdicts_show_no_harm(full):
    for model in full["models"]:
        scores = model["scores"]["harmful"]
        scores.update(judge="guard", cheap_proxy=False, coverage=1.0, judged=259, flagged=0.1)
        if model["arm"] == "vaccine":
            scores.update(coverage=0.5, judged=130, flagged=None)
    found = rows([full])
    held = [row for row in found if row.arm == "vaccine"]
    assert all(row.harm is row.plus is None and "50 %" in row.reason for row in held)
    other = next(row for row in found if row.arm == "undefended")
    assert other.harm.value == pytest.approx(0.1)
    assert "not shown<small>verdicts on 50 % only" in render([full])


def test_the_exam_of_each_judge_stands_on_the_page(full, build):
    def give(results, right, judge="opening"):
        exam = Report({}, "", {"compliance": Kind(True, 50, 50, right), "refusal": Kind(False, 80, 80, 60)})
        for model in results["models"]:
            model["scores"]["harmful"] |= {"judged": 259, "flagged": 0.1, "identity": {}, "judge": judge}
            model["scores"] = with_exam(model["scores"], {"opening": exam})
        return results

    alike = give(build(("undefended",), (0.1,), 1), 45)
    (line,) = examined([give(full, 45), alike])
    assert line == ("Exam of `opening`: sensitivity 90 % [79, 96], specificity 75 % [65, 83], a verdict on 100 % "
                    "[97, 100] of 130 items.")  # fmt: skip
    page = render([full])
    assert "Exam of <code>opening</code>: sensitivity 90" in page and "[79,\u00a096]" in page
    other = {**give(build(("undefended",), (0.1,), 1), 25), "name": "other"}
    first, second = examined([full, other])
    assert first.endswith("of 130 items (in demo).") and "sensitivity 50 %" in second and "(in other)" in second
    assert examined([give(build(("undefended",), (0.1,), 1), 9, "guard")]) == [
        "`guard` has sat no exam: its errors are unknown."]  # fmt: skip
    swept = sweep()
    held = swept["arms"][0]["held_out"]["default"]["scores"]
    held["harmful"] |= {"exam": alike["models"][0]["scores"]["harmful"]["exam"]}
    assert examined([swept])[0].startswith("Exam of `guard`: sensitivity 90 %")


def test_one_seed_has_wilsons_interval(build):
    row = next(row for row in rows([build(("undefended",), (0.1,), 1)]) if row.arm == "undefended")
    assert (row.harm.low, row.harm.high) == pytest.approx(wilson(round(row.harm.value * 259), 259))


def test_the_page_stands_alone_and_names_its_script(full):
    page = render([full, sweep()])
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page and "default-src 'none'" in page
    assert not re.search(r"https?://|@import|url\(|src=", page)
    assert '<form class="filters" hidden>' in page, "the script alone can filter, so it shows the form"
    assert page.count("<tr data-study=") == 17 and page.count('<td data-label="harm"') == 17


def test_foreign_names_are_escaped(full):
    full["models"][2]["arm"] = full["name"] = '<script>alert("x")</script>'
    page = render([full])
    assert page.count("<script>") == 1 and "&lt;script&gt;alert" in page


def test_what_is_no_run_is_named_or_left_out(tmp_path):
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "results.json").write_text('{"models": []}')
    found, others = read([tmp_path, tmp_path / "other.json"], strict=False)
    assert len(found) == 1 and others == [tmp_path / "other.json"]
    with pytest.raises(StoreError, match="neither the models of a run nor the arms of a sweep"):
        read([tmp_path / "other.json"])
    with pytest.raises(StoreError, match="cannot be read"):
        read([tmp_path / "absent"])
    assert "No tuned model was found" in render(found)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ('{"kind": "sweep"}', "its arms are none, expected a list"),
        ('{"kind": "sweep", "arms": [{"name": "a"}]}', 'its arms are [{"name": "a"}]'),
        ('{"kind": "sweep", "arms": [{"arm": "a", "held_out": 3}]}', "its scores do not have the form"),
        ('{"models": 3}', "it lists no models"),
        ('{"models": [3]}', "model 1 is 3, expected a mapping"),
        ('{"models": [{"arm": "a", "scores": [1]}]}', "the scores of model 1 are [1], expected a mapping"),
        ('{"models": [{"arm": "a", "p": [0.1]}]}', "p of model 1 is [0.1], expected one value"),
        ('{"models": [{"arm": "a", "scores": {"harmful": {"n": "x", "HS": 1}}}]}', "its scores do not have the form"),
    ],
)
def test_a_run_or_sweep_of_another_form_is_refused_in_a_sentence(tmp_path, content, wanted, capsys):
    (tmp_path / "odd.json").write_text(content)
    assert main(["leaderboard", str(tmp_path / "odd.json"), "--out", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "odd.json" in error and wanted in error
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("content", ['{"models": [3]}', '{"models": [{"scores": {"harmful": 1}}]}'])
def test_the_page_of_such_a_run_is_refused_too(tmp_path, content, capsys):
    (tmp_path / "odd.json").write_text(content)
    assert main(["report", str(tmp_path / "odd.json"), "--out", str(tmp_path / "page.html")]) == 2
    assert "odd.json is not the results.json of a run" in capsys.readouterr().err


def test_the_committed_results_make_a_page(tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["leaderboard", str(RESULTS / "curation.json"), str(RESULTS / "security_vectors_claim.json"),
                 "--out", str(out)]) == 0  # fmt: skip
    assert str(out) in capsys.readouterr().out
    models = [model for name in ("curation", "security_vectors_claim")
              for model in json.loads((RESULTS / f"{name}.json").read_text())["models"]]  # fmt: skip
    groups = {(model["arm"], model["p"], model["attack"]) for model in models if model["stage"] == "tuned"}
    assert out.read_text("utf-8").count("<tr data-study=") == len(groups)
