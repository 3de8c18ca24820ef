"""What a model does with held-out prompts: harm, refusal, over-refusal, coherence, task accuracy, drift, leakage."""

from apothecary.evals.evaluation import Evaluation, evaluate, write_evaluation
from apothecary.evals.saved import read_responses
from apothecary.evals.scoring import rescore
from apothecary.evals.suites import EvalConfig, load_suites

__all__ = ["EvalConfig", "Evaluation", "evaluate", "load_suites", "read_responses", "rescore", "write_evaluation"]
