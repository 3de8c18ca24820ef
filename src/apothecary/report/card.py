"""A model card in the form of the Hugging Face hub: what a model was made from, what it faced, and what it scored.

Facts come from a results.json and from the folder's model.json or manifest; what they do not say is called unknown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apothecary.data.files import READERS
from apothecary.errors import ConfigError
from apothecary.pipeline.store import write_atomic, writing
from apothecary.report.exams import about_judge
from apothecary.report.remarks import remarks
from apothecary.report.summary import Estimate, Group, Summary, recipe_arms, summarise
from apothecary.report.tables import COLUMNS, Column, measured, proxy_note
from apothecary.report.text import bounds, listed, ratio

HERE = Path(__file__).parent
UNKNOWN = "unknown"
KINDS = ("curate", "align", "attack", "finetune", "repair")


def choose(results: Mapping[str, Any], folder: Path, arm: str | None = None, p: float | None = None,
           seed: int | None = None) -> dict[str, Any]:  # fmt: skip
    """The entry of the model in `folder`: the one that is named, that has its key or digest, or the only one.

    Raises ConfigError where that is not exactly one.
    """
    models = results["models"]
    asked = {"arm": arm, "p": p, "seed": seed}
    found = [model for model in models if all(value in (None, model.get(key)) for key, value in asked.items())]
    if len(found) > 1:
        names = identity(folder)
        own = [model for model in found if names & {model.get("artifact"), *_digests(model.get("manifest") or {})}]
        found = own or [model for model in found if model.get("stage") == "tuned"] if arm else own
    if len(found) != 1:
        known = sorted({f"{model['arm']}, p = {ratio(model.get('p'))}, seed {model.get('seed')}" for model in models})
        raise ConfigError(
            f"{len(found)} models of the results fit {folder}, expected one; name it by --arm, --p and --seed: "
            f"{'; '.join(known)}"
        )
    return found[0]


def identity(folder: Path) -> set[str]:
    """Names under which results know a model's folder: a store's key, or the digest of its weights."""
    found = {folder.name}
    for name in ("model.json", "manifest.json"):
        if (folder / name).is_file():
            told = json.loads((folder / name).read_text("utf-8"))
            found |= {value for value in (told.get("key"), *_digests(told)) if value}
    return found


def _digests(told: Mapping[str, Any]) -> tuple[Any, ...]:
    return told.get("digest"), told.get("model_digest")


def card(results: dict[str, Any], entry: dict[str, Any], license: str = UNKNOWN, name: str | None = None) -> str:
    """README.md of one evaluated model: YAML front matter and text."""
    import yaml
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    view = summarise({**results, "models": [entry]})
    whole = summarise(results)
    group = view.groups[0]
    title = name or f"{results.get('name') or 'model'}: {group.label}"
    head = yaml.safe_dump(front_matter(results, entry, view, license, title), sort_keys=False, allow_unicode=True)
    made = Environment(loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters.update(ratio=ratio, yaml=lambda told: yaml.safe_dump(told, sort_keys=False, allow_unicode=True))
    text = made.get_template("card.md.j2").render(
        title=title, entry=entry, model=base_model(results), sections=sections(results, entry),
        data=data(results, entry), scores=list(scores(view, group)), note=proxy_note(view),
        judge=about_judge(view, group), limits=limits(whole, entry), versions=results.get("versions") or {},
        created=results.get("created") or UNKNOWN,
    )  # fmt: skip
    return f"---\n{head}---\n\n{text.strip()}\n"


def front_matter(results: Mapping[str, Any], entry: Mapping[str, Any], view: Summary, license: str,
                 title: str) -> dict[str, Any]:  # fmt: skip
    """What the hub reads: base model, data sets, licence, tags, and the results as a model index."""
    base = base_model(results)["path"]
    hub = sorted({path.partition("@")[0] for _, path, _ in data(results, entry) if _hub(path)})
    methods = [entry.get(kind) for kind in ("align", "finetune") if entry.get(kind) not in (None, "sft")]
    found: dict[str, Any] = {"license": license, "library_name": "transformers", "pipeline_tag": "text-generation"}
    if _hub(base):
        found["base_model"] = base
    if hub:
        found["datasets"] = hub
    found["tags"] = ["apothecary", "safety", "harmful-fine-tuning", *(str(name).replace("_", "-") for name in methods)]
    if index := list(_index(view)):
        found["model-index"] = [{"name": title, "results": index}]
    return found


def _index(view: Summary) -> Iterator[dict[str, Any]]:
    by_suite: dict[str, list[tuple[Column, Estimate]]] = {}
    for column, estimate in scores(view, view.groups[0]):
        by_suite.setdefault(column.suite, []).append((column, estimate))
    for suite, found in by_suite.items():
        yield {
            "task": {"type": "text-generation", "name": "Text generation"},
            "dataset": {"name": f"{suite} prompts ({found[0][1].n})", "type": suite},
            "metrics": [
                {"name": f"{column.title}, % {bounds(estimate)}", "type": _plain(column.title),
                 "value": round(100 * estimate.value, 2)}
                for column, estimate in found
            ],
        }  # fmt: skip


def scores(view: Summary, group: Group) -> Iterator[tuple[Column, Estimate]]:
    """Every score of the model that was measured, with its interval."""
    for column in measured(view):
        if estimate := group.get(column.suite, column.measure):
            yield column, estimate


def base_model(results: Mapping[str, Any]) -> dict[str, str]:
    """Path and revision of the base."""
    told = (results.get("recipe") or {}).get("model") or {}
    told = {"path": told} if isinstance(told, str) else told
    return {"path": str(told.get("path") or UNKNOWN), "revision": str(told.get("revision") or "not pinned")}


def sections(results: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of each stage behind the model: from the recipe's arm, or from the folder's lineage."""
    recipe = results.get("recipe") or {}
    arm = recipe_arms(results).get(str(entry.get("arm")), recipe)
    found = {kind: dict(arm[kind]) for kind in KINDS if isinstance(arm.get(kind), Mapping)}
    for step in (entry.get("manifest") or {}).get("lineage") or ():
        found[step["kind"]] = {"method": step["method"], "seed": step["seed"], "fields": step["settings"],
                               **({"train": step["train"]} if "train" in step else {})}  # fmt: skip
    if "attack" in found and entry.get("p") is not None:  # one of the recipe's shares
        found["attack"].pop("p", None)
        found["attack"]["fields"] = {**(found["attack"].get("fields") or {}), "p": entry["p"]}
    stage = entry.get("stage")
    last = {"base": (), "aligned": ("curate", "align")}.get(str(stage), KINDS)
    return {kind: section for kind, section in found.items() if kind in last}


