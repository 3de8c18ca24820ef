"""The harness on a local task file: the answer of a hand-built model is known."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from apothecary.data.chat import token_ids
from apothecary.errors import ConfigError
from apothecary.evals import evaluate, rescore
from apothecary.evals.lm_eval import Harness, check_installed, harness_scores
from apothecary.judge.opening import Opening
from apothecary.stats import mean_interval, wilson

TASK = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {data}, cache_dir: {cache}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""
QUESTIONS = [
    {"question": "Which letter?", "choices": [" zzz", " xxx"], "answer": 0},
    {"question": "And now?", "choices": [" xxx", " zzz"], "answer": 0},
    {"question": "Again?", "choices": [" xxx", " zzz"], "answer": 1},
]


def sample(task: str, kind: str = "none", **metrics: float) -> dict:
    return {"suite": "lm_eval", "source": task, "filter": kind, "metrics": metrics}


def test_means_by_task_and_metric_with_the_interval_that_fits() -> None:
    found = harness_scores([sample("a", acc=1.0, f1=0.5), sample("a", acc=0.0, f1=1.0), sample("b", acc=1.0)])
    assert (found["n"], found["a.acc"], found["a.f1"], found["b.acc"]) == (3, 0.5, 0.75, 1.0)
    assert found["intervals"] == {
        "a.acc": list(wilson(1, 2)), "a.f1": list(mean_interval([0.5, 1.0])), "b.acc": list(wilson(1, 1))
    }  # fmt: skip
    two = harness_scores([sample("a", "strict", acc=0.0), sample("a", "flexible", acc=1.0)])
    assert (two["a/strict.acc"], two["a/flexible.acc"]) == (0.0, 1.0)


def test_settings_and_a_missing_package_are_told(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match=r"tasks is empty"):
        Harness(())
    with pytest.raises(ConfigError, match="expected a folder"):
        Harness(("a",), str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="limit"):
        Harness(("a",), limit=0)
    monkeypatch.setattr("apothecary.evals.lm_eval.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'apothecary\[lm-eval\]'"):
        check_installed()


def test_a_local_task_file_is_run_on_our_model(tmp_path: Path) -> None:
    data = tmp_path / "letters.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS), "utf-8")
    (tmp_path / "letters.yaml").write_text(TASK.format(data=data, cache=tmp_path / "cache"), "utf-8")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    bonus = torch.zeros(model.config.vocab_size)
    bonus[sorted(set(token_ids("z", tokenizer)))] = 30.0
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: logits + bonus)
    loaded = SimpleNamespace(model=model, tokenizer=tokenizer)
    found = evaluate(loaded, {}, Opening(), harness=Harness(("letters",), str(tmp_path)))
    assert [row["metrics"] for row in found.responses] == [{"acc": 1.0}, {"acc": 0.0}, {"acc": 1.0}]
    assert found.scores["lm_eval"]["letters.acc"] == pytest.approx(2 / 3)
    assert rescore(found.responses, Opening()) == found.scores
    with pytest.raises(ConfigError, match="no task 'leters'"):
        evaluate(loaded, {}, Opening(), harness=Harness(("leters",), str(tmp_path)))
