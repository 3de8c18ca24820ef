"""A model folder: what `align` and `finetune` write when they are run alone, and what `--model` accepts.

model.json    the base model, and one entry for each stage that made this model from it
weights/      full weights, if a stage trained them
before/       adapters of earlier stages, merged in the order of their names
adapter/      the last stage's adapter, a standard PEFT folder
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apothecary.config import build, to_dict
from apothecary.errors import ModelError, StoreError
from apothecary.models.settings import ModelConfig
from apothecary.pipeline.store import writing

if TYPE_CHECKING:
    from apothecary.models.load import LoadedModel

CARD = "model.json"


@dataclass(frozen=True)
class Chained:
    """A base model and what the stages since have made of it."""

    base: ModelConfig
    weights: Path | None = None
    adapters: tuple[Path, ...] = ()
    lineage: tuple[Mapping[str, Any], ...] = ()

    def load(self) -> LoadedModel:
        from apothecary.models.load import load_model

        base = self.base if self.weights is None else replace(self.base, adapter=None)  # the weights hold it already
        return load_model(base, self.adapters, self.weights)

    def grown(self, entry: Mapping[str, Any], single: bool) -> Chained:
        """The chain with one stage more; `single` continues the last adapter instead of adding one."""
        kept = self.adapters[:-1] if single else self.adapters
        return replace(self, adapters=kept, lineage=(*self.lineage, entry))

    def write(self, folder: Path) -> None:
        """Complete a folder that holds the last stage's adapter/ or weights/: earlier parts and model.json."""
        if not (folder / "weights").exists():
            if self.weights is not None:
                shutil.copytree(self.weights, folder / "weights", copy_function=_link)
            for i, adapter in enumerate(self.adapters):
                shutil.copytree(adapter, folder / "before" / f"{i:02}", copy_function=_link)
        base = to_dict(self.base)
        del base["trust_remote_code"]  # is asked for anew each time
        card = {"format": 1, "base": base, "lineage": [to_dict(entry) for entry in self.lineage]}
        (folder / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", "utf-8")


def read_model(spec: str | Path | Mapping[str, Any] | ModelConfig) -> Chained:
    """The model that a user names: lab, hub id, a model's folder, or a folder with model.json; nothing is loaded.

    Settings beside the path, such as dtype, replace those that model.json states.
    """
    if isinstance(spec, ModelConfig):
        given = {key: value for key, value in to_dict(spec).items() if value != getattr(ModelConfig(), key)}
        given["path"] = spec.path
    else:
        given = dict(spec) if isinstance(spec, Mapping) else {"path": str(spec)}
    config = build(ModelConfig, given, "model")
    folder = Path(config.path)
    if not (folder / CARD).is_file():
        return Chained(_absolute(config))
    try:
        card = json.loads((folder / CARD).read_text("utf-8"))
        base, lineage = dict(card["base"]), tuple(card["lineage"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder / CARD} cannot be read ({error!r}); expected a folder that align or finetune wrote"
        ) from error
    base.pop("trust_remote_code", None)  # a file does not decide this
    base = build(ModelConfig, {**base, **{key: value for key, value in given.items() if key != "path"}}, "model")
    weights = folder / "weights"
    adapters = [*sorted((folder / "before").glob("*")), folder / "adapter"]
    found = tuple(path for path in adapters if path.is_dir())
    if not found and not weights.is_dir():
        raise ModelError(f"{folder} has neither adapter/ nor weights/, expected a folder that align or finetune wrote")
    return Chained(base, weights if weights.is_dir() else None, found, lineage)


def _absolute(config: ModelConfig) -> ModelConfig:
    """Folders as absolute paths, so that model.json may be read from anywhere."""

    def full(path: str | None) -> str | None:
        return str(Path(path).resolve()) if path is not None and Path(path).exists() and path != "lab" else path

    paths = {name: full(getattr(config, name)) for name in ("path", "adapter", "chat_template")}
    return replace(config, **paths)


def _link(source: str, target: str) -> None:
    """A hard link where the file system has them: weights are large and never written to again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to write in, which becomes `out` when all went well and is gone otherwise.

    Raises StoreError if `out` exists and is not an empty folder.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise StoreError(f"{out} exists already, expected a new folder; choose another, or remove it")
    draft = out.with_name(f".{out.name}.{os.getpid()}.partial")
    with writing("the result", out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.mkdir()
            yield draft
            draft.rename(out)
        finally:
            with suppress(OSError):
                shutil.rmtree(draft)