def data(results: Mapping[str, Any], entry: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(role, source, digest of its rows) of all rows behind the model."""
    recipe = results.get("recipe") or {}
    sources = recipe_arms(results).get(str(entry.get("arm")), recipe).get("data") or {}
    stages = [stage for stage in results.get("stages") or () if stage.get("kind") == "data"]
    digests = {stage["label"]: stage.get("digest") for stage in stages}
    found = [(role, str(source["path"]), str(digests.get(f"{role} rows: {source['path']}") or UNKNOWN))
             for role, source in sources.items()]  # fmt: skip
    for step in (entry.get("manifest") or {}).get("lineage") or ():
        for role, told in {step["kind"]: step.get("data"), **step.get("aux", {})}.items():
            if told and "source" in told:
                found.append((role, str(told["source"]["path"]), str(told["digest"])))
    return found


def limits(view: Summary, entry: Mapping[str, Any]) -> list[str]:
    """What a reader must not conclude."""
    found = [remark for remark in remarks(view) if "knew" in remark or "verdict" in remark or "One seed" in remark]
    if entry.get("p"):
        found.insert(0, f"It was tuned on rows of which {ratio(entry['p'])} were harmful, to see what is left of its "
                        "safety: an artifact of an experiment, not for release or use.")  # fmt: skip
    if base_model(view.results)["path"] == "lab":
        found.append("The base has a few million parameters; it shows the phenomenon, not its size on a large model.")
    missing = [column.title for column in COLUMNS if column.measure != "flagged" and column not in measured(view)]
    if missing:
        found.append(f"Not measured: {listed(missing)}.")
    return found


def _hub(path: str) -> bool:
    """Whether a path is owner/name of the hub rather than a file or folder."""
    name = path.partition("@")[0]
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)) and not (
        Path(name).exists() or Path(name).suffix.lower() in READERS
    )


def _plain(title: str) -> str:
    """`HS+` as `hs_plus`."""
    return title.replace("+", " plus").replace("-", " ").replace(" ", "_").lower()


def write_card(results: dict[str, Any], entry: dict[str, Any], path: Path, license: str = UNKNOWN) -> Path:
    """Write the card to `path`, in one step, and return it; StoreError if it cannot be written."""
    with writing("the card", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, card(results, entry, license))
    return path
