"""Write docs/methods: one page for each method name, and the index.

    python scripts/write_method_docs.py            write what changed
    python scripts/write_method_docs.py --check    fail where a page is out of date

What stands between the marks is made from the method's source, from `fidelity.json` and from recipes/results/*.json;
the rest is written by hand and kept.
"""

from __future__ import annotations

import ast
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from apothecary.registry import EVIDENCE, KINDS, Entry, entries, lookup
from apothecary.report.selectors import ranked
from apothecary.report.summary import PLAIN, Group, Summary, summarise
from apothecary.report.tables import measured
from apothecary.report.text import NOTHING, number, ratio

ROOT = Path(__file__).parents[1]
PAGES, RESULTS = ROOT / "docs" / "methods", ROOT / "recipes" / "results"
RANKINGS, KEPT = ("curation", "curation_ranking"), "0.25"  # studies of a planted pool, and the share that is shown
BY_HAND = ("What it is for", "When not to use it", "Where it fails", "Numbers of the paper")
UNWRITTEN = "To be written."
STAGES = {"curate": "chooses alignment rows", "align": "aligns the model", "finetune": "trains on the customer's rows",
          "repair": "edits weights", "attack": "builds the customer's rows as an attacker would",
          "judge": "judges answers"}  # fmt: skip
DATA = {"harmful": "defence", "benign": "benign", "pairs": "pairs", "validation": "validation", "attack": "attack",
        "customer": "customer_train", "general": "customer_general"}  # fmt: skip


def source_of(entry: Entry) -> str:
    return (ROOT / "src" / Path(*entry.module.split(".")).with_suffix(".py")).read_text("utf-8")


# -- the docstring ----------------------------------------------------------------------------------------------------


def sections(doc: str) -> tuple[str, list[str], list[str], list[str]]:
    """(opening, how it works, cost, remarks): the docstring's paragraphs, those that are indented as code."""
    doc = re.sub(r"\s*\((?:methods|docs/lab)\.md[^)]*\)|(?<=\d), methods\.md [\d., ]+(?=\))", "", doc)
    opening, *rest = doc.split("\n\n")
    parts: list[list[str]] = [[], [], []]
    place = 0
    for block in rest:
        if block.startswith("Cost:"):
            parts[1].append(_paragraph(block.removeprefix("Cost:")))
            place = 2
        else:
            parts[place].append(_block(block))
    return _paragraph(opening), parts[0], parts[1], parts[2]


def _paragraph(text: str) -> str:
    return " ".join(text.split())


def _block(block: str) -> str:
    """Indented lines are formulas; a paragraph may follow them without a blank line."""
    made = []
    lines = block.split("\n")
    while lines:
        code = bool(re.match(r"\s{2,}\S", lines[0]))
        count = next((i for i, line in enumerate(lines) if line.startswith("  ") != code), len(lines))
        part, lines = lines[:count], lines[count:]
        indent = min(len(line) - len(line.lstrip()) for line in part)
        made.append("```text\n" + "\n".join(line[indent:] for line in part) + "\n```" if code else
                    _escaped(_paragraph(" ".join(part))))  # fmt: skip
    return "\n\n".join(made)


def _escaped(text: str) -> str:
    """Prose of a docstring as Markdown: stars and underscores mean themselves, quoted code stays."""
    parts = re.split("(`[^`]*`)", text)
    return "".join(part if i % 2 else re.sub(r"([*_<|])", r"\\\1", part) for i, part in enumerate(parts))


# -- hyper-parameters, needs, recipe ----------------------------------------------------------------------------------


def registered(tree: ast.Module, entry: Entry) -> ast.ClassDef:
    for node in tree.body:
        calls = [d for d in getattr(node, "decorator_list", ()) if isinstance(d, ast.Call) and len(d.args) == 2]
        if any([ast.literal_eval(arg) for arg in call.args] == [entry.kind, entry.name] for call in calls):
            assert isinstance(node, ast.ClassDef)
            return node
    raise LookupError(f"{entry.module} registers no {entry.kind} method {entry.name}")


