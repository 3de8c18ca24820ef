"""A model folder: what `align` and `finetune` write when they are run alone, and what `--model` accepts.

model.json    the base model and its digest, the sha256 of every file below, and one entry for each stage that made
              this model from it; relative paths of the base are seen from this folder
weights/      full weights, if a stage trained them
before/       adapters of earlier stages, merged in the order of their names
adapter/      the last stage's adapter, a standard PEFT folder
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apothecary.config import build, to_dict
from apothecary.errors import ModelError, StoreError
from apothecary.models.digest import LAB, weights_digest
from apothecary.models.settings import ModelConfig
from apothecary.pipeline.store import content_digest, payload_files, sha256, writing

if TYPE_CHECKING:
    from apothecary.models.load import LoadedModel

CARD = "model.json"
_PARTS = ("weights", "before", "adapter")
_PATHS = ("path", "adapter", "chat_template")  # of a ModelConfig


@dataclass(frozen=True)
class Chained:
    """A base model and what the stages since have made of it."""

    base: ModelConfig
    weights: Path | None = None
    adapters: tuple[Path, ...] = ()
    lineage: tuple[Mapping[str, Any], ...] = ()
    digest: str | None = None  # of the folder's weights and adapters; None: the base alone

    def described(self) -> dict[str, Any]:
        """Which model this is, for a manifest: the base, its digest and that of what was trained since."""
        return {"model": to_dict(self.base), "weights_digest": weights_digest(self.base), "model_digest": self.digest}

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
        base = {name: value for name, value in to_dict(self.base).items() if name not in _PATHS}
        del base["trust_remote_code"]  # is asked for anew each time
        payload = _payload(folder)
        card = {
            "format": 1,
            "base": {**{name: _seen_from(folder, getattr(self.base, name)) for name in _PATHS}, **base},
            "weights_digest": weights_digest(self.base),
            "payload": payload,
            "digest": content_digest(payload),
            "lineage": [to_dict(entry) for entry in self.lineage],
        }
        (folder / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", "utf-8")


def read_model(spec: str | Path | Mapping[str, Any] | ModelConfig) -> Chained:
    """The model that a user names: lab, hub id, a model's folder, or a folder with model.json; nothing is loaded.

    Settings beside the path, such as dtype, replace those that model.json states.  Raises ModelError if a file of the
    folder is not what model.json says.
    """
    if isinstance(spec, ModelConfig):
        given = {key: value for key, value in to_dict(spec).items() if value != getattr(ModelConfig(), key)}
        given["path"] = spec.path
    else:
        given = dict(spec) if isinstance(spec, Mapping) else {"path": str(spec)}
    config = build(ModelConfig, given, "model")
    folder = Path(config.path)
    if not (folder / CARD).is_file():
        return Chained(config)
    try:
        card = json.loads((folder / CARD).read_text("utf-8"))
        base, lineage, payload = dict(card["base"]), tuple(card["lineage"]), dict(card["payload"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder / CARD} cannot be read ({error!r}); expected a folder that align or finetune wrote"
        ) from error
    base.pop("trust_remote_code", None)  # a file does not decide this
    base |= {name: _found_from(folder, base[name]) for name in _PATHS if base.get(name)}
    base = build(ModelConfig, {**base, **{key: value for key, value in given.items() if key != "path"}}, "model")
    weights = folder / "weights"
    adapters = [*sorted((folder / "before").glob("*")), folder / "adapter"]
    found = tuple(path for path in adapters if path.is_dir())
    if not found and not weights.is_dir():
        raise ModelError(f"{folder} has neither adapter/ nor weights/, expected a folder that align or finetune wrote")
    _verify(folder, payload)
    return Chained(base, weights if weights.is_dir() else None, found, lineage, content_digest(payload))


def _payload(folder: Path) -> dict[str, dict[str, str]]:
    """The sha256 of each file that makes the model."""
    names = (name for name in payload_files(folder) if name.split("/")[0] in _PARTS)
    return {name: {"sha256": sha256(folder / name)} for name in names}


def _verify(folder: Path, recorded: Mapping[str, Any]) -> None:
    present = _payload(folder)
    for name in sorted({*recorded, *present}):
        if recorded.get(name) != present.get(name):
            what = "was added" if name not in recorded else "is missing" if name not in present else "was altered"
            raise ModelError(
                f"{folder / name} {what} after {CARD} was written, expected the model as it was trained; restore the "
                "file, or train the model again"
            )


def _seen_from(folder: Path, path: str | None) -> str | None:
    """A path for model.json: absolute ones and hub ids as they were given, relative ones as seen from `folder`."""
    if path is None or path == LAB or Path(path).is_absolute() or not Path(path).exists():
        return path
    return os.path.relpath(Path(path).resolve(), folder.resolve())  # starts with "..": the folder is new


def _found_from(folder: Path, path: str) -> str:
    """The path that `_seen_from` wrote, as seen from here; relative where the folder was named so."""
    if not path.startswith(os.pardir):
        return path
    full = (folder.resolve() / path).resolve()
    return str(full) if folder.is_absolute() else os.path.relpath(full)


def without_places(value: Any) -> Any:
    """Settings for a page: of absolute paths under path, adapter or chat_template the last part alone."""
    if isinstance(value, Mapping):
        return {
            key: Path(item).name
            if key in _PATHS and isinstance(item, str) and Path(item).is_absolute()
            else without_places(item)
            for key, item in value.items()
        }
    return [without_places(item) for item in value] if isinstance(value, (list, tuple)) else value


def _link(source: str, target: str) -> None:
    """A hard link where the file system has them: weights are large and never written to again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` for what is needed only while `out` is made; gone at the end, however it ends."""
    with writing("the result", out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            yield Path(folder)


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
