"""Write the measured numbers of the studies into the pages of docs, between the marks that name them.

    python scripts/write_study_docs.py
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from apothecary.report.markdown import markdown
from apothecary.report.paired import difference
from apothecary.report.selectors import Ranked, Saving, as_markdown, ranked, rankings, savings, spread
from apothecary.report.summary import Group, summarise
from apothecary.report.text import NOTHING, bounds, number, points, ratio

ROOT = Path(__file__).parents[1]
PAGES = tuple(ROOT / "docs" / name for name in ("attacks.md", "curation.md", "lab.md"))
RESULTS = ROOT / "recipes" / "results"
MARKED = re.compile(r"<!-- study: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
Results = dict[str, Any]
ANY = (0, math.inf)


def read(name: str) -> Results:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def claim() -> str:
    """Security vectors and the undefended models of the same rows and rates."""
    return markdown(read("security_vectors_claim"), only="undefended*|vectors*")


def who_finds() -> str:
    return as_markdown(rankings(ranked(read("curation"))))


def three_pools() -> str:
    """Every selector as it is used, on pools that share no row."""
    found = [one for one in ranked(read("curation_ranking")) if not one.arm.startswith("match")]
    return as_markdown(rankings(found, reference=_reference(found)))


def _reference(found: list[Ranked]) -> str:
    """Pharmacist as published, or its fast mode where that was too dear to run."""
    return next(name for name in ("pharmacist", "pharmacist score") if name in {one.arm for one in found})


def taken_apart() -> str:
    """post_attack_match with one part changed, beside itself with the same parameters."""
    found = {one.arm: one for one in ranked(read("curation_ranking"))}
    cells = [["post_attack_match", *(text for layout in ("all parameters", "LoRA") for text in
              (f"AUC, {layout}", "less the default's", "good of 50 % kept"))]]  # fmt: skip
    for variant in ("", *(arm.removeprefix("match") for arm in found if arm.startswith("match,"))):
        line = [variant.removeprefix(", ") or "the default: alpha 0.1, sum, no warm-up"]
        for layout in ("", " LoRA"):
            default = f"post_attack_match{layout}"
            one = found.get(f"match{layout}{variant}" if variant else default)
            line += [one.auc, one.less(default), one.precision("0.5")] if one else [NOTHING] * 3
        cells.append(line)
    return as_markdown(cells)


def agreement() -> str:
    """Spearman's correlation of each selector's ranking with Pharmacist's two."""
    stored = read("curation_ranks")
    modes = ("pharmacist", "pharmacist score")
    others = dict.fromkeys(name for pair in stored for name in pair.split(" | "))
    cells = [["selector", *(f"with `{mode}`" for mode in modes)]]
    for name in others:
        found = (stored.get(f"{name} | {mode}") or stored.get(f"{mode} | {name}") for mode in modes)
        cells.append([name, *(spread(list(each.values()), digits=2, within=(-1, 1)) if each else "" for each in found)])
    return as_markdown(cells)


def aligned() -> str:
    """Before any attack."""
    return markdown(read("curation"), only="aligned*")


def methods() -> str:
    """{pharmacist, random, full} x every alignment method."""
    return markdown(read("curation"), base="random, {align}", only="full, *|random, *|pharmacist, *")


def attacks() -> str:
    return markdown(read("attacks"))


def selectors() -> str:
    return markdown(read("curation"), base="random, {align}", only="[!a]*, sft")


