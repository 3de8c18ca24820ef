"""Write the measured costs into the tables of docs/cost.md, between the markers that name their result files.

    python benchmarks/tables.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
LAYOUTS = {"lora": "LoRA, rank 8, all linear layers", "full": "All parameters"}
MARKED = re.compile(r"<!-- (step_cost\w*) -->\n.*?<!-- end -->", re.DOTALL)
MIB = 2**20


def filled(text: str, results: Path) -> str:
    """The page with each marked part written anew from `results`/NAME.json, where that file exists."""

    def part(found: re.Match) -> str:
        file = results / f"{found[1]}.json"
        body = tables(json.loads(file.read_text())) if file.exists() else "Not measured yet.\n"
        return f"<!-- {found[1]} -->\n{body}<!-- end -->"

    return MARKED.sub(part, text)


def tables(result: dict[str, Any]) -> str:
    """One table for each layout that was measured, and under what conditions."""
    parts = [conditions(result)]
    for layout, title in LAYOUTS.items():
        if result["summary"]["relative to sft"][layout]:
            parts.append(f"**{title}**; plain SFT takes {baseline(result, layout):.2f} s a step\n")
            parts.append(table(result, layout))
    return "\n".join(parts)


def table(result: dict[str, Any], layout: str) -> str:
    targets: dict[str, list[str]] = {}
    for target in result["summary"]["targets"]:
        if target["layout"] == layout:
            targets.setdefault(target["name"], []).append(in_words(target))
    lines = ["| configuration | step | least - most | no optimiser | saved | weights | logits | target |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, row in result["summary"]["relative to sft"][layout].items():
        memory, step = result["memory"][layout][name], row["step"]
        times = f"{step['ratio']:.2f}", f"{step['least']:.2f} - {step['most']:.2f}", f"{row['passes']['ratio']:.2f}"
        sizes = (f"{memory[kind] / MIB:.1f}" for kind in ("saved", "weights", "logits"))
        cells = [name, *times, *sizes, "; ".join(targets.get(name, []))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def in_words(target: dict[str, Any]) -> str:
    """A target and whether it is met."""
    kinds = {"step": "", "saved": "saved ", "weights": "weight-sized ", "logits": "logits "}
    scale, unit = (MIB, " MiB") if target["quantity"] == "logits" else (1, "")
    limit, found = (f"{target[key] / scale:.2f}{unit}" for key in ("limit", "found"))
    against = "" if target["against"] in (None, "sft") else f" of {target['against']}"
    sign = "below" if target["strict"] else "at most"
    return f"{kinds[target['quantity']]}{sign} {limit}{against}: {'met' if target['met'] else f'missed ({found})'}"


def baseline(result: dict[str, Any], layout: str) -> float:
    """Seconds of a step of plain SFT: the median over all rounds."""
    steps = [step for entry in result["rounds"] for step in entry.get(layout, {}).get("sft", ())]
    return median(step["passes"] + step["optimiser"] for step in steps)


def conditions(result: dict[str, Any]) -> str:
    settings, sizes = result["settings"], result["settings"]["sizes"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (f"{sizes['layers']} layers of width {sizes['hidden']}, {sizes['rows']} rows of {sizes['tokens']} tokens, "
            f"{settings['dtype']}; {len(result['rounds'])} rounds of {settings['clock']}; "
            f"{result['machine']['gpu'] or result['machine']['processor']}; {versions}.\n")  # fmt: skip


if __name__ == "__main__":
    page = ROOT / "docs" / "cost.md"
    page.write_text(filled(page.read_text("utf-8"), ROOT / "benchmarks" / "results"), "utf-8")
    sys.stdout.write(f"{page} is up to date\n")