def hyper_parameters(entry: Entry) -> Iterator[tuple[str, str, str, str]]:
    """(name, type, default, remark) of each field, those of the classes that it is made from first."""
    method, made = lookup(entry.kind, entry.name), {}
    settable = {field.name for field in fields(method) if field.init}
    for part in reversed(method.__mro__):
        if part.__module__.startswith("apothecary.") and part.__module__ != "apothecary.registry":
            made |= {line[0]: line for line in _own_fields(part) if line[0] in settable}
    yield from made.values()


def _own_fields(part: type) -> Iterator[tuple[str, str, str, str]]:
    source = Path(str(sys.modules[part.__module__].__file__)).read_text("utf-8")
    tree = ast.parse(source)
    remarks = {token.start[0]: token.string.removeprefix("#").strip()
               for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT
               and not token.string.startswith("# fmt")}  # fmt: skip
    node = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == part.__name__)
    for field in node.body:
        if not isinstance(field, ast.AnnAssign) or "ClassVar" in ast.unparse(field.annotation):
            continue
        lines = range(field.lineno, (field.end_lineno or field.lineno) + 1)
        remark = " ".join(remarks[line] for line in lines if line in remarks)
        default = "required" if field.value is None else ast.unparse(_default(tree, field.value))
        yield ast.unparse(field.target), ast.unparse(field.annotation), default, remark


def _default(tree: ast.Module, value: ast.expr) -> ast.expr:
    """What a `field(default_factory=...)` makes, or a constant of a module of ours stands for."""
    if isinstance(value, ast.Name):
        return _constant(tree, value)
    if not (isinstance(value, ast.Call) and getattr(value.func, "id", "") == "field"):
        return value
    factory = next((k.value for k in value.keywords if k.arg == "default_factory"), value)
    if isinstance(factory, ast.Lambda):
        return factory.body
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == getattr(factory, "id", ""):
            returned = node.body[-1]
            if isinstance(returned, ast.Return) and returned.value is not None:
                return returned.value
    return factory


def _constant(tree: ast.Module, name: ast.Name) -> ast.expr:
    """The expression behind a constant that is written here or imported from a module of ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name.id:
            return node.value
        names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        if name.id in names and str(node.module).startswith("apothecary."):  # type: ignore[attr-defined]
            path = ROOT / "src" / Path(*str(node.module).split(".")).with_suffix(".py")  # type: ignore[attr-defined]
            return _constant(ast.parse(path.read_text("utf-8")), name)
    return name


def needs(source: str, entry: Entry) -> dict[str, Any]:
    for node in registered(ast.parse(source), entry).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "needs":
            assert isinstance(node.value, ast.Call)
            return {str(k.arg): ast.literal_eval(k.value) for k in node.value.keywords}
    return {}


def recipe(entry: Entry, source: str) -> str:
    """A small recipe with the method and its plain settings."""
    wanted = needs(source, entry)
    roles = ["align", *wanted.get("roles", ()), *wanted.get("prepare_roles", ()), "customer"]
    lines = ["data:", *(f"  {role}: lab:{DATA.get(role, role)}" for role in dict.fromkeys(roles))]
    if entry.kind == "judge":
        required = [item.name for item in fields(lookup("judge", entry.name))
                    if item.default is MISSING and item.default_factory is MISSING]  # fmt: skip
        settings = "".join(f", {name}: YOURS" for name in required)
        judge = f"{{method: {entry.name}{settings}}}" if settings else entry.name
        return "\n".join([*lines, "evaluate:", f"  judge: {judge}"])
    lines += [f"{entry.kind}:", f"  method: {entry.name}"]
    lines += [f"  keep: {1 if entry.name == 'full' else 0.5}"] if entry.kind == "curate" else []
    for name, _, default, _ in hyper_parameters(entry):
        try:
            value = ast.literal_eval(default)
        except ValueError:
            continue
        if isinstance(value, (bool, int, float, str)):
            lines.append(f"  {name}: {json.dumps(value)}")
    return "\n".join(lines)


# -- the lab's numbers ------------------------------------------------------------------------------------------------


def measurements(entry: Entry) -> list[str]:
    """Tables of the committed results in which the method took part, the undefended arm beside it.

    Plain training takes part in nearly all: it has those in which it is alone.  An attack has those of several attacks.
    """
    kinds = ("curate", "align", "finetune")
    place = kinds.index(entry.kind) if entry.kind in kinds else None
    made = []
    for file in sorted(RESULTS.glob("*.json")):
        results = json.loads(file.read_text("utf-8"))
        if not isinstance(results.get("models"), list):
            continue
        view = summarise(results)
        if place is None:
            mine = [group for group in view.tuned if view.several_attacks and group.note("attack") == entry.name]
            made += [_measured(file, view, mine)] if mine else []
            continue
        mine = [group for group in view.tuned  # a selector's name is followed by the share that it keeps
                if (group.methods[place] or "").partition(" ")[0] == entry.name
                and (entry.name != "sft" or group.methods == PLAIN)]  # fmt: skip
        if mine:
            shares = {group.p for group in mine}
            beside = [group for group in view.tuned if group.arm == view.undefended and group.p in shares]
            made.append(_measured(file, view, [*(g for g in beside if g not in mine), *mine]))
    return [*orders(entry), *made] if entry.kind == "curate" else made


def orders(entry: Entry) -> Iterator[str]:
    """How a selector ordered the lab's planted pool, from each study that let it."""
    for file in (RESULTS / f"{name}.json" for name in RANKINGS):
        if not file.exists():
            continue
        found = [one for one in ranked(json.loads(file.read_text("utf-8"))) if one.curate["method"] == entry.name]
        if found:
            rows = [["arm", "seeds", "AUC", f"good of {100 * float(KEPT):g} % kept, percent"]]
            rows += [[one.name, str(len(one.found)), one.auc, one.precision(KEPT)] for one in found]
            pools = "a pool of its own for each seed" if found[0].pools > 1 else "one pool for all seeds"
            link = f"[{file.stem}](../../{file.relative_to(ROOT)})"
            yield f"{link}, how good rows were ranked ({pools}), with 95 % intervals:\n\n{table(rows)}"


