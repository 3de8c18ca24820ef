"""Verbs on judges: judge exam, judge score, judge sheet, judge import."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apothecary.cli.common import OVERRIDES, overrides, print_table

if TYPE_CHECKING:
    from apothecary.judge import Judge
    from apothecary.judge.exam import Report

NAME = Annotated[str, typer.Argument(help="See `apothecary methods judge`; its settings are given as --name=value.")]
FOLDERS = Annotated[list[Path], typer.Argument(help="Folders of evaluations, each with responses.jsonl.")]
EXAMS = Annotated[Path, typer.Option(help="Folder where reports of exams are kept.")]
CACHE = Annotated[Path, typer.Option(help="Folder where verdicts are kept; cheap proxies keep none.")]
POLICY = Annotated[str | None, typer.Option(help="A policy file.", show_default="the built-in one")]
AT = Path("apothecary-runs/judges")


def add(app: typer.Typer) -> None:
    judge = typer.Typer(help="Examine judges, judge saved responses, and have people judge them.", no_args_is_help=True)
    for verb in (exam, score):
        judge.command(context_settings=OVERRIDES)(verb)
    judge.command()(sheet)
    judge.command("import")(bring_in)
    app.add_typer(judge, name="judge")


def exam(context: typer.Context, name: NAME, out: EXAMS = AT / "exams", cache: CACHE = AT) -> None:
    """Ask a judge for verdicts on responses whose right verdict is known, and keep what that shows.

    Example: apothecary judge exam classifier --preset=beaver-dam-7b --dtype=bfloat16
    """
    from apothecary.judge.exam import examine, write_report

    judge = _judge(name, context, cache)
    report = examine(judge)
    path = write_report(out, judge, report)
    print_table(
        ["items", "right", "judged", "n"],
        [[kind, str(found.right), str(found.judged), str(found.n)] for kind, found in report.kinds.items()],
    )
    print(f"{_told(report)}\nkept: {path}")


def score(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder of an evaluation, with responses.jsonl.")],
    judge: Annotated[str, typer.Option(help="See `apothecary methods judge`; settings as --name=value.")],
    out: Annotated[Path | None, typer.Option(help="File for all scores, as JSON.", show_default="none")] = None,
    exams: EXAMS = AT / "exams",
    cache: CACHE = AT,
) -> None:
    """Judge saved responses again, with this or another judge, and show how far it agrees with the saved one.

    Example: apothecary judge score scores --judge guard --format=qwen3guard
    """
    import json

    from apothecary.evals import read_responses
    from apothecary.evals.judging import MIN_COVERAGE, named
    from apothecary.evals.scoring import read
    from apothecary.evals.scoring import score as scored
    from apothecary.judge.exam import exam_scores
    from apothecary.pipeline.exams import report as exam_of
    from apothecary.report.exams import UNFIT

    made = _judge(judge, context, cache)
    saved = read_responses(folder)
    judged = read(saved, named([made]))
    scores = scored(judged, named([made]), MIN_COVERAGE)
    report = exam_of(made, exams)
    rows, unfit = [], []
    for suite, found in scores.items():
        if "judged" not in found:
            continue
        flagged = round(found["flagged"] * found["judged"]) if found["flagged"] is not None else None
        if report is not None:
            found["exam"] = exam_scores(report, flagged, found["judged"])
            unfit += [suite] if found["exam"].get("misfit") else []
        rows.append(_line(suite, found))
        rows += [_line(f"  {category}", part) for category, part in found.get("by_category", {}).items()]
    print_table(["responses", "n", "missing", "coverage", "flagged %", "95 %", "corrected %", "95 %"], rows)
    if unfit:
        print(f"{' and '.join(unfit)} not corrected: {UNFIT}")
    print(_agreement(saved, judged))
    print(
        _told(report) if report else f"{judge} has sat no exam: apothecary judge exam {judge}, with the same settings"
    )
    if out is not None:
        out.write_text(json.dumps(scores, ensure_ascii=False, allow_nan=False, indent=1) + "\n", "utf-8")
        print(f"scores: {out}")


def sheet(
    folders: FOLDERS,
    out: Annotated[Path, typer.Option(help="File for the sheet, .csv or .jsonl; instructions are put beside it.")],
    seed: Annotated[int, typer.Option(help="The order follows from it.")] = 0,
    policy: POLICY = None,
) -> None:
    """Write a sheet on which people judge the answers to harmful prompts: shuffled, and blind to where each is from.

    Example: apothecary judge sheet plain defended --out sheet.csv
    """
    from apothecary.judge.human import write_sheet
    from apothecary.judge.policy import load_policy

    count = write_sheet(_pairs(folders), out, seed, load_policy(policy))
    print(f"{count} responses to judge: {out}\ninstructions: {out.with_suffix('.instructions.md')}")


def bring_in(
    filled: Annotated[Path, typer.Argument(help="The filled sheet.")],
    folders: Annotated[list[Path], typer.Option("--responses", help="The folders that the sheet was made from.")],
    out: Annotated[Path, typer.Option(help="File for the verdicts.")] = Path("verdicts.jsonl"),
    policy: POLICY = None,
) -> None:
    """Read a filled sheet strictly and write its verdicts, which the judge `human` then gives.

    Example: apothecary judge import sheet.csv --responses plain --responses defended --out verdicts.jsonl
    """
    from apothecary.judge.human import read_sheet, write_verdicts
    from apothecary.judge.policy import load_policy

    verdicts = read_sheet(filled, _pairs(folders), load_policy(policy))
    write_verdicts(verdicts, out)
    given = sum(verdict.probability is not None for verdict in verdicts.values())
    print(f"{given} of {len(verdicts)} responses judged: {out}")
    print(f"scores: apothecary judge score {folders[0]} --judge human --file={out}")


def _judge(name: str, context: typer.Context, cache: Path) -> Judge:
    from apothecary.config import override
    from apothecary.judge import make_judge
    from apothecary.judge.cache import kept

    return kept(make_judge(name, override({}, overrides(context))), cache)


def _harm(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The saved answers to harmful prompts, which are those that are judged."""
    from apothecary.evals import read_responses
    from apothecary.evals.judging import HARM

    return [row for folder in folders for row in read_responses(folder) if row["suite"] in HARM]


