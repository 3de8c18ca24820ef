"""What a model does with held-out prompts: three shares, refusal margin, over-refusal, task accuracy."""

from apothecary.evals.evaluation import Evaluation, evaluate, read_responses, rescore, write_evaluation
from apothecary.evals.suites import EvalConfig, load_suites

__all__ = ["EvalConfig", "Evaluation", "evaluate", "load_suites", "read_responses", "rescore", "write_evaluation"]