def _measured(file: Path, view: Summary, groups: list[Group]) -> str:
    columns = [c for c in measured(view) if any(group.get(c.suite, c.measure) for group in groups)]
    rows = [["arm", "p", "seeds", *(c.title for c in columns)]]
    for group in groups:
        found = [group.get(c.suite, c.measure) for c in columns]
        cells = [NOTHING if e is None else f"{number(e.value)} [{100 * e.low:.0f}, {100 * e.high:.0f}]" for e in found]
        rows.append([group.arm, NOTHING if group.p is None else ratio(group.p), str(group.seeds), *cells])
    link = f"[{view.results.get('name') or file.stem}](../../{file.relative_to(ROOT)})"
    return f"{link}, percent with 95 % intervals:\n\n{table(rows)}"


# -- pages ------------------------------------------------------------------------------------------------------------


def table(rows: list[list[str]]) -> str:
    clean = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [clean[0], ["---"] * len(clean[0]), *clean[1:]])


def paper(entry: Entry) -> str:
    return f"[arXiv {entry.paper}](https://arxiv.org/abs/{entry.paper})" if entry.paper else NOTHING


def part(entry: Entry, heading: str) -> Iterator[str]:
    """Everything about one method that its source tells."""
    source = source_of(entry)
    opening, how, cost, remarks = sections(ast.get_docstring(ast.parse(source)) or "")
    wanted = needs(source, entry)
    facts = [["", ""], ["Stage", f"`{entry.kind}`: {STAGES[entry.kind]}"], ["Paper", paper(entry)],
             ["Source", f"[{entry.module.replace('apothecary.', '').replace('.', '/')}.py]"
                        f"(../../src/{entry.module.replace('.', '/')}.py)"],
             ["Tests that pass", entry.status]]  # fmt: skip
    for key, title in (("roles", "Data roles"), ("prepare_roles", "Data roles of its preparation")):
        if wanted.get(key):
            facts.append([title, ", ".join(f"`{role}`" for role in wanted[key])])
    if wanted.get("layouts"):
        facts.append(["Launch", ", ".join(wanted["layouts"])])
    yield heading
    yield _escaped(opening)
    yield table(facts)
    yield from how
    if cost:
        yield "**Cost.** " + _escaped(" ".join(cost))
    yield from remarks
    if fields := list(hyper_parameters(entry)):
        yield table([["Setting", "Type", "Default", ""], *([f"`{n}`", f"`{t}`", f"`{d}`", _escaped(r)]
                                                              for n, t, d, r in fields)])  # fmt: skip
    yield "```yaml\n" + recipe(entry, source) + "\n```"


