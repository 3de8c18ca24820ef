"""The pages of docs/methods say what the sources, the badge and the stored results say."""

from __future__ import annotations

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml

from apothecary.pipeline.recipe import Recipe
from apothecary.registry import Entry, entries

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "write_method_docs.py"
OURS = [entry for entry in entries().values() if entry.module.startswith("apothecary.")]


def module_at(path: Path):
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def docs():
    return module_at(SCRIPT)


def test_every_page_is_up_to_date(docs):
    late = [path.name for path in docs.outdated()]
    assert not late, f"run python scripts/write_method_docs.py; out of date: {', '.join(late)}"


def test_the_pages_on_studies_say_what_was_measured():
    studies = module_at(ROOT / "scripts" / "write_study_docs.py")
    pages = [page.read_text("utf-8") for page in studies.PAGES]
    assert list(map(studies.filled, pages)) == pages, "run python scripts/write_study_docs.py"
    assert sorted(name for page in pages for name in studies.MARKED.findall(page)) == sorted(studies.PARTS)


def test_the_page_on_cost_says_what_was_measured():
    costs = module_at(ROOT / "benchmarks" / "tables.py")
    page = (ROOT / "docs" / "cost.md").read_text("utf-8")
    assert costs.filled(page, ROOT / "benchmarks" / "results") == page, "run python benchmarks/tables.py"


def test_every_page_is_written_by_hand_where_it_should_be(docs):
    for name in {entry.name for entry in OURS}:
        text = (docs.PAGES / f"{name}.md").read_text("utf-8")
        assert docs.UNWRITTEN not in text, f"docs/methods/{name}.md has parts that nobody has written"
        assert all(f"## {title}\n" in text for title in docs.BY_HAND), name


@pytest.mark.parametrize("entry", OURS, ids=lambda entry: f"{entry.kind}/{entry.name}")
def test_the_recipe_of_a_page_is_one(docs, entry):
    found = yaml.safe_load(docs.recipe(entry, docs.source_of(entry)))
    section = getattr(Recipe.parse(found).arms[0], entry.kind, None)
    assert entry.kind == "judge" or section.method == entry.name
    for name, kind, default, remark in docs.hyper_parameters(entry):
        assert default and (remark or kind.startswith("Literal")), f"{entry.name}.{name}: no remark behind its default"


def test_a_new_method_gets_a_page_to_write_and_what_is_written_stays(docs):
    found = [entry for entry in OURS if entry.name == "vaccine"]
    fresh = docs.page("vaccine", found, "")
    assert fresh.count(docs.UNWRITTEN) == len(docs.BY_HAND) and "| `rho` | `float` | `2.0` |" in fresh
    written = fresh.replace(docs.UNWRITTEN, "By hand.").replace("| `rho` | `float` | `2.0` |", "altered")
    again = docs.page("vaccine", found, written)
    assert again == fresh.replace(docs.UNWRITTEN, "By hand.")
    with pytest.raises(SystemExit, match="has no place for 'lab'"):
        docs.page("vaccine", found, written.replace("<!-- end of lab -->", ""))


DOC = """Name: what it does.  Someone 2024, arXiv 1.

    a = b * c
      + d
which is a sum of a_i.

Cost: 1 forward;
2 backward.

Deviations: none (methods.md 4.2)."""


def test_docstrings_become_markdown(docs):
    opening, how, cost, remarks = docs.sections(DOC)
    assert opening == "Name: what it does. Someone 2024, arXiv 1."
    assert how == ["```text\na = b * c\n  + d\n```\n\nwhich is a sum of a\\_i."]
    assert cost == ["1 forward; 2 backward."] and remarks == ["Deviations: none."]


def test_stored_results_are_shown_beside_the_undefended_arm(docs, tmp_path, monkeypatch):
    def model(arm, align, share):
        count = round(100 * share)
        counts = {"n": 100, "counts": {"complies": count, "refuses": 100 - count, "neither": 0}, "judge": "opening"}
        return {"arm": arm, "stage": "tuned", "p": 0.1, "seed": 0, "curate": None, "align": align, "finetune": "sft",
                "scores": {"harmful": {**counts, "HS": share, "refuses": 1 - share, "complies": share}}}  # fmt: skip

    results = {"name": "trial", "models": [model("undefended", "sft", 0.9), model("mine", "vaccine", 0.4)]}
    monkeypatch.setattr(docs, "RESULTS", tmp_path)
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    (tmp_path / "trial.json").write_text(json.dumps(results))
    (tmp_path / "other.json").write_text(json.dumps({"scores": []}))
    (text,) = docs.measurements(Entry("align", "vaccine", "apothecary.align.vaccine"))
    first, second = [line for line in text.splitlines() if "10 %" in line]
    assert first.startswith("| undefended | 10 % | 1 | 90 [") and second.startswith("| mine | 10 % | 1 | 40 [")
    assert docs.measurements(Entry("align", "booster", "apothecary.align.booster")) == []
    assert docs.measurements(Entry("judge", "opening", "apothecary.judge.opening")) == []