def time() -> str:
    """Selection + alignment beside alignment on the whole pool, and what either leaves of safety and of the task."""
    results = read("curation_time")
    view = summarise(results)
    shares = sorted({group.p for group in view.tuned if group.p})
    cells = [["rows, method", "selection, s", "alignment, s", "whole pool, s", "share of its time", "break-even epochs",
              *(text for p in shares for text in (f"HS at {ratio(p)}, less the whole pool's", f"HS+ at {ratio(p)}",
                                                  f"task at {ratio(p)}"))]]  # fmt: skip
    wholes: dict[str, str] = {}
    for one in savings(results):
        whole = _aligned_alike(results, one.whole.align)
        seconds = (one.selection, one.selected.seconds("align"), one.whole.seconds("align"))
        means = [f"{fmean(part.values()):.0f}" for part in seconds]
        wholes.setdefault(whole, means[2])
        pays = (spread(one.shares, digits=2, within=ANY), spread(one.break_even_epochs, digits=1, within=ANY))
        left = [cell for p in shares for cell in (_harm(view.at(one.selected.arm, p), view.at(whole, p)),
                                                  *_left(view.at(one.selected.arm, p)))]  # fmt: skip
        cells.append([one.selected.arm, *means, *pays, *left])
    for arm, seconds in wholes.items():
        left = [cell for p in shares for cell in ("", *_left(view.at(arm, p)))]
        cells.append([arm, "", "", seconds, "", "", *left])
    return as_markdown(cells)


def _aligned_alike(results: Results, align: Mapping[str, Any]) -> str:
    """The arm that aligns so on all rows: "aligned" stands for it among the aligned models."""
    return next(arm["name"] for arm in results["recipe"]["arms"] if arm["align"] == align and not arm.get("curate"))


def _left(group: Group | None) -> list[str]:
    """HS+ and task accuracy."""
    found = [group.get(*score) if group else None for score in (("harmful", "HS+"), ("task", "accuracy"))]
    return [NOTHING if each is None else f"{number(each.value)} {bounds(each)}" for each in found]


def pool_size() -> str:
    """From which pool on selection pays, were its time a + b N and alignment's c N: two pools tell a and b."""
    small, large = ({one.selected.arm: one for one in savings(read(name))} for name in ("curation", "curation_time"))
    cells = [["rows, method", "fixed, s", "per 1,000 rows, s", "pays from", "takes half the time from"]]
    for arm in [arm for arm in large if arm in small and not arm.startswith("random")]:
        (n, t), (m, u) = (_size_and_time(study[arm]) for study in (small, large))
        slope = (u - t) / (m - n)
        fixed = t - slope * n
        one = large[arm]
        whole = fmean(one.whole.seconds("align").values()) / m  # for each row of the pool, over all epochs
        subset = fmean(one.selected.seconds("align").values()) / m
        limits = (_from(fixed, share * whole - subset - slope) for share in (1.0, 0.5))
        cells.append([arm, f"{fixed:.0f}", f"{1000 * slope:.0f}", *limits])
    return as_markdown(cells)


def _size_and_time(one: Saving) -> tuple[int, float]:
    pool = next(iter(one.selected.by_seed.values()))["curate"]["pool"]
    return pool, fmean(one.selection.values())


def _from(fixed: float, saved: float) -> str:
    """The pool at which `fixed` seconds are made good by `saved` seconds for each row."""
    if saved <= 0:
        return "never"
    return f"{max(0, fixed) / saved:.0f} rows" if fixed > 0 else "any size"


def _harm(ours: Group | None, theirs: Group | None) -> str:
    found = difference(ours, theirs) if ours and theirs else None
    return points(found) if found else NOTHING


PARTS: Mapping[str, Callable[[], str]] = {
    part.__name__: part
    for part in (attacks, claim, who_finds, three_pools, taken_apart, agreement, aligned, methods, selectors, time,
                 pool_size)
}


def filled(text: str) -> str:
    """The page with each marked part written anew; a part whose results are not there says so."""

    def part(found: re.Match[str]) -> str:
        try:
            body = PARTS[found[1]]()
        except FileNotFoundError:
            body = "Not measured yet."
        return f"<!-- study: {found[1]} -->\n{body}\n<!-- end -->"

    return MARKED.sub(part, text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text("utf-8")), "utf-8")
        sys.stdout.write(f"{page.relative_to(ROOT)} is up to date\n")
