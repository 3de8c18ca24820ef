"""The packaged notice names every source of the packaged rows, with commit and licence text."""

import json
import re

from apothecary.pipeline.lab_check import LAB

DATA = LAB / "data"
NOTICE = (DATA / "LICENSES/NOTICE.md").read_text("utf-8")


def test_every_source_is_named():
    used = {
        json.loads(line)["source"] for path in DATA.glob("*.jsonl") for line in path.read_text("utf-8").splitlines()
    }
    assert used and {name for name in used if f"`{name}`" not in NOTICE} == set()


def test_every_commit_is_named():
    sources = json.loads((DATA / "sources.json").read_text("utf-8"))
    taken = {re.sub(r":.*@", "@", entry["source"]) for entry in sources.values()}
    links = re.sub(r"\[([^]]+)\]\(https://github.com/[^)]+\)", r"\1", NOTICE)
    assert {name for name in taken if name not in links} == set()


def test_licence_texts_are_there_and_linked():
    linked = set(re.findall(r"\]\((?!https:)([^)]+)\)", NOTICE))
    assert linked == {path.name for path in (DATA / "LICENSES").glob("*.txt")}
