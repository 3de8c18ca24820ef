"""The chain as a picture: curate, align, fine-tune under attack, evaluate, and what each arm does there."""

from __future__ import annotations

from typing import Any

from apothecary.report import svg
from apothecary.report.summary import PLAIN, Group, Summary
from apothecary.report.text import DASH, percent, ratio, shorten

STAGES = ("Curate", "Align", "Fine-tune under attack", "Evaluate")
NAMES = 172.0  # width of the column of arm names, in pixels
STEPS = (152.0, 152.0, 204.0, 180.0)  # widths of the stages
GAP = 24.0
HEAD, ROW = 62.0, 56.0
SIZE = 12.5


def chain(view: Summary) -> str:
    """The picture for a desk (a line for each arm) and for a phone (a block for each stage)."""
    arms = [view.of(arm)[0] for arm in view.arms]
    label = "The chain: curate, align, fine-tune under attack, evaluate. " + "; ".join(
        f"{group.arm}: {', '.join(_cells(view, group))}" for group in arms
    )
    wide, narrow = _wide(view, arms, label), _narrow(view, arms, label)
    return svg.tag("div", wide, class_="wide-only") + svg.tag("div", narrow, class_="narrow-only")


def _captions(view: Summary) -> tuple[str, ...]:
    values = sorted({group.p for group in view.tuned if group.p is not None})
    first, last = (ratio(values[0]), ratio(values[-1])) if values else ("", "")
    span = first if first == last else f"{first.removesuffix(' %')}{DASH}{last}"
    attacks = sorted({name for group in view.tuned if (name := group.note("attack"))})
    attack = shorten(", ".join(attacks) or _attack(view.results.get("recipe")), 14)
    return ("alignment rows", "base model", f"{attack}, p = {span}" if span else attack, "held-out prompts, task")


def _attack(recipe: Any) -> str:
    found = recipe.get("attack") if isinstance(recipe, dict) else None
    if isinstance(found, dict):
        found = found.get("method") or found.get("name")
    return found if isinstance(found, str) else "harmful rows"


def _cells(view: Summary, group: Group) -> tuple[str, ...]:
    """What an arm does at each stage; its harm at the verdict's p stands at the end."""
    curate, align, finetune = group.methods
    at = view.shown(group.arm)
    harm = at.asked(view.harm) if at else None
    adapter = group.note("adapter")
    tuned = (finetune or "none") + (f", {adapter} adapter" if adapter not in (None, _plain_adapter(view)) else "")
    scored = f"{'HS' if view.harm == 'HS' else 'harm'} {percent(harm)}" if harm else "not yet"
    return (curate or "all rows", align or "none", tuned, scored)


def _plain_adapter(view: Summary) -> str | None:
    """The adapter of the undefended arm: only what differs from it is worth a word."""
    bare = view.of(view.undefended) if view.undefended else view.tuned
    return bare[0].note("adapter") if bare else None


def _special(view: Summary, group: Group, stage: int) -> bool:
    """Whether the arm does something else than the undefended one at this stage."""
    bare = view.of(view.undefended)[0] if view.undefended else None
    if bare is None or stage == 3:
        return stage < 3 and group.methods[stage] != PLAIN[stage]
    return _cells(view, group)[stage] != _cells(view, bare)[stage]


def _wide(view: Summary, arms: list[Group], label: str) -> str:
    names = NAMES if arms else 0.0
    left = [names + sum(STEPS[:i]) for i in range(4)]
    boxes = [step - GAP * (i < 3) for i, step in enumerate(STEPS)]
    nodes = [x + box / 2 for x, box in zip(left, boxes, strict=True)]
    parts = []
    for i, (title, caption) in enumerate(zip(STAGES, _captions(view), strict=True)):
        parts.append(svg.tag("rect", x=left[i], y=1, width=boxes[i], height=HEAD - 12, rx=8, class_="stage"))
        parts.append(svg.text(nodes[i], 21, title, "t strong", "middle"))
        parts += [svg.text(nodes[i], 39, line, "t tiny", "middle") for line in svg.wrap(caption, boxes[i] - 4, 11, 1)]
        if i < 3:
            parts.append(_arrow(left[i] + boxes[i] + 4, HEAD / 2 - 5, GAP - 9, 0))
    for row, group in enumerate(arms):
        parts += _route(view, group, HEAD + 28 + row * ROW, nodes)
    return svg.drawing(names + sum(STEPS), HEAD + len(arms) * ROW + (8 if arms else -8), label, *parts)


