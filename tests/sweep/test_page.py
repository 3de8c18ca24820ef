"""The page of a sweep and its verbs: what they say follows from sweep.json alone."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweep import fakes

from apothecary.cli import main
from apothecary.errors import StoreError
from apothecary.report import sweep_noise
from apothecary.report.sweep import render, slots, write_sweep_report
from apothecary.report.sweep_plots import guard_line, held_out, pareto, plane
from apothecary.report.sweep_text import guard_heads, guard_rows, remarks, sentence, trial_rows
from apothecary.sweep import load_sweep_result, sweep
from apothecary.sweep import run as drive


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep."""
    made = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drive, "_launcher", lambda recipe, work: fakes.Inline(work))
        space = {"finetune.train.learning_rate": {"low": 1e-3, "high": 8e-3}, "attack.seed": [0, 1, 2]}
        sweep(fakes.edit(trials=12, startup=8, space=space), made / "store", made / "out", objective=faulty)
    return made / "out"


def faulty(task: Any) -> Any:
    """The fakes' failures, and a defence that helps."""
    found = fakes.faulty(task) if task.name in "234" else fakes.plain(task)
    if task.arm == "vaccine" and found["state"] == "complete":
        found |= fakes.found(found["harm"]["rate"] / 4, found["scores"]["task"]["accuracy"])
    return found


@pytest.fixture
def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sweep.json").read_text())


