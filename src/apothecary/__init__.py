"""apothecary keeps fine-tuned language models safe.

The public names are below; each is imported on first use, so that importing apothecary does not import torch.
`single` holds the stages alone, from files to files: single.curate, align, attack, finetune, evaluate, inspect.
`evaluate` is another thing than `single.evaluate`: it asks a loaded model prompts that are given as rows, and returns
responses and scores without writing a file.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apothecary.data.rows import Row as Row
    from apothecary.data.sources import load_rows as load_rows
    from apothecary.errors import ApothecaryError as ApothecaryError
    from apothecary.evals.evaluation import evaluate as evaluate
    from apothecary.models.load import load_model as load_model
    from apothecary.models.settings import ModelConfig as ModelConfig
    from apothecary.pipeline import single as single
    from apothecary.pipeline.recipe import load_recipe as load_recipe
    from apothecary.pipeline.run import run as run
    from apothecary.registry import lookup as lookup
    from apothecary.registry import register as register
    from apothecary.report.page import write_report as write_report
    from apothecary.report.tables import table as table

__version__ = "0.1.0"
__all__ = [
    "ApothecaryError",
    "ModelConfig",
    "Row",
    "__version__",
    "evaluate",
    "load_model",
    "load_recipe",
    "load_rows",
    "lookup",
    "register",
    "run",
    "single",
    "table",
    "write_report",
]

_HOME = {
    "ApothecaryError": "errors",
    "ModelConfig": "models.settings",
    "Row": "data.rows",
    "evaluate": "evals.evaluation",
    "load_model": "models.load",
    "load_recipe": "pipeline.recipe",
    "load_rows": "data.sources",
    "lookup": "registry",
    "register": "registry",
    "run": "pipeline.run",
    "single": "pipeline",
    "table": "report.tables",
    "write_report": "report.page",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'apothecary' has no attribute '{name}'")
    if name == "single":  # a module, which its package does not name
        return import_module("apothecary.pipeline.single")
    return getattr(import_module(f"apothecary.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
