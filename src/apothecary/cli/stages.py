"""Verbs that run a single stage: curate, align, attack, finetune, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from apothecary.cli.common import OVERRIDES, is_terminal, overrides, width

MODEL = Annotated[str, typer.Option(help="lab, a hub id, a model's folder, or a folder that align or finetune wrote.")]
DATA = Annotated[str, typer.Option(help="lab:NAME, a file (.jsonl .json .csv .tsv .parquet) or owner/name@revision.")]
METHOD = Annotated[str, typer.Option(help="See `apothecary methods`; its settings are given as --name=value.")]
SEED = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Every random choice follows from it.")]
FOLDER = Annotated[Path, typer.Option(help="New folder for the result.")]
FILE = Annotated[Path, typer.Option(help="File for the rows (JSON lines); it is replaced.")]
AUX = Annotated[str | None, typer.Option(help="Rows for methods that need them.", show_default=False)]
SUITE = Annotated[list[str] | None, typer.Option(help="Prompts of this suite, repeatable; none at all: the lab's.")]


def add(app: typer.Typer) -> None:
    for verb in (curate, align, attack, finetune, evaluate):
        app.command(context_settings=OVERRIDES)(verb)


def curate(
    context: typer.Context,
    data: DATA,
    out: FILE,
    method: METHOD = "random",
    keep: Annotated[float, typer.Option(help="Share of the rows that stay, in (0, 1].")] = 0.5,
    model: MODEL = "lab",
    harmful: AUX = None,
    validation: AUX = None,
    customer: AUX = None,
    seed: SEED = 0,
) -> None:
    """Keep the alignment rows that a selector ranks highest.

    Example: apothecary curate --data lab:align --method random --keep 0.5 --out core.jsonl
    """
    from apothecary.pipeline import single

    options = _options(context, model, harmful=harmful, validation=validation, customer=customer)
    done = single.curate(_mapped(data, options), out, method, keep, seed=seed, **options)
    print(f"kept {done['rows']} of {done['pool']} rows: {out}")


def align(
    context: typer.Context,
    data: DATA,
    out: FOLDER,
    method: METHOD = "sft",
    model: MODEL = "lab",
    harmful: AUX = None,
    benign: AUX = None,
    pairs: AUX = None,
    validation: AUX = None,
    seed: SEED = 0,
) -> None:
    """Align a model on safe answers; training is set by --train.KEY=value.

    Example: apothecary align --model lab --data lab:align --method vaccine --rho=2 --train.epochs=3 --out aligned
    """
    from apothecary.pipeline import single

    options = _options(context, model, harmful=harmful, benign=benign, pairs=pairs, validation=validation)
    rows = _mapped(data, options)
    _trained(single.align(rows, out, method, seed=seed, bars=is_terminal(), **options), out)


def attack(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="File for the rows; a new folder for an attack that edits weights.")],
    customer: AUX = None,
    harmful: AUX = None,
    method: METHOD = "harmful_mix",
    p: Annotated[float | None, typer.Option(help="Share of harmful rows, in [0, 1].", show_default="method's")] = None,
    n: Annotated[int | None, typer.Option(help="Rows in all.", show_default="method's")] = None,
    general_rows: AUX = None,
    model: Annotated[str, typer.Option(help="The aligned model, for attackers who look at it or edit it.")] = "lab",
    seed: SEED = 0,
) -> None:
    """Build the rows that an attacker uploads among a customer's, or edit a model's weights as he would.

    Example: apothecary attack --customer lab:customer_train --harmful lab:attack --p 0.1 --n 500 --out rows.jsonl
    """
    from apothecary.pipeline import single

    options = _options(context, model, customer=customer, attack=harmful, general=general_rows)
    if "customer" in options["aux"]:
        options["aux"]["customer"] = _mapped(options["aux"]["customer"], options)
    settings = {**options["settings"], **{key: value for key, value in (("p", p), ("n", n)) if value is not None}}
    done = single.attack(out, method, data=options["aux"], settings=settings, model=options["model"], seed=seed,
                         allow_contradicting_rows=options.get("allow_contradicting_rows", False))  # fmt: skip
    if "composition" not in done:
        print(f"weights edited: {out}")
        return
    roles = ", ".join(f"{count} {role}" for role, count in done["composition"]["roles"].items())
    print(f"{done['rows']} rows ({roles}): {out}")


def finetune(
    context: typer.Context,
    data: DATA,
    out: FOLDER,
    model: MODEL = "lab",
    method: METHOD = "sft",
    adapter: Annotated[str, typer.Option(help="merged: a fresh one; single: go on with the model's own.")] = "merged",
    harmful: AUX = None,
    benign: AUX = None,
    pairs: AUX = None,
    validation: AUX = None,
    seed: SEED = 0,
) -> None:
    """Fine-tune a model on a customer's rows, with or without a defence; training is set by --train.KEY=value.

    Example: apothecary finetune --model aligned --data rows.jsonl --method security_vectors --harmful lab:defence
    --benign lab:benign --out tuned
    """
    from apothecary.pipeline import single

    options = _options(context, model, harmful=harmful, benign=benign, pairs=pairs, validation=validation)
    rows = _mapped(data, options)
    done = single.finetune(rows, out, method, adapter=adapter, seed=seed, bars=is_terminal(), **options)
    _trained(done, out)


def evaluate(
    context: typer.Context,
    out: FOLDER,
    model: MODEL = "lab",
    harmful: SUITE = None,
    benign: SUITE = None,
    overrefusal: SUITE = None,
    task: SUITE = None,
    judge: Annotated[
        str, typer.Option(help="opening and refusal are cheap proxies; settings are given as --judge.name=value.")
    ] = "opening",
    limit: Annotated[int | None, typer.Option(help="Prompts of each suite; all without it.")] = None,
) -> None:
    """Ask a model the held-out prompts, judge its answers, and save both.

    Example: apothecary evaluate --model tuned --limit 100 --out scores
    """
    from apothecary.pipeline import single
    from apothecary.report.page import table

    options = _options(context, model)
    suites = {"harmful": harmful, "benign": benign, "overrefusal": overrefusal, "task": task}
    settings = {**options["settings"], **{name: rows for name, rows in suites.items() if rows}}
    settings["judge"] = {"method": judge, **settings["judge"]} if "judge" in settings else judge
    results = single.evaluate(options["model"], out, {**settings, "limit": limit})
    print(f"{table(results, width())}\n\nresponses and scores: {out}")
    print(f"as a page: apothecary report {out} --out page.html")


def _options(context: typer.Context, model: str | None, **data: str | None) -> dict[str, Any]:
    """Keyword arguments from flags and --key.sub=value arguments; what is left are the method's settings."""
    from apothecary.config import override

    given = override({}, overrides(context))
    sources = {role: spec for role, spec in {**data, **given.pop("data", {})}.items() if spec is not None}
    if model is None:
        return {"data": sources, "settings": given}
    options = {"model": {"path": model, **given.pop("model", {})}, "aux": sources}
    for name in ("train", "allow_contradicting_rows"):
        if name in given:
            options[name] = given.pop(name)
    return {**options, "settings": given}


def _mapped(data: Any, options: dict[str, Any]) -> Any:
    """The main rows with the columns that --columns.NAME=... maps, which are then no settings of the method."""
    from dataclasses import replace

    from apothecary.data.sources import DataSource

    columns = options["settings"].pop("columns", None)
    return data if columns is None else replace(DataSource.parse(data), columns=columns)


def _trained(done: dict[str, Any], out: Path) -> None:
    loss = f", mean loss {done['loss']:.3f}" if done["loss"] is not None else ""
    print(f"{done['steps']} steps on {done['rows']} rows{loss}: {out}")
