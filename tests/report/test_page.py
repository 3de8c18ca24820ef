"""The page: one file that fetches nothing, hides what it must hide, and renders whatever part of a run is there."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import apothecary.report.page as page_module
from apothecary.errors import StoreError
from apothecary.report.page import render, ticks, tight, write_report

MARKER = "MARKER-of-a-response"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Checker(HTMLParser):
    """Collects text and attributes; fails on tags that do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.fetched, self.text, self.ids, self.refs = [], [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.ids += [value for name, value in attrs if name == "id"]
        self.refs += [value for name, value in attrs if name == "aria-labelledby"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def words(page: str) -> str:
    return " ".join(" ".join(Checker(page).text).replace("\u202f", " ").replace("\u00a0", " ").split())


def test_page_stands_alone(full):
    page = render(full)
    found = Checker(page)
    assert found.fetched == ["data:,"]
    assert not re.search(r"https?://|@import|url\(|<script", page)
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page
    assert len(set(found.ids)) == len(found.ids) and set(found.refs) <= set(found.ids)


def test_page_has_every_section_and_number(full):
    page = render(full)
    text = words(page)
    titles = ("The chain", "Harm against usefulness", "Refuses, complies, neither", "More harmful rows", "All scores")
    for title in (*titles, "Sample responses", "How it was made", "How to read this page"):
        assert f'">{title}</h2>' in page
    assert "cheap proxy" in text and "compliance, not harm" in text
    assert "method: harmful_mix" in text, "the recipe as YAML"
    assert full["models"][3]["artifact"] in text and full["models"][3]["manifest"]["digest"][:15] in text
    assert "aligned, vaccine" in text
    bars = re.findall(r'<span class="bar".*?</span>', page)
    assert len(bars) == 3 + 15, "base, two aligned models, three arms at five values of p"
    for bar in bars:
        assert sum(float(width) for width in re.findall(r"width:([\d.]+)%", bar)) == pytest.approx(100, abs=0.02)


def test_svg_is_labelled_and_classes_exist(full):
    page = render(full)
    for svg in re.findall(r"<svg[^>]*>", page):
        assert ('role="img"' in svg and 'aria-label="' in svg) or 'aria-hidden="true"' in svg
    style = page[page.index("<style>") : page.index("</style>")]
    drawn = {
        name
        for group in re.findall(r'<(?:path|circle|line|rect|text)[^>]* class="([^"]*)"', page)
        for name in group.split()
    }
    assert {name for name in drawn if f".{name}" not in style} == set()


def luminance(colour: str) -> float:
    """WCAG's relative luminance of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_keep_their_contrast_in_both_schemes():
    style = (Path(page_module.__file__).parent / "style.css").read_text("utf-8")
    light, dark = style.split("prefers-color-scheme: dark")
    for scheme in (light, dark):
        colours = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", scheme))
        assert len(colours) == 14, "five of the page, three shares, six arms"
        for name, colour in colours.items():
            if name in ("paper", "panel", "rule"):
                continue
            least = 3.0 if name in ("refuses", "complies", "neither") else 4.5  # areas, and whatever writes text
            for ground in ("paper", "panel") if name in ("ink", "muted") else ("paper",):
                bright, dim = sorted((luminance(colour), luminance(colours[ground])), reverse=True)
                assert (bright + 0.05) / (dim + 0.05) >= least, f"{name} on {ground}"


def test_responses_are_absent_unless_asked_for(demo, tmp_path):
    hidden = write_report(demo, tmp_path / "report.html").read_text("utf-8")
    assert MARKER not in hidden
    assert "Responses are redacted" in hidden
    length = len(demo["models"][0]["samples"][0]["response"])
    assert f"{length} characters" in hidden
    shown = render(demo, redact=False)
    assert MARKER in shown and "Responses are redacted" not in shown
    assert f"{MARKER} <b>" not in shown and f"{MARKER} &lt;b&gt;" in shown, "responses are escaped"


def test_foreign_text_is_escaped_and_shortened(demo):
    evil = "<script>alert('x')</script>"
    for model in demo["models"]:
        model["arm"] = model["arm"].replace("vaccine", evil)
        for sample in model["samples"]:
            sample["prompt"], sample["label"] = evil + " tail" * 90, evil
    demo["recipe"]["note"] = demo["name"] = demo["store"] = demo["stages"][0]["label"] = evil
    demo["models"][0]["manifest"]["digest"] = demo["models"][0]["artifact"] = evil
    page = render(demo)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert " tail" * 40 not in page and "…" in page
    Checker(page)


def test_long_names_are_kept_in_their_boxes(demo):
    name = "a very long name " * 6 + "w" * 80
    for model in demo["models"]:
        model["arm"] = model["arm"].replace("vaccine", name)
    pictures = "".join(re.findall(r"<text.*?</text>", render(demo)))
    assert "w" * 40 not in pictures and "a very long name" in pictures


def test_partial_results_render(demo, build):
    base = {**demo, "models": demo["models"][:1]}
    assert "No arm has been fine-tuned yet" in words(render(base))
    one = words(render(build(("undefended",), (0.1,), 1)))
    assert "no defence has been evaluated yet" in one and "More harmful rows" not in one
    blind = copy.deepcopy(demo)
    for model in blind["models"]:
        del model["scores"]["task"], model["scores"]["overrefusal"]
        model["scores"]["harmful"]["margin"] = model["scores"]["benign"] = None
    text = words(render(blind))
    assert "No task was evaluated" in text and "task accuracy ↑" not in text
    for model in blind["models"]:
        model["scores"], model["samples"], model["manifest"], model["p"] = {}, None, None, None
    assert "No model has been evaluated on harmful prompts yet" in words(render(blind))


@pytest.mark.parametrize("results", [{}, {"models": []}, {"models": [{"arm": "x"}], "stages": [{"kind": "align"}]}])
def test_almost_nothing_renders(results):
    text = words(render(results))
    assert "No model has been evaluated on harmful prompts yet" in text and "cheap proxy" in text


def test_single_p_without_curves_keeps_the_plane(build):
    page = render(build(("undefended", "security vectors"), (0.1,), 1))
    assert "More harmful rows" not in page and "Harm against task accuracy." in page


def test_write_is_atomic(demo, tmp_path, monkeypatch):
    path = tmp_path / "out" / "report.html"
    assert write_report(demo, path) == path
    before = path.read_bytes()
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StoreError, match=r"No space left on device.*choose another path"):
        write_report({**demo, "name": "other"}, path)
    assert path.read_bytes() == before, "the old page is whole"
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"], "nothing half-written stays"


def test_unwritable_place_is_one_sentence(demo, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write the report"):
        write_report(demo, tmp_path / "file" / "report.html")


def test_line_breaks_and_code():
    assert tight("84 % [79, 88] at p = 0") == "84\u202f%\u00a0[79,\u00a088] at p\u00a0=\u00a00"
    assert ticks("`a<b` <i>") == "<code>a&lt;b</code> &lt;i&gt;"


def test_import_is_light():
    heavy = ("torch", "transformers", "scipy", "numpy", "matplotlib", "jinja2")
    code = f"import sys, apothecary.report.page; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_same_results_give_the_same_page(full):
    assert render(full) == render(copy.deepcopy(full))


def test_costs_tell_what_this_run_did_and_what_was_cached(full):
    text = words(render(full))  # 6 cached alignments of 28.5 s, 15 x (21 + 46 + 22) s of fine-tuning
    assert "25 min 06 s of work, 22 min 15 s of it in this run" in text
    assert "align 6 6 2 min 51 s 0 s 728 MB" in text


def test_chain_marks_what_differs_from_the_undefended_arm(build):
    results = build(("undefended", "security vectors", "vaccine"), (0.1,), 1)
    twin = copy.deepcopy(next(model for model in results["models"] if model["arm"] == "undefended"))
    results["models"].append({**twin, "arm": "one adapter", "adapter": "single"})
    picture = re.findall(r'<svg viewBox="0 0 860.*?</svg>', render(results))[0]
    strong = re.findall(r'class="t small strong"[^>]*>([^<]*)<', picture)
    assert strong == ["security_vectors", "vaccine", "sft, single adapter"]
    assert picture.count(" full") == 3 and "harmful_mix, p = 10 %" in picture


def test_a_score_without_direction_claims_none(full):
    page = render(full)
    assert re.search(r'<th scope="col">neither</th>', page)
    assert page.count("harmful prompts</small>") == 1 and "is better" not in page.split("<figcaption>Neither")[1][:60]


def test_curves_show_all_three_shares(full):
    captions = re.findall(r"<figcaption>(.*?) <small>", render(full))
    assert captions == ["Complies (HS)", "Refuses", "Neither", "Task accuracy"]
