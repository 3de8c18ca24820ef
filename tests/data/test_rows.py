import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apothecary.data.formats import unique_ids
from apothecary.data.rows import ROLES, Row, content_id, digest, read_rows, write_rows
from apothecary.data.sources import load_rows
from apothecary.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
FILLED = TEXT.filter(str.strip)
ROWS = st.builds(
    Row,
    id=TEXT,
    prompt=st.tuples(st.tuples(st.just("system"), TEXT), st.tuples(st.just("user"), FILLED)),
    response=TEXT | st.none(),
    rejected=TEXT | st.none(),
    source=TEXT,
    role=st.sampled_from(ROLES),
    meta=st.dictionaries(TEXT, TEXT | st.floats(allow_nan=False) | st.booleans(), max_size=2),
)


@settings(max_examples=150, database=None, deadline=None)
@given(st.lists(ROWS, max_size=4))
def test_rows_survive_writing_and_reading(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path, rows)
    assert read_rows(path) == rows
    assert digest(read_rows(path)) == digest(rows)


@settings(max_examples=100, database=None, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=4))
def test_load_rows_reads_our_own_form(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = unique_ids(rows)
    write_rows(path, rows)
    assert load_rows(str(path)) == rows


def test_line_separators_inside_text_do_not_break_a_line(tmp_path):
    row = Row("1", (("user", "a\u2028b\x85c\nd"),), "e\u2029f", source="s", role="align")
    write_rows(tmp_path / "rows.jsonl", [row])
    assert read_rows(tmp_path / "rows.jsonl") == [row]
    assert load_rows(tmp_path / "rows.jsonl") == [row]


@pytest.mark.parametrize(
    "content", [b"{}\n", b"[1]\n", b"{\n", b"\xff\n", b'{"id": "a", "prompt": [], "nonsense": 1}\n']
)
def test_foreign_files_are_refused(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.jsonl.* is not a file of apothecary rows"):
        read_rows(path)


def test_digest_sees_content_ids_and_order():
    a, b = Row("a", (("user", "x"),), "y"), Row("b", (("user", "x"),), "y")
    assert digest([a, b]) == digest([a, b])
    variants = [[b, a], [a], [a, replace(b, id="c")], [a, b.with_role("align")], [a, replace(b, response="z")]]
    assert len({digest(rows) for rows in [[a, b], *variants]}) == 6


def test_content_id_depends_on_messages_alone():
    prompt = (("user", "x"),)
    assert content_id(prompt, "y") == content_id(prompt, "y") == content_id(json.loads('[["user", "x"]]'), "y")
    assert len({content_id(prompt, "y"), content_id(prompt, None), content_id((("system", "x"),), "y")}) == 3


def test_text_is_the_last_user_message():
    assert Row("a", (("system", "s"), ("user", "1"), ("assistant", "2"), ("user", "3")), "4").text == "3"
