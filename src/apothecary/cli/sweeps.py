"""Verbs of the attacker's sweep: sweep, compare-sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apothecary.cli.common import OVERRIDES, overrides, progress
from apothecary.cli.recipes import DRY, OUT, RUNS, STORE

if TYPE_CHECKING:
    from apothecary.sweep import SweepRecipe


def add(app: typer.Typer) -> None:
    app.command(context_settings=OVERRIDES)(sweep)
    app.command("compare-sweeps")(compare)


def sweep(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="YAML file with a section `sweep`.")],
    store: STORE = RUNS / "store",
    out: OUT = None,
    dry_run: DRY = False,
) -> None:
    """Search the attacker's settings for each defence's worst case, with the same budget for every arm.

    A sweep that was stopped or killed goes on where it was; arms can be picked by --arms=[undefended, vaccine].

    Example: apothecary sweep recipes/attacker.yaml --sweep.trials=30
    """
    from apothecary.sweep import load_sweep

    loaded = load_sweep(recipe, overrides(context))
    if dry_run:
        show_plan(loaded, store)
        return
    from apothecary.report.sweep import PAGE, note, write_sweep_report
    from apothecary.report.sweep_text import sentence
    from apothecary.report.text import duration
    from apothecary.sweep import sweep as run

    def update(result: Any) -> None:
        write_sweep_report(result.results, result.folder / PAGE)

    with progress() as shown:
        result = run(loaded, store=store, out=out, progress=shown, on_update=update)
    print(f"\n{sentence(result.results)}\n{note(result.results)}\n")
    if result.results["seconds"] is not None:
        print(f"time: {duration(result.results['seconds'])}, all resumptions together")
    print(f"results: {result.folder / 'sweep.json'}")
    print(f"page: {(result.folder / PAGE).resolve()}")


def show_plan(recipe: SweepRecipe, store: Path) -> None:
    """How many trials there will be, what is searched and about how long it takes."""
    from apothecary.sweep.estimate import cost

    config, found = recipe.config, cost(recipe, store)
    for arm in recipe.arms:
        print(f"{arm}: {config.trials} trials")
    for dimension in recipe.space:
        print(f"  {dimension.key}: {dimension.spec()}")
    basis = f"{found.trial:.0f} s a trial, {found.once:.0f} s of other work, {config.workers} workers, none given up"
    print(f"{len(recipe.arms) * config.trials} trials: about {found.total / 60:.0f} min ({basis})")


def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of finished sweeps, or their sweep.json.")],
    out: Annotated[Path, typer.Option(help="File for the page.")] = Path("sweep.html"),
    allow_mixed_budgets: Annotated[bool, typer.Option(help="Compare different budgets; the page says so.")] = False,
) -> None:
    """Put the arms of several sweeps on one page; refused where they were searched with different budgets.

    Example: apothecary compare-sweeps apothecary-runs/attacker apothecary-runs/booster --out both.html
    """
    from apothecary.report.sweep import write_sweep_report
    from apothecary.sweep import load_sweep_result, merged

    results = merged([load_sweep_result(folder).results for folder in folders], allow_mixed_budgets)
    write_sweep_report(results, out)
    print(f"page: {out.resolve()}")