def generated(name: str, found: list[Entry]) -> str:
    doc = ast.get_docstring(ast.parse(source_of(found[0]))) or name
    title = re.split(r"[:(]", doc.split("\n")[0])[0].strip()
    if len(found) == 1:
        return "\n\n".join(part(found[0], f"# {title}"))
    parts = ["\n\n".join(part(entry, f"## In stage `{entry.kind}`")) for entry in found]
    return "\n\n".join([f"# {title}", *parts])


def lab(found: list[Entry]) -> str:
    made = [text for entry in found for text in measurements(entry)]
    return "\n\n".join(["## Numbers of the lab", *(made or ["Nothing has been measured yet."])])


def page(name: str, found: list[Entry], old: str) -> str:
    """The page with its generated parts renewed and what stands outside them kept."""
    if not old:
        by_hand = "\n\n".join(f"## {title}\n\n{UNWRITTEN}" for title in BY_HAND)
        old = f"{mark('source')}\n\n{by_hand}\n\n{mark('lab')}\n"
    for key, text in (("source", generated(name, found)), ("lab", lab(found))):
        pattern = re.compile(re.escape(mark(key)).replace(re.escape("\n...\n"), r".*?"), re.S)
        old, count = pattern.subn(lambda _: mark(key, text), old)  # noqa: B023
        if count != 1:
            raise SystemExit(f"docs/methods/{name}.md has no place for '{key}'; put this there:\n{mark(key)}")
    return old


def mark(key: str, text: str = "...") -> str:
    return f"<!-- {key}: made by scripts/write_method_docs.py -->\n{text}\n<!-- end of {key} -->"


def index() -> str:
    lines = ["# Methods", "",
             "Made by `scripts/write_method_docs.py`. The last column lists the kinds of tests that exist and pass, as",
             "the test run found them; `apothecary methods` prints the same.", ""]  # fmt: skip
    lines += [f"- **{kind.replace('_', ' ')}**: {text}" for kind, text in zip(EVIDENCE, WHAT, strict=True)]
    for kind in KINDS:
        rows = [[f"[{e.name}]({e.name}.md)", paper(e), _escaped(e.brief_cost), e.status] for e in of_kind(kind)]
        if rows:
            heading = ["Method", "Paper", "Cost", "Tests that pass"]
            lines += ["", f"## {kind}: {STAGES[kind]}", "", table([heading, *rows])]
    return "\n".join(lines) + "\n"


WHAT = ("the properties that define it, in closed form",
        "two optimiser steps, or the scores, equal an independent slow implementation in float64",
        "the step is the slope of the objective that it states",
        "1x8 = 2x4 = 8x1 rows; a method that is defined on a micro-batch sums independent ones",
        "killed anywhere, it ends with the same bytes",
        "two processes end with the weights of one")  # fmt: skip


def of_kind(kind: str) -> Iterable[Entry]:
    return [e for e in entries().values() if e.kind == kind and e.module.startswith("apothecary.")]


def pages() -> dict[Path, str]:
    """Every file of docs/methods as it should be."""
    names: dict[str, list[Entry]] = {}
    for kind in KINDS:
        for entry in of_kind(kind):
            names.setdefault(entry.name, []).append(entry)
    made = {PAGES / "README.md": index()}
    for name, found in names.items():
        path = PAGES / f"{name}.md"
        made[path] = page(name, found, path.read_text("utf-8") if path.exists() else "")
    return made


def outdated() -> list[Path]:
    """Pages that differ from what they should be, and pages of no method."""
    made = pages()
    return [path for path in sorted({*made, *PAGES.glob("*.md")})
            if not path.exists() or path.read_text("utf-8") != made.get(path)]  # fmt: skip


def main() -> None:
    changed, made = outdated(), pages()
    if "--check" in sys.argv:
        sys.exit("\n".join(f"out of date: {path}" for path in changed) or None)
    for path in changed:
        if path in made:
            path.write_text(made[path], "utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
        else:
            print(f"{path.relative_to(ROOT)} is of no registered method; delete it")


if __name__ == "__main__":
    main()