def _route(view: Summary, group: Group, y: float, nodes: list[float]) -> list[str]:
    """The line of one arm: marker, name, and what it does under each point."""
    slot, colour = view.slot(group.arm), svg.arm_class(view.slot(group.arm))
    names = svg.wrap(group.arm, NAMES - 34, SIZE, 2)
    parts = [svg.marker(slot, 8, y, 5.5), svg.line(nodes[0], y, nodes[3], y, f"route {colour}")]
    parts += [svg.text(22, y + 4 + 15 * (k - (len(names) - 1) / 2), name, "t strong") for k, name in enumerate(names)]
    for i, cell in enumerate(_cells(view, group)):
        parts.append(_node(nodes[i], y, colour, _special(view, group, i)))
        style = "t small strong" if _special(view, group, i) else "t" if i == 3 else "t small"
        parts += [svg.text(nodes[i], y + 21, line, style, "middle") for line in svg.wrap(cell, STEPS[i] - 10, 12, 1)]
    return parts


def _node(x: float, y: float, colour: str, special: bool) -> str:
    return svg.tag("circle", cx=x, cy=y, r=6.0 if special else 4.0, class_=f"node {colour}" + " full" * special)


def _arrow(x: float, y: float, dx: float, dy: float) -> str:
    """An arrow to the right or downwards."""
    tip_x, tip_y = x + dx, y + dy
    back = ((-5, -4), (-5, 4)) if dx else ((-4, -5), (4, -5))
    wings = [(tip_x + wx, tip_y + wy) for wx, wy in back]
    return svg.path(((x, y), (tip_x, tip_y)), "arrow") + svg.path((wings[0], (tip_x, tip_y), wings[1]), "arrow")


def _narrow(view: Summary, arms: list[Group], label: str) -> str:
    width, y, parts = 350.0, 1.0, []
    captions = _captions(view)
    for i, title in enumerate(STAGES):
        rows = _by_cell(view, arms, i)
        height = 50.0 + 24 * len(rows) + (6 if rows else 0)
        parts.append(svg.tag("rect", x=1, y=y, width=width - 2, height=height, rx=8, class_="stage"))
        parts.append(svg.text(14, y + 21, title, "t strong"))
        parts.append(svg.text(14, y + 38, shorten(captions[i], 48), "t tiny"))
        for k, (cell, slots, special) in enumerate(rows):
            base = y + 62 + 24 * k
            shown = slots[:8]
            for j, slot in enumerate(shown):
                parts.append(svg.marker(slot, 20 + 15 * j, base - 4, 5.0))
            room = width - 50 - 15 * len(shown)
            content = svg.wrap(cell, room, SIZE, 1)[0]
            parts.append(svg.text(34 + 15 * (len(shown) - 1), base, content, "t small" + " strong" * special))
        y += height
        if i < 3:
            parts.append(_arrow(width / 2, y + 2, 0, 15))
            y += 20
    return svg.drawing(width, y + 2, label, *parts)


def _by_cell(view: Summary, arms: list[Group], stage: int) -> list[tuple[str, list[int], bool]]:
    """(what is done, markers of the arms that do it, whether it is a defence) at a stage."""
    found: dict[str, tuple[list[int], bool]] = {}
    for group in arms:
        cell = _cells(view, group)[stage]
        key = f"{group.arm}: {cell}" if stage == 3 else cell
        found.setdefault(key, ([], _special(view, group, stage)))[0].append(view.slot(group.arm))
    return [(cell, slots, special) for cell, (slots, special) in found.items()]