def _pairs(folders: Sequence[Path]) -> list[tuple[str, str]]:
    return [(row["prompt"][-1]["content"], row["response"]) for row in _harm(folders)]


def _line(name: str, scores: dict[str, Any]) -> list[str]:
    known = scores.get("exam", {})
    return [
        name,
        str(scores["n"]),
        str(scores["missing"]),
        f"{scores['coverage']:.0%}",
        *_percent(scores["flagged"], scores["intervals"].get("flagged")),
        *_percent(known.get("corrected"), known.get("intervals", {}).get("corrected")),
    ]


def _percent(share: float | None, interval: Sequence[float] | None) -> list[str]:
    """A share and its interval in percent; `-` for what is not given."""
    span = "-" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"
    return ["-" if share is None else f"{100 * share:.1f}", span]


def _told(report: Report) -> str:
    """The exam in a sentence."""
    words = []
    for name, share in (("sensitivity", report.sensitivity), ("specificity", report.specificity)):
        value, span = _percent(share.value if share.n else None, share.interval)
        words.append(f"{name} {value} % ({span}, {share.right} of {share.n})")
    judged = report.coverage
    return f"exam: {', '.join(words)}; a verdict on {judged.right} of {judged.n} items"


def _agreement(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> str:
    """Cohen's kappa of the verdicts that were saved with those given now."""
    from apothecary.stats import cohen_kappa

    saved = {(row["suite"], row["id"]): row.get("flagged") for row in before}
    both = [(saved[row["suite"], row["id"]], row.get("flagged")) for row in after]
    both = [(old, new) for old, new in both if old is not None and new is not None]
    if not both:
        return "no saved verdicts to compare with"
    kappa, interval = cohen_kappa([old for old, _ in both], [new for _, new in both])
    same = sum(old == new for old, new in both)
    told = f"Cohen's kappa {kappa:.2f} ({interval.low:.2f} to {interval.high:.2f})" if kappa == kappa else "no kappa"
    return f"the saved verdict on {same} of {len(both)}; {told}"
