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
MARKED = re.compile(r"<!-- ((step_cost|selection|repnoise_leak)\w*) -->\n.*?<!-- end -->", re.DOTALL)
MIB = 2**20


def filled(text: str, results: Path) -> str:
    """The page with each marked part written anew from `results`/NAME.json, where that file exists."""

    def part(found: re.Match) -> str:
        file = results / f"{found[1]}.json"
        body = PARTS[found[2]](json.loads(file.read_text())) if file.exists() else "Not measured yet.\n"
        return f"<!-- {found[1]} -->\n{body}<!-- end -->"

    return MARKED.sub(part, text)


def selection(result: dict[str, Any]) -> str:
    """How many times quicker a pool is scored than row by row."""
    cells = [["layout", "way", "times quicker", "least - most", "correlation", "minutes for 5,000 rows", "target"]]
    for name, row in result["summary"].items():
        layout, way = name.split(": ")
        quick, slow = row["minutes for 5000 rows"].values()
        target = f"at least {row['target']}: {'met' if row['met'] else 'missed'}" if "target" in row else ""
        cells.append([LAYOUTS[layout], way, f"{row['ratio']:.2f}", f"{row['least']:.2f} - {row['most']:.2f}",
                      f"{row['correlation']:.7f}", f"{quick:.1f} for {slow:.1f}", target])  # fmt: skip
    return "\n".join([conditions(result), as_table(cells)])


def repnoise_leak(result: dict[str, Any]) -> str:
    """Time and hooks of a step as the authors' code runs on: means over fifths of the steps."""
    clean, leaking = result["curves"]["clean"], result["curves"]["leaking"]
    cells = [["steps", "hooks", "clean, ms", "leaking, ms", "ratio"]]
    fifth = len(clean) // 5
    for start in range(0, 5 * fifth, fifth):
        times = [1000 * median(step["seconds"] for step in curve[start : start + fifth]) for curve in (clean, leaking)]
        cells.append([f"{start + 1} to {start + fifth}", str(leaking[start + fifth - 1]["hooks"]),
                      *(f"{each:.0f}" for each in times), f"{times[1] / times[0]:.2f}"])  # fmt: skip
    return "\n".join([conditions(result), as_table(cells)])


def as_table(cells: list[list[str]]) -> str:
    lines = [" | ".join(line) for line in [cells[0], ["---"] * len(cells[0]), *cells[1:]]]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


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
    lines = [["configuration", "step", "least - most", "no optimiser", "saved", "weights", "logits", "target"]]
    for name, row in result["summary"]["relative to sft"][layout].items():
        memory, step = result["memory"][layout][name], row["step"]
        times = f"{step['ratio']:.2f}", f"{step['least']:.2f} - {step['most']:.2f}", f"{row['passes']['ratio']:.2f}"
        sizes = (f"{memory[kind] / MIB:.1f}" for kind in ("saved", "weights", "logits"))
        cells = [name, *times, *sizes, "; ".join(targets.get(name, []))]
        lines.append(cells)
    return as_table(lines)


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
    turns = f"{len(result['rounds'])} rounds of " if "rounds" in result else ""
    rows = settings.get("rows", sizes["rows"])
    return (f"{sizes['layers']} layers of width {sizes['hidden']}, {rows} rows of {sizes['tokens']} tokens, "
            f"{settings['dtype']}; {turns}{settings['clock']}; "
            f"{result['machine']['gpu'] or result['machine']['processor']}; {versions}.\n")  # fmt: skip


PARTS = {"step_cost": tables, "selection": selection, "repnoise_leak": repnoise_leak}


if __name__ == "__main__":
    page = ROOT / "docs" / "cost.md"
    page.write_text(filled(page.read_text("utf-8"), ROOT / "benchmarks" / "results"), "utf-8")
    sys.stdout.write(f"{page} is up to date\n")
