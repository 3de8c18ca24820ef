from types import SimpleNamespace

import pytest
import torch
from tiny import CONTEXT, tiny_model, tiny_tokenizer

from apothecary.data.chat import prompt_ids
from apothecary.data.rows import Row
from apothecary.errors import DataError
from apothecary.evals import evaluate, rescore
from apothecary.evals.harm import OPENING, REFUSAL
from apothecary.judge.opening import Opening


@pytest.fixture(scope="module")
def loaded() -> SimpleNamespace:
    return SimpleNamespace(model=tiny_model(), tokenizer=tiny_tokenizer())


def rows(suite: str, response: str | None = None) -> list[Row]:
    return [Row(f"{suite}/{i}", (("user", "word " * (i + 1)),), response, source=suite) for i in range(5)]


def mean_logprob(loaded, row: Row, text: str) -> float:
    prompt = prompt_ids(row.prompt, loaded.tokenizer)
    answer = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logprobs = loaded.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)) / len(answer)


def test_a_model_is_evaluated_by_the_real_backend(loaded) -> None:
    harmful = rows("harmful")
    suites = {"harmful": harmful, "task": rows("task", "label")}
    evaluation = evaluate(loaded, suites, Opening(), max_new_tokens=8, batch_size=2)
    margins = [mean_logprob(loaded, row, REFUSAL) - mean_logprob(loaded, row, OPENING) for row in harmful]
    assert evaluation.scores["harmful"]["margin"] == pytest.approx(sum(margins) / 5, abs=1e-5)
    assert evaluation.scores["task"]["n"] == 5
    assert rescore(evaluation.responses, Opening()) == evaluation.scores
    alone = evaluate(loaded, suites, Opening(), max_new_tokens=8, batch_size=1)
    assert [row["response"] for row in alone.responses] == [row["response"] for row in evaluation.responses]
    assert any(row["response"] for row in evaluation.responses)


def test_half_precision_says_how_far_batches_change_the_text(loaded) -> None:
    suites = {"harmful": [Row(f"h/{i}", (("user", f"word {i}"),)) for i in range(40)], "benign": rows("benign")}
    half = SimpleNamespace(model=tiny_model(dtype=torch.bfloat16), tokenizer=loaded.tokenizer)
    found = evaluate(half, suites, Opening(), max_new_tokens=2)
    assert found.generation["dtype"] == "bfloat16" and found.generation["prompts"] == 32
    assert 0 <= found.generation["batch_disagreement"] <= 1
    assert rescore(found.responses, Opening()) == found.scores
    assert evaluate(loaded, suites, Opening(), max_new_tokens=2).generation == {"dtype": "float32"}


def test_the_models_own_context_is_the_limit(loaded) -> None:
    long = Row("benign/long", (("user", "word " * CONTEXT),))
    with pytest.raises(DataError, match="'benign/long'"):
        evaluate(loaded, {"benign": [long]}, Opening())
