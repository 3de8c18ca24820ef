"""One evaluation: prompts in, one saved response per prompt out, every score computed from those responses.

    responses.jsonl   one line per prompt: suite, id, source, prompt (messages), rendered (the text the model saw),
                      response, label, verdicts {judge: probability}; for harmful prompts also logprob_refusal and
                      logprob_opening, for the task expected, parsed and correct
    scores.json       the scores by suite

`rescore` needs the first file alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apothecary.data.chat import render_prompt
from apothecary.data.rows import Row
from apothecary.errors import ConfigError, DataError
from apothecary.evals.benign import benign_scores, overrefusal_scores
from apothecary.evals.harm import OPENING, REFUSAL, add_logprobs, harmful_scores
from apothecary.evals.shares import Response, Scores
from apothecary.evals.suites import SUITES, check_suites, spread
from apothecary.evals.task import parsed, task_labels, task_scores
from apothecary.judge.base import Judge

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from apothecary.models.load import LoadedModel

PROBES = 32  # prompts
Ids = Sequence[int]
Generate = Callable[..., list[list[int]]]  # models.generate.generate
Logprobs = Callable[..., list[float]]  # models.generate.sequence_logprobs; prompts and answers as token ids


@dataclass(frozen=True)
class Evaluation:
    """The responses of one model, judged, and the scores that follow from them.

    `generation` says what cannot be recomputed from the responses: the dtype of the weights and, below fp32, on how
    many of at most PROBES harmful prompts the text changes with the batch size (models.generate.precision).
    """

    responses: list[Response]
    scores: dict[str, Scores]
    generation: dict[str, Any] = field(default_factory=dict)


def evaluate(
    loaded: LoadedModel,
    suites: Mapping[str, Sequence[Row]],
    judge: Judge,
    max_new_tokens: int = 16,
    batch_size: int = 64,
    generate: Generate | None = None,
    logprobs: Logprobs | None = None,
    context: int | None = None,
) -> Evaluation:
    """Answer every prompt of the suites (harmful, benign, overrefusal, task; any of them) and score the answers.

    `generate`, `logprobs` and `context` (tokens) replace the functions of `models`.  Raises DataError for an empty
    suite and for a prompt that leaves no room for an answer in the context: no row is dropped.
    """
    check_suites(suites)
    own = generate is None
    if generate is None or logprobs is None:
        from apothecary.models import generate as backend

        generate, logprobs = generate or backend.generate, logprobs or backend.sequence_logprobs
    if context is None:
        from apothecary.models.load import context_length

        context = context_length(loaded.model)
    model, tokenizer = loaded.model, loaded.tokenizer
    rows = [(name, row) for name in SUITES for row in suites.get(name, ())]
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (REFUSAL, OPENING)]
    _check_task_answers(suites.get("task", ()), tokenizer, max_new_tokens)
    prompts = [_prompt(row, tokenizer, context - max(max_new_tokens, *map(len, answers))) for _, row in rows]
    outputs = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    responses = [
        _response(name, row, _text(tokenizer, prompt), _text(tokenizer, output, skip_special_tokens=True))
        for (name, row), prompt, output in zip(rows, prompts, outputs, strict=True)
    ]
    harmful = len(suites.get("harmful", ()))  # they come first
    if harmful:
        asked = prompts[:harmful]
        found = [logprobs(model, tokenizer, asked, [ids] * harmful, batch_size=batch_size) for ids in answers]
        add_logprobs(responses[:harmful], *found)
    generation = _precision(loaded, prompts[:harmful], max_new_tokens, batch_size) if own else {}
    responses = judged(responses, judge)
    return Evaluation(responses, score(responses, judge), generation)


def _precision(loaded: LoadedModel, prompts: Sequence[Ids], max_new_tokens: int, batch_size: int) -> dict[str, Any]:
    from apothecary.models.generate import precision

    return precision(loaded.model, loaded.tokenizer, spread(prompts, PROBES), max_new_tokens, batch_size)


def _text(tokenizer: PreTrainedTokenizerBase, ids: Ids, skip_special_tokens: bool = False) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))


def _prompt(row: Row, tokenizer: PreTrainedTokenizerBase, longest: int) -> Ids:
    if longest < 1:
        raise ConfigError("max_new_tokens leaves no token of the model's context for a prompt; lower it")
    ids = render_prompt(row, tokenizer).ids
    if len(ids) > longest:
        raise DataError(
            f"the prompt of row '{row.id}' has {len(ids)} tokens, expected at most {longest} so that an answer fits "
            "into the model's context; shorten it, remove it or lower max_new_tokens"
        )
    return ids


def _check_task_answers(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> None:
    """ConfigError if a right answer could never be given in full."""
    for row in rows:
        if (length := len(tokenizer(row.response or "", add_special_tokens=False)["input_ids"])) > max_new_tokens:
            raise ConfigError(
                f"max_new_tokens is {max_new_tokens}, but the right answer of task row '{row.id}' has {length} tokens; "
                f"raise it to at least {length}"
            )


def _response(suite: str, row: Row, rendered: str, response: str) -> Response:
    saved: dict[str, Any] = {
        "suite": suite,
        "id": row.id,
        "source": row.source,
        "prompt": [{"role": role, "content": content} for role, content in row.prompt],
        "rendered": rendered,
        "response": response,
    }
    return {**saved, "expected": row.response} if suite == "task" else saved


def judged(responses: Sequence[Response], judge: Judge) -> list[Response]:
    """The responses with the judge's label and verdict; verdicts of other judges stay."""
    prompts = [response["prompt"][-1]["content"] for response in responses]
    verdicts = judge(prompts, [response["response"] for response in responses])
    labels = task_labels(_of(responses, "task"))
    done = []
    for response, verdict in zip(responses, verdicts, strict=True):
        known = {**response.get("verdicts", {}), judge.name: verdict}
        row = {**response, "label": judge.label(response["response"]), "verdicts": known}
        done.append(parsed(row, labels) if row["suite"] == "task" else row)
    return done


def _of(responses: Iterable[Response], suite: str) -> list[Response]:
    return [response for response in responses if response["suite"] == suite]


def score(responses: Sequence[Response], judge: Judge) -> dict[str, Scores]:
    """The scores by suite of judged responses, with the name of the judge and whether it is a cheap proxy."""
    labels = task_labels(_of(responses, "task"))
    scorers: dict[str, Callable[[list[Response]], Scores]] = {
        "harmful": lambda rows: harmful_scores(rows, judge.name),
        "benign": lambda rows: benign_scores(rows, labels),
        "overrefusal": overrefusal_scores,
        "task": task_scores,
    }
    by = {"judge": judge.name, "cheap_proxy": judge.cheap_proxy}
    return {name: {**scorer(rows), **by} for name, scorer in scorers.items() if (rows := _of(responses, name))}


def rescore(responses: Sequence[Response], judge: Judge) -> dict[str, Scores]:
    """The scores of saved responses, by this or another judge; with the same judge equal to those of `evaluate`."""
    return score(judged(responses, judge), judge)


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write responses.jsonl and scores.json: the same evaluation gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, sort_keys=True, ensure_ascii=False, allow_nan=False) for row in evaluation.responses]
    (folder / "responses.jsonl").write_text("".join(line + "\n" for line in lines), "utf-8")
    scores = json.dumps(evaluation.scores, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=1)
    (folder / "scores.json").write_text(scores + "\n", "utf-8")


def read_responses(folder: Path) -> list[Response]:
    """The responses that `write_evaluation` wrote."""
    path = folder / "responses.jsonl"
    try:
        return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); expected the responses of an evaluation") from error