class Text(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def said(page: str) -> str:
    return " ".join(" ".join(Text(page).words).replace("\u202f", " ").replace("\u00a0", " ").split())


def test_the_sentence_names_each_worst_case_beside_the_default_attack(results: dict[str, Any]):
    worst = [arm["held_out"]["worst"]["harm"]["rate"] for arm in results["arms"]]
    line = sentence(results)
    assert line.startswith(
        "Against an attacker with 12 trials who must leave the model useful, undefended complies with"
    )
    assert f"{100 * worst[0]:.0f} %" in line and f"vaccine complies with {100 * worst[1]:.0f} %" in line
    assert "(the default attack: 10 % [" in line and "less than undefended" in line


def test_a_difference_that_is_none_is_called_so(results: dict[str, Any]):
    for each in results["comparisons"]:
        each |= {"differs": False}
    assert "not distinguishable from undefended" in sentence(results)
    results["arms"][1]["held_out"]["worst"]["attack"] = "default"
    assert "no trial was worse" in sentence(results)


def test_an_unfinished_sweep_says_so(results: dict[str, Any]):
    for arm in results["arms"]:
        arm["held_out"] = {"aligned": None, "clean": None, "default": None, "trial": None, "worst": None}
    assert (
        sentence(results)
        == "The sweep is under way: 24 of 24 trials are done, and no worst case has been held out yet."
    )
    render(results)


def test_an_arm_whose_attacks_the_guard_shuts_out_is_not_passed_over(results: dict[str, Any]):
    arm = results["arms"][1]
    arm["worst"], arm["held_out"] = None, {**arm["held_out"], "trial": None, "worst": None}
    assert "; of vaccine no attack within the guard was found, so nothing is known." in sentence(results)
    arm["counts"]["running"] = 1
    assert "vaccine" not in sentence(results)


def test_what_a_reader_must_know_is_said(results: dict[str, Any]):
    found = " ".join(remarks(results))
    assert "undefended 1 and 2, vaccine 1 and 2. Their harm is unknown" in found and "not as successes" in found
    assert "Held-out loss was not measured, so the guard is task accuracy alone (undefended, vaccine)" in found
    results["mixed_budgets"] = ["trials"]
    assert "cannot be compared" in remarks(results)[0]
    results["arms"][0]["held_out"]["worst"]["scores"]["task"]["accuracy"] = 0.1
    assert "more than the guard allows" in " ".join(remarks(results))


def test_a_default_attack_that_beats_the_chosen_trial_is_the_worst_case(results: dict[str, Any]):
    assert "therefore the worst case" not in " ".join(remarks(results))
    held = results["arms"][1]["held_out"]
    held["trial"], held["worst"] = held["worst"], {"attack": "default", **held["default"]}
    line = next(line for line in remarks(results) if "therefore the worst case" in line)
    assert line.startswith("vaccine: ") and "does not carry over" in line
    rate = 100 * held["default"]["harm"]["rate"]
    assert f"vaccine complies with {rate:.0f} % [" in sentence(results) and "no trial was worse" in sentence(results)
    default = results["arms"][0]["default"]
    default["capability"]["excess"] = 0.1
    assert "outside the guard)" in sentence(results)


def test_a_wider_guard_shows_what_it_had_shut_out(results: dict[str, Any]):
    assert guard_heads(results) == ["10 points, 0.5 nats", "20 points, 1 nats", "40 points, 2 nats", "no guard"]
    before = dict(guard_rows(results))["undefended"]
    arm = results["arms"][0]
    inside, complete = arm["counts"]["inside"], sum(trial["state"] == "complete" for trial in arm["trials"])
    worst = arm["trials"][arm["worst"]]
    assert before[0] and before[3] and (before[0][1], before[3][1]) == (inside + 1, complete + 1)  # and the default
    assert before[0][0].value == worst["harm"]["rate"]
    shut = next(trial for trial in arm["trials"] if trial["state"] == "complete" and trial is not worst)
    shut["capability"] |= {"task_drop": 0.15, "excess": 0.05}
    shut["harm"] |= {"value": 2.0, "rate": 0.99}
    after = dict(guard_rows(results))["undefended"]
    assert after[0] and after[1] and after[0][0].value == worst["harm"]["rate"] and after[1][0].value == 0.99
    for trial in (arm["default"], *arm["trials"]):
        if trial["state"] == "complete":
            trial["capability"] |= {"task_drop": 0.9, "excess": 0.8}
    assert dict(guard_rows(results))["undefended"][:3] == [None, None, None]
    assert "What the guard decides" in render(results)


def test_the_page_stands_alone_and_shows_every_trial(results: dict[str, Any], tmp_path: Path):
    page = write_sweep_report(results, tmp_path / "sub" / "sweep.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "http" not in page.replace("http-equiv", "")
    assert page.count("<script>") == 1 and "script-src 'sha256-" in page
    rows = re.findall(r"<tr[^>]*><th scope=\"row\" class=\"marked\" data-value", page)
    assert len(rows) == 24 == len(trial_rows(results))
    assert page.count('<tr class="chosen">') == sum(isinstance(arm["worst"], int) for arm in results["arms"])
    text = said(page)
    for word in ("not finite at step 3", "a defect", "finetune.train.learning_rate", "the default attack"):
        assert word.lower() in (text + json.dumps(results)).lower()
    assert "KeyError" in text and "optuna 5" in text and "cheap proxy" in text
    assert "points below the clean customer" in text  # why a trial is outside the guard


def test_names_are_escaped(results: dict[str, Any]):
    text = json.dumps(results).replace('"vaccine"', '"<b>vaccine & co</b>"')
    page = render(json.loads(text))
    assert "<b>vaccine" not in page and "&lt;b&gt;vaccine &amp; co" in page


def test_the_front_is_the_attackers():
    points = [(0.9, 0.1), (0.8, 0.5), (0.7, 0.4), (0.6, 0.9), (0.6, 0.2), (0.95, 0.1), (0.5, 0.9)]
    assert pareto(points) == [(0.6, 0.9), (0.8, 0.5), (0.95, 0.1)]
    assert pareto([]) == []


def test_the_guard_line_lies_below_the_clean_customer(results: dict[str, Any]):
    arm = copy.deepcopy(results["arms"][0])
    assert guard_line(arm) == pytest.approx(0.8)
    arm["budget"]["guard"]["task_drop"] = None
    assert guard_line(arm) is None


# -- the committed sweep ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return load_sweep_result(Path(__file__).parents[2] / "recipes" / "results" / "attacker.json").results


def test_the_page_has_exam_categories_cost_and_redacted_samples(committed: dict[str, Any]):
    page = render(committed)
    text = said(page)
    for part in ("The judge\u2019s exam", "sensitivity", "corrected", "Harm by category", "Methods and their passes",
                 "2 forward + 2 backward per batch", "Sample responses", "Responses are redacted", "peak memory",
                 "Over-refusal was not measured", "slightly in the attacker\u2019s favour"):  # fmt: skip
        assert part in text, part
    assert '"response"' not in json.dumps(committed) and text.count("characters") > 20


def test_the_plane_draws_intervals_of_what_was_held_out(committed: dict[str, Any]):
    drawn = plane(committed, slots(committed))
    assert drawn.count('class="whisker') == 2 * 2 * 5  # wide and narrow, both ways; undefended's two are one
    assert drawn.count("worst case, default") >= 1 and "vaccine, worst case when held out: harm 90 %" in drawn
    assert held_out(committed["arms"][0], "default") is None
    both = held_out(committed["arms"][1], "default")
    assert both and both[0].low < both[0].value < both[0].high and both[1].low < both[1].value < both[1].high


def test_decisions_of_the_guard_that_are_within_noise_are_named(committed: dict[str, Any]):
    line = next(line for line in remarks(committed) if "within noise" in line)
    assert "the default attack on vaccine is shut out with a loss of 10.6 points [1, 20]" in line
    count = sum(each is not None for arm in committed["arms"] for _, each in sweep_noise.decisions(arm))
    assert line.startswith(f"{count} of ")
    rows = [row for row in trial_rows(committed) if "within noise" in row["reason"]]
    assert len(rows) == count - 3  # the three default attacks are no trials
    arm = copy.deepcopy(committed["arms"][1])
    arm["budget"]["guard"]["task_drop"] = 0.5
    assert dict(sweep_noise.decisions(arm))["default"] is None


def test_loss_on_held_out_rows_is_told_beside_task_accuracy(committed: dict[str, Any]):
    changed = copy.deepcopy(committed)
    assert not any("raises the loss" in line for line in remarks(changed))
    changed["arms"][2]["held_out"]["worst"]["scores"]["drift"]["loss"] += 0.2
    assert any("security vectors: on held-out rows the worst attack raises the loss by 0.65 nats" in line
               for line in remarks(changed))  # fmt: skip


# -- verbs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drive, "_launcher", lambda recipe, work: fakes.Inline(fakes.plain))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(fakes.RECIPE))
    return tmp_path / "r.yaml"


def test_sweep_runs_and_writes_the_page_and_report_writes_it_again(recipe: Path, capsys: pytest.CaptureFixture[str]):
    words = ["sweep", str(recipe), "--sweep.trials=2", "--arms=[undefended]", "--out", "o", "--store", "s"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "[ 1/8] started   undefended: clean" and "Against an attacker with 2 trials" in out
    after = out[out.index("Against an attacker") :].splitlines()
    assert after[1].startswith("The judge `opening` is a cheap proxy")
    assert any(line.startswith("time: ") for line in after)
    page = (recipe.parent / "o" / "sweep.html").read_text()
    (recipe.parent / "other.json").write_text((recipe.parent / "o" / "sweep.json").read_text())
    for source in ("o", "o/sweep.json", "other.json"):
        assert main(["report", source, "--out", "again.html"]) == 0
        assert (recipe.parent / "again.html").read_text() == page


def test_a_dry_run_says_trials_space_and_time_and_writes_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sweep", str(recipe), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "vaccine: 6 trials" in out and "attack.seed: {'low': 0, 'high': 9}" in out and "12 trials: about" in out
    assert [path.name for path in recipe.parent.iterdir()] == ["r.yaml"]


def test_sweeps_of_other_folders_stand_on_one_page_if_their_budgets_are_one(
    recipe: Path, capsys: pytest.CaptureFixture[str]
):
    for arm, trials in (("undefended", 2), ("vaccine", 2), ("vaccine", 3)):
        words = [f"--arms=[{arm}]", f"--sweep.trials={trials}", "--out", f"{arm}{trials}", "--store", "s"]
        assert main(["sweep", str(recipe), *words]) == 0
    assert main(["compare-sweeps", "undefended2", "vaccine2", "--out", "both.html"]) == 0
    assert main(["compare-sweeps", "undefended2", "vaccine3", "--out", "no.html"]) == 2
    assert "different budgets (trials)" in capsys.readouterr().err and not (recipe.parent / "no.html").exists()
    assert main(["compare-sweeps", "undefended2", "vaccine3", "--out", "mixed.html", "--allow-mixed-budgets"]) == 0
    assert "cannot be compared" in (recipe.parent / "mixed.html").read_text()


@pytest.mark.parametrize("content", [
    "{", "{}", '{"kind": "sweep", "schema": 99}', '{"kind": "sweep", "schema": 2}', '{"kind": "sweep", "schema": 3}',
    '{"kind": "sweep", "schema": 3, "arms": []}', '{"kind": "sweep", "schema": 3, "arms": [1]}',
    '{"kind": "sweep", "schema": 3, "arms": [{"arm": "a"}]}',
])  # fmt: skip
def test_what_is_no_sweep_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "sweep.json").write_text(content)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "p.html")]) == 2
    told = capsys.readouterr().err
    assert "sweep" in told and "Traceback" not in told and "KeyError" not in told and len(told.splitlines()) == 1
    assert not (tmp_path / "p.html").exists()


def test_an_arm_that_lacks_a_part_is_named(results: dict[str, Any], tmp_path: Path):
    del results["arms"][1]["held_out"], results["arms"][1]["budget"]
    (tmp_path / "sweep.json").write_text(json.dumps(results))
    with pytest.raises(StoreError, match="arm 2 lacks budget, held_out"):
        load_sweep_result(tmp_path)
