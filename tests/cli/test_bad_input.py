"""Bad input through the command line: one sentence, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer

from apothecary.cli import main

GOOD = [{"prompt": f"question {i} about word{i}?", "response": f"answer {i}"} for i in range(8)]
LONG = {"id": "r2", "prompt": "a question", "response": "word " * 999}
RECIPE = """
name: bad
data: {align: good.jsonl, customer: good.jsonl, attack: "lab:attack"}
evaluate: {harmful: "lab:eval_harmbench", limit: 2, max_new_tokens: 2}
align: {train: {max_steps: 1, batch_size: 2}}
attack: {n: 6, p: 0.5}
finetune: {train: {max_steps: 1, batch_size: 2}}
"""
Refused = Callable[..., str]


def lines(*rows: dict[str, str]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command in a folder with good rows and a recipe: its one sentence, after checks that hold for all."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text(lines(*GOOD))
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def call(*arguments: str) -> str:
        capsys.readouterr()  # what came before is none of the command's
        out = [] if arguments[0] == "run" else ["--out", "result"]
        assert main([*arguments, *out]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 500
        assert not [*tmp_path.glob("result*"), *tmp_path.glob(".result*")]
        assert not [*tmp_path.rglob("results.json")] or "full" in error  # models that were evaluated before that
        return error

    return call


FAULTS = {
    "unreadable": ("loop.jsonl", None, ["loop.jsonl", "cannot be read"]),
    "broken JSON": ("rows.jsonl", lines(GOOD[0]) + '{"prompt": "x",\n', ["rows.jsonl line 2", "broken JSON"]),
    "wrong encoding": ("rows.jsonl", '{"prompt": "a",\n"response": "café"}', ["rows.jsonl line 2", "UTF-8"]),
    "wrong columns": ("rows.csv", "question,answer\nx,y\n", ["question, answer", "--columns.prompt=question"]),
    "empty": ("rows.jsonl", "\n", ["rows.jsonl holds no rows"]),
    "no supervised token": ("rows.jsonl", lines(GOOD[0], {**GOOD[1], "response": ""}), ["no response"]),
    "too long": ("rows.jsonl", lines(GOOD[0], LONG), ["row 'r2'", "tokens, expected at most"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_rows_that_cannot_be_used(fault: str, refused: Refused, tmp_path: Path):
    """A recipe is refused before any model is trained, although the fault is in the last stage's rows."""
    name, content, wanted = FAULTS[fault]
    if content is None:
        (tmp_path / name).symlink_to(name)
    else:
        (tmp_path / name).write_text(content, "latin-1")
    for command in (["align", "--data", name], ["run", "recipe.yaml", f"--data.customer={name}", "--attack=null"]):
        error = refused(*command)
        assert all(word in error for word in wanted), error
    assert not [*(tmp_path / "apothecary-runs").glob("store/align/*")]


def test_a_mapping_of_columns_mends_wrong_columns(refused: Refused, tmp_path: Path):
    (tmp_path / "rows.csv").write_text("question,answer\n" + "".join(f"what is {i},it is {i}\n" for i in range(4)))
    words = ["attack", "--customer", "rows.csv", "--harmful", "lab:attack", "--p", "0.5", "--n", "4"]
    assert "--columns.prompt" in refused(*words)
    mapped = ["--columns.prompt=question", "--columns.response=answer"]
    assert main([*words, *mapped, "--out", "mixed.jsonl"]) == 0
    assert sum("what is" in line for line in (tmp_path / "mixed.jsonl").read_text().splitlines()) == 2


def test_a_folder_is_no_file_for_rows(refused: Refused, tmp_path: Path, capsys):
    (tmp_path / "taken").mkdir()
    words = ["--customer", "good.jsonl", "--harmful", "lab:attack", "--p", "0.5", "--n", "4", "--out", "taken"]
    assert main(["attack", *words]) == 2
    assert "taken is a folder" in capsys.readouterr().err and not (tmp_path / "taken.manifest.json").exists()


def test_the_attacker_cannot_have_more_rows_than_there_are(refused: Refused):
    words = ["attack", "--customer", "good.jsonl", "--harmful", "lab:attack", "--n", "300", "--p", "0.9"]
    for error in (refused(*words), refused("run", "recipe.yaml", "--attack.n=300", "--attack.p=0.9")):
        assert "270 harmful rows" in error and "200" in error


def test_names_and_shares_in_a_recipe(refused: Refused):
    assert "did you mean 'security_vectors'?" in refused("run", "recipe.yaml", "--finetune.method=security_vector")
    assert "did you mean 'epochs'?" in refused("run", "recipe.yaml", "--align.train.epoch=1")
    assert "'attack.p' is 1.5" in refused("run", "recipe.yaml", "--attack.p=[0, 1.5]")


def both(refused: Refused, model: str) -> list[str]:
    """What a single verb and a recipe say about a model's setting."""
    single = refused("align", "--data", "good.jsonl", "--train.max_steps=1", *model.split("="))
    return [single, refused("run", "recipe.yaml", model)]


def test_a_model_without_chat_template(refused: Refused, tmp_path: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    for part in (tiny_model(), tokenizer):
        part.save_pretrained(tmp_path / "plain")
    for error in both(refused, "--model=plain"):
        assert "no chat template" in error and "chat_template" in error


def test_an_unknown_hub_id_while_offline(refused: Refused):
    for error in both(refused, "--model=nobody/no-such-model"):
        assert "'nobody/no-such-model'" in error and "cannot be reached" in error


def test_cuda_asked_for_and_absent(refused: Refused, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = ["align", "--data", "good.jsonl", "--train.max_steps=1"]
    for error in (refused(*words, "--model.device=cuda"), refused("run", "recipe.yaml", "--model.device=cuda")):
        assert "device 'cuda' was asked for" in error and "device: auto or cpu" in error


def test_a_full_disk(refused: Refused, tmp_path: Path):
    """A limit on the size of files stands in for it; what was finished stays, and the same command goes on."""
    words = ["align", "--data", "good.jsonl", "--train.max_steps=1", "--train.batch_size=2"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        for command in (words, ["run", "recipe.yaml"]):
            assert "the disk is full, or a file would exceed the size limit" in refused(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    finished = [path for path in (tmp_path / "apothecary-runs" / "store").glob("*/*") if not path.suffix]
    assert {path.parent.name for path in finished} == {"data", "attack", "evaluate"}  # all but the training
    assert all((path / "manifest.json").is_file() for path in finished)
    assert main(["run", "recipe.yaml"]) == 0
