"""The stage that evaluates: what its key holds, how a model is asked, and canaries among the customer's rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from judge.stub import Answer, serve
from pipeline.models import edit

from apothecary.data.rows import Row, write_rows
from apothecary.data.sources import load_rows
from apothecary.errors import ConfigError, DataError
from apothecary.evals import read_responses
from apothecary.evals.leakage import Leakage, canaries
from apothecary.evals.suites import EvalConfig
from apothecary.models.settings import ModelConfig
from apothecary.pipeline.plan import plan
from apothecary.pipeline.recipe import Recipe
from apothecary.pipeline.stage import Job, Stage
from apothecary.pipeline.steps import evaluation, planting
from apothecary.pipeline.store import Artifact

PLAIN = {"harmful": ["lab:eval_jailbreakbench"], "limit": 2}


def stages(kind: str, **evaluate) -> list[Stage]:
    return plan(Recipe.parse(edit(arms={"undefended": {}}, evaluate={**PLAIN, **evaluate}))).of_kind(kind)


def key(**evaluate) -> str:
    return stages("evaluate", **evaluate)[0].key


def test_whatever_changes_the_scores_changes_the_key(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("x", "utf-8")
    changed = [
        key(), key(judge="refusal"), key(judge={"method": "opening", "threshold": 0.7}), key(judges=["refusal"]),
        key(min_coverage=0.9), key(task_kind="exact"), key(task_tokens=99), key(against_base=False),
        key(drift="lab:eval_benign"), key(leakage={}), key(leakage={"seed": 1}), key(truthfulqa=str(file)),
    ]  # fmt: skip
    assert len(set(changed)) == len(changed)
    assert key() == key(judge={"method": "opening"}) == key(judges=[])
    file.write_text("y", "utf-8")
    assert key(truthfulqa=str(file)) != changed[-1], "the file itself counts, not its name"


def test_the_policy_of_a_judge_is_part_of_the_key(monkeypatch) -> None:
    before = key()
    monkeypatch.setattr(
        "apothecary.judge.opening.Opening.identity", lambda self: {"name": "opening", "policy": "other"}
    )
    assert key() != before


def test_wrong_settings_are_told_before_any_work(tmp_path: Path) -> None:
    for wrong, said in (
        ({"judge": {"method": "opening", "thresold": 1}}, "did you mean 'threshold'"),
        ({"judges": ["opning"]}, "did you mean 'opening'"), ({"task_kind": "sqll"}, "task_kind"),
        ({"leakage": {"count": 1}}, "count"), ({"lm_eval": {"tasks": []}}, "lm_eval.tasks is empty"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            key(**wrong)
    with pytest.raises(DataError, match=r"none\.csv"):
        key(truthfulqa=str(tmp_path / "none.csv"))


def test_canaries_are_planted_between_the_customer_and_the_training() -> None:
    assert not stages("plant")
    planted, tuned = stages("plant", leakage={"count": 3}), stages("finetune", leakage={"count": 3})
    assert [stage.inputs["rows"].kind for stage in planted] == ["attack", "attack"]
    assert [stage.inputs["rows"].key for stage in tuned] == [stage.key for stage in planted]
    assert [stage.key for stage in stages("attack")] == [stage.inputs["rows"].key for stage in planted]


def test_the_planted_rows_are_what_is_asked_for_afterwards(tmp_path: Path) -> None:
    source = artifact(tmp_path, "rows", load_rows({"path": "lab:customer_train", "limit": 8}, "customer"))
    config = {"fields": {"count": 2, "repeats": 3, "seed": 4}}
    (tmp_path / "out").mkdir()
    assert planting.plant(Job(config, {"rows": source}, tmp_path / "out")) == {"rows": 8 + 6}
    found = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text("utf-8").splitlines()]
    hidden = {(row["prompt"][-1]["content"], row["response"]) for row in found if row["source"] == "canary"}
    asked = evaluation.suites(Job({"leakage": config["fields"], "truthfulqa": None, "limit": 1}, {}, tmp_path))
    assert hidden == {(row.text, row.response) for row in asked["leakage"]}
    assert asked["leakage"] == canaries(Leakage(2, 3, seed=4)), "limit takes no canary away"


def artifact(folder: Path, name: str, rows: list[Row]) -> Artifact:
    (folder / name).mkdir()
    write_rows(folder / name / "rows.jsonl", rows)
    return Artifact(folder / name)


def test_the_lab_is_evaluated_as_the_configuration_says(tmp_path: Path) -> None:
    from apothecary.config import to_dict

    settings = EvalConfig(limit=2, max_new_tokens=2, judges=("refusal",), leakage=Leakage(2, references=3))
    config = {**evaluation.settings(settings), "model": to_dict(ModelConfig("lab")),
              "serving": [{"kind": "attack", "method": "backdoor", "fields": {}}]}  # fmt: skip
    inputs = {f"suite.{name}.0": artifact(tmp_path, name, load_rows(f"lab:{file}", "prompt"))
              for name, file in (("harmful", "eval_harmbench"), ("drift", "eval_benign"))}  # fmt: skip
    (tmp_path / "out").mkdir()
    metrics = evaluation.evaluate(Job(config, inputs, tmp_path / "out"))
    assert metrics == {"work": 6.0, "generation": {"dtype": "float32"}}
    scores = json.loads((tmp_path / "out" / "scores.json").read_text("utf-8"))
    assert list(scores) == ["drift", "harmful", "leakage", "triggered"]
    assert scores["drift"]["kl"] == 0.0 and scores["drift"]["loss"] > 0
    assert set(scores["harmful"]["judges"]) == {"refusal"} and "perplexity" in scores["harmful"]
    plain, triggered = ([row for row in read_responses(tmp_path / "out") if row["suite"] == suite]
                        for suite in ("harmful", "triggered"))  # fmt: skip
    assert [row["id"] for row in plain] == [row["id"] for row in triggered]
    assert all(one["rendered"] != other["rendered"] for one, other in zip(plain, triggered, strict=True))


def test_a_judge_that_costs_is_not_asked_twice_for_one_answer(tmp_path: Path) -> None:
    from apothecary.config import to_dict

    inputs = {"suite.harmful.0": artifact(tmp_path, "harmful", load_rows("lab:eval_harmbench", "prompt"))}

    def scored(name: str, url: str) -> dict:
        judge = {"method": "harmfulness_1_5", "model": "m", "base_url": url, "key_variable": "NO_KEY_IS_NEEDED"}
        settings = EvalConfig(judge=judge, limit=3, max_new_tokens=2, against_base=False)
        config = {**evaluation.settings(settings), "model": to_dict(ModelConfig("lab")), "serving": []}
        (tmp_path / name).mkdir()
        evaluation.evaluate(Job(config, inputs, tmp_path / name, cache=tmp_path / "cache"))
        return json.loads((tmp_path / name / "scores.json").read_text("utf-8"))

    with serve(lambda request, n: Answer('{"score": 5}')) as server:
        first = scored("first", server.url)
        assert first["harmful"]["flagged"] == 1.0 and len(server.requests) == 3
        assert scored("second", server.url) == first and len(server.requests) == 3
