"""A little SVG: escaped elements, markers, scales.  Colours are CSS classes: one drawing serves light and dark."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape
from typing import NamedTuple

SLOTS = 6  # colours; markers are seven, so that a pair repeats only after 42 arms
GLYPH = 0.56  # mean width of a letter in em


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def holds(self, other: Box) -> bool:
        across = self.left < other.left and other.right < self.right
        return across and self.top < other.top and other.bottom < self.bottom


def tag(name: str, *children: str, **attributes: object) -> str:
    """An element; `class_` becomes class, underscores become hyphens, numbers are rounded, text must be escaped."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}>{''.join(children)}</{name}>"


def _plain(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def text(x: float, y: float, content: str, class_: str = "t", anchor: str = "start", **attributes: object) -> str:
    """A line of text; escapes its content."""
    return tag("text", escape(content), x=float(x), y=float(y), class_=class_, text_anchor=anchor, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def path(points: Iterable[tuple[float, float]], class_: str, close: bool = False) -> str:
    """A polyline, or a polygon when closed."""
    drawn = "L".join(f"{x:.2f} {y:.2f}" for x, y in points)
    return tag("path", d=f"M{drawn}{'Z' if close else ''}", class_=class_)


_SHAPES: tuple[tuple[tuple[float, float], ...], ...] = (
    (),  # circle
    ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),
    ((0, -1.15), (1.1, 0.8), (-1.1, 0.8)),
    ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
    ((0, 1.15), (1.1, -0.8), (-1.1, -0.8)),
    ((-0.45, -1.15), (0.45, -1.15), (0.45, -0.45), (1.15, -0.45), (1.15, 0.45), (0.45, 0.45),
     (0.45, 1.15), (-0.45, 1.15), (-0.45, 0.45), (-1.15, 0.45), (-1.15, -0.45), (-0.45, -0.45)),
    ((0, -1.15), (1.1, -0.35), (0.68, 0.95), (-0.68, 0.95), (-1.1, -0.35)),
)  # fmt: skip


def marker(slot: int, x: float, y: float, size: float = 5.0, class_: str = "") -> str:
    """The marker of an arm: its shape and colour follow from its slot."""
    shape = _SHAPES[slot % len(_SHAPES)]
    style = f"mark {arm_class(slot)} {class_}".strip()
    if not shape:
        return tag("circle", cx=float(x), cy=float(y), r=float(size), class_=style)
    return path(((x + size * dx, y + size * dy) for dx, dy in shape), style, close=True)


def key(slot: int) -> str:
    """A marker for legends and lists."""
    return tag("svg", marker(slot, 8, 8, 5.5), viewBox="0 0 16 16", class_="key", aria_hidden="true")


def arm_class(slot: int) -> str:
    """The CSS class that sets an arm's colour; slot 0, the undefended arm, has its own."""
    return "arm-0" if slot == 0 else f"arm-{1 + (slot - 1) % (SLOTS - 1)}"


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """A linear map from [low, high] to [start, end]."""
    width = (high - low) or 1.0
    return lambda value: start + (value - low) / width * (end - start)


def wrap(content: str, width: float, size: float, lines: int = 2) -> list[str]:
    """Break text to a width in pixels; what does not fit ends in an ellipsis."""
    limit = max(4, int(width / (size * GLYPH)))
    found, rest = [], " ".join(content.split())
    while rest and len(found) < lines:
        if len(rest) <= limit:
            found.append(rest)
            return found
        space = rest.rfind(" ", 0, limit + 1)
        cut = space if space > 0 else limit
        found.append(rest[:cut])
        rest = rest[cut:].lstrip()
    if rest and found:
        found[-1] = found[-1][: limit - 1].rstrip() + "…"
    return found


def text_box(x: float, y: float, content: str, size: float, anchor: str) -> Box:
    """Roughly where a line of text will lie."""
    width = len(content) * size * GLYPH
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return Box(left, y - size, left + width, y + 0.25 * size)


def drawing(width: float, height: float, label: str, *children: str, class_: str = "") -> str:
    """A whole picture of natural size `width` that shrinks with its container; `label` is what a screen reader says."""
    return tag(
        "svg", *children, viewBox=f"0 0 {_plain(float(width))} {_plain(float(height))}", role="img", aria_label=label,
        class_=f"plot {class_}".strip(), style=f"max-width:{_plain(float(width))}px",
    )  # fmt: skip


def responsive(draw: Callable[[int], str], wide: int, narrow: int) -> str:
    """The same picture drawn for a desk and for a phone; CSS shows one of them."""
    return tag("div", draw(wide), class_="wide-only") + tag("div", draw(narrow), class_="narrow-only")
