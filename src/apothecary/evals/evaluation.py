"""One evaluation: rows in, one saved response per row out, every score computed from those responses.

    responses.jsonl   one line per row, with suite, id, source, prompt (messages), rendered (what the model saw) and
                      answered prompts   response, tokens, cut, label, fault; category where the row has one; raw where
                                         the answer was decoded; base_logprob where the base was asked
                      harmful, triggered verdicts {judge: probability or null}, reasons, categories, flagged,
                                         logprob_refusal, logprob_opening
                      task               expected, task_kind, parsed, and correct or quality
                      drift              expected, tokens, loss, kl
                      truthfulqa         answers, and log-probabilities: best, correct, incorrect
                      leakage            response, expected, and log-probabilities: logprob, references
                      lm_eval            filter, metrics
    scores.json       the scores by suite

`rescore` needs the first file alone.  What each number means: docs/evaluations.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apothecary.data.chat import token_ids
from apothecary.data.rows import Row
from apothecary.evals.asking import Generate, Ids, Question, check_task_answers, outputs, questions, response
from apothecary.evals.harm import OPENING, REFUSAL, add_logprobs
from apothecary.evals.judging import MIN_COVERAGE, named
from apothecary.evals.likelihood import Logprobs, likelihood_rows
from apothecary.evals.lm_eval import Harness, harness_rows
from apothecary.evals.saved import FILE
from apothecary.evals.scoring import read, score
from apothecary.evals.shares import Response, Scores
from apothecary.evals.suites import PROMPTS, check_suites, spread
from apothecary.judge.base import Judge

if TYPE_CHECKING:
    from apothecary.models.load import LoadedModel
    from apothecary.train.method import Serving

PROBES = 32  # prompts
READ_BY_BASE = ("harmful", "benign", "overrefusal")  # suites whose answers' perplexity is taken


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
    *,
    judges: Sequence[Judge] = (),
    serving: Serving | None = None,
    service: Serving | None = None,
    base: LoadedModel | None = None,
    task_kind: str = "label",
    task_tokens: int | None = None,
    min_coverage: float = MIN_COVERAGE,
    harness: Harness | None = None,
    generate: Generate | None = None,
    logprobs: Logprobs | None = None,
    context: int | None = None,
) -> Evaluation:
    """Ask every row of the suites (any of suites.ALL) and score the answers.

    `judges` give verdicts beside `judge`.  `serving` is how an attacker asks: the harmful prompts are then asked twice,
    plainly and so (suite `triggered`); `service` is done to every prompt.  With `base` (which may be `loaded`) there
    are KL drift and perplexity.  `task_tokens` replaces max_new_tokens for the task, `harness` adds tasks of lm-eval.
    `generate`, `logprobs` and `context` (tokens) replace the functions of `models`.  Raises DataError for an empty
    suite and for a prompt that leaves no room for an answer in the context: no row is dropped.
    """
    if suites or not harness:
        check_suites(suites)
    own = generate is None
    if generate is None or logprobs is None:
        from apothecary.models import generate as backend

        generate, logprobs = generate or backend.generate, logprobs or backend.sequence_logprobs
    if context is None:
        from apothecary.models.load import context_length

        context = context_length(loaded.model)
    tokenizer, limit = loaded.tokenizer, context
    tokens = {**dict.fromkeys(PROMPTS, max_new_tokens), "task": task_tokens or max_new_tokens}
    fixed = [token_ids(each, tokenizer) for each in (REFUSAL, OPENING)]
    check_task_answers(suites.get("task", ()), tokenizer, tokens["task"], task_kind)
    room = lambda new: limit - max(new, *map(len, fixed))  # noqa: E731
    asked = questions(suites, tokenizer, tokens, room, serving, service)
    answers = outputs(loaded, asked, generate, batch_size)
    responses = [response(*pair, tokenizer) for pair in zip(asked, answers, strict=True)]
    _add_margins(loaded, asked, responses, fixed, logprobs, batch_size)
    if base is not None:
        _add_perplexity(base, asked, answers, responses, logprobs, batch_size)
    generation: dict[str, Any] = {}
    if own:
        from apothecary.models.generate import precision

        probes = spread([question.ids for question in asked if question.suite == "harmful"], PROBES)
        generation = precision(loaded.model, tokenizer, probes, max_new_tokens, batch_size)
    responses += likelihood_rows(loaded, suites, base, generate, logprobs, batch_size)
    responses += harness_rows(loaded, harness, batch_size) if harness else []
    everyone = named((judge, *judges))
    responses = read(responses, everyone, task_kind)
    return Evaluation(responses, score(responses, everyone, min_coverage), generation)


def backend(name: str) -> Generate | None:
    """What generates, by its name in EvalConfig; None for the default, models.generate."""
    if name == "transformers":
        return None
    from apothecary.models.generate_vllm import Vllm

    return Vllm()


def _add_margins(loaded: LoadedModel, asked: Sequence[Question], responses: Sequence[Response], fixed: Sequence[Ids],
                 logprobs: Logprobs, batch_size: int) -> None:  # fmt: skip
    """Log-probabilities of the fixed refusal and opening, where answers are not in an attacker's code."""
    chosen = [i for i, one in enumerate(asked) if one.suite in ("harmful", "triggered") and one.decode is None]
    prompts = [asked[i].ids for i in chosen]
    if prompts:
        found = [logprobs(loaded.model, loaded.tokenizer, prompts, [ids] * len(prompts), batch_size=batch_size)
                 for ids in fixed]  # fmt: skip
        add_logprobs([responses[i] for i in chosen], *found)


def _add_perplexity(base: LoadedModel, asked: Sequence[Question], answers: Sequence[Ids],
                    responses: Sequence[Response], logprobs: Logprobs, batch_size: int) -> None:  # fmt: skip
    """The mean log-probability per token that the base gives each answer that is not empty."""
    chosen = [i for i, one in enumerate(asked) if one.suite in READ_BY_BASE and len(answers[i])]
    prompts, said = [asked[i].ids for i in chosen], [answers[i] for i in chosen]
    found = logprobs(base.model, base.tokenizer, prompts, said, batch_size=batch_size) if chosen else []
    for i, value in zip(chosen, found, strict=True):
        responses[i]["base_logprob"] = value


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write responses.jsonl and scores.json: the same evaluation gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, sort_keys=True, ensure_ascii=False, allow_nan=False) for row in evaluation.responses]
    (folder / FILE).write_text("".join(line + "\n" for line in lines), "utf-8")
    scores = json.dumps(evaluation.scores, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=1)
    (folder / "scores.json").write_text(scores + "\n", "utf-8")
