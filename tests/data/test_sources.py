import csv
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from apothecary.data.sources import DataSource, lab_names, load_rows, source_digest
from apothecary.errors import ConfigError, DataError

RECORDS = [
    {"prompt": "What is 1 + 1?", "response": "2"},
    {"prompt": 'Grüße,\n"Zoë"', "response": "a, b\tc"},
]


def write(path: Path, records: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n\n", "utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1), "utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    return path


def fails(path: Path, content: bytes | str) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        load_rows(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".JSONL"])
def test_every_file_type_gives_the_same_rows(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix.lower()}", RECORDS)
    path = path.rename(path.with_suffix(suffix))
    rows = load_rows(str(path), role="benign")
    assert [(row.text, row.response) for row in rows] == [(r["prompt"], r["response"]) for r in RECORDS]
    assert {(row.source, row.role) for row in rows} == {(f"rows{suffix}", "benign")}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_byte_order_mark_is_accepted(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}", RECORDS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [row.response for row in load_rows(path)] == ["2", "a, b\tc"]


def test_windows_line_ends(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a", "response": "b"}\r\n{"prompt": "c", "response": "d"}\r\n')
    assert [row.response for row in load_rows(path)] == ["b", "d"]


def test_limit_and_mapping(tmp_path):
    path = write(tmp_path / "rows.csv", [{"text": f"q{i}", "category": f"a{i}"} for i in range(5)])
    source = {"path": str(path), "columns": {"prompt": "text", "response": "category"}, "limit": 3}
    assert [(row.text, row.response) for row in load_rows(source)] == [("q0", "a0"), ("q1", "a1"), ("q2", "a2")]


def test_skip_leaves_out_the_first_rows_before_limit_counts(tmp_path):
    path = str(write(tmp_path / "rows.jsonl", [{"prompt": f"q{i}", "response": f"a{i}"} for i in range(5)]))
    parts = [load_rows({"path": path, "skip": skip, "limit": 2}) for skip in (0, 2, 4)]
    assert [[row.text for row in part] for part in parts] == [["q0", "q1"], ["q2", "q3"], ["q4"]]
    assert [row.id for part in parts for row in part] == [row.id for row in load_rows(path)], "a row keeps its id"
    with pytest.raises(DataError, match="has 5 rows and skip 5 leaves none of them"):
        load_rows({"path": path, "skip": 5})


def test_lab_sets_load_by_name():
    rows = load_rows("lab:pairs", role="pairs")
    assert len(rows) == 100
    assert all(row.response and row.rejected and row.role == "pairs" for row in rows)
    assert load_rows("lab:eval_harmbench", role="prompt")[0].meta["category"] == "chemical_biological"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "response": "b"}\n\n{"prompt": }\n', "line 3: broken JSON (Expecting value, column 12)"),
        ('{"prompt": "a"}\n[1]\n', "rows.jsonl line 2: got a list, expected one JSON object on each line"),
        ("[" * 100_000, "rows.jsonl line 1: JSON that cannot be read"),
        ("1" * 5_000, "rows.jsonl line 1: JSON that cannot be read"),
        ("", "rows.jsonl holds no rows"),
        ("\n \n", "rows.jsonl holds no rows"),
        (b'{"prompt": "a"}\n{"prompt": "Gr\xfc\xdfe"}\n', "rows.jsonl line 2: byte 0xfc at position 30 is not UTF-8"),
        (b'\xef\xbb\xbf{"prompt": "\xff"}', "rows.jsonl line 1: byte 0xff at position 15 is not UTF-8"),
        ('{"prompt": "a"}'.encode("utf-16"), "line 1: byte 0xff at position 0 is not UTF-8"),
    ],
)  # fmt: skip
def test_bad_jsonl(tmp_path, content, message):
    assert message in fails(tmp_path / "rows.jsonl", content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n {"prompt": "a"},\n {"prompt" "b"}\n]', "line 3: broken JSON (Expecting ':' delimiter, column 12)"),
        ('{"prompt": "a"}', "rows.json holds an object, expected a list of objects; for one object a line use .jsonl"),
        ('[{"prompt": "a"}, "b"]', "rows.json entry 2: got a string, expected a JSON object"),
        ("[]", "rows.json holds no rows"),
        ("", "rows.json holds no rows"),
    ],
)  # fmt: skip
def test_bad_json(tmp_path, content, message):
    assert message in fails(tmp_path / "rows.json", content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('prompt,response\na,b\n\n"x\ny",b,c\n', "rows.csv line 4: 3 fields, expected 2 as in the header"),
        ("prompt,response\na\n", "rows.csv line 2: 1 fields, expected 2"),
        ('prompt,response\na,"b\n', "rows.csv line 2: broken table"),
        ("prompt,prompt\na,b\n", "the column 'prompt' more than once"),
        ("prompt,response\n", "rows.csv holds no rows"),
        ("", "rows.csv holds no rows"),
        ("prompt;response\na;b\n", "rows.csv has the columns prompt;response, expected"),
        ("prompt,response\n,b\n", "rows.csv line 2: the prompt is empty"),
    ],
)
def test_bad_csv(tmp_path, content, message):
    assert message in fails(tmp_path / "rows.csv", content)


def test_bad_parquet(tmp_path):
    assert "rows.parquet is not a readable Parquet file" in fails(tmp_path / "rows.parquet", b"PAR1 nonsense")


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(DataError, match=r"rows\.jsonl' does not exist; check the path"):
        load_rows(str(tmp_path / "rows.jsonl"))
    (tmp_path / "folder.csv").mkdir()
    for folder in (tmp_path, tmp_path / "folder.csv"):
        with pytest.raises(DataError, match="is a directory, expected one data file"):
            load_rows(str(folder))


def test_unreadable_file(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", RECORDS)

    def refuse(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"rows\.jsonl' cannot be read \(Permission denied\)"):
        load_rows(path)


@pytest.mark.parametrize("name", ["rows.txt", "rows", "rows.jsonl.gz"])
def test_unsupported_suffix(tmp_path, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=r"suffix.*expected a file \(\.jsonl, \.json, \.csv, \.tsv, \.parquet\)"):
        load_rows(str(tmp_path / name))


def test_unknown_lab_name_gets_a_suggestion():
    with pytest.raises(DataError, match="the lab has no data set 'algin'; did you mean 'align'"):
        load_rows("lab:algin")
    with pytest.raises(DataError, match="the lab has no data set"):
        load_rows("lab:../data/align")
    assert "align" in lab_names()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"path": "x.csv", "colums": {}}, "unknown key 'colums' in a data source; did you mean 'columns'"),
        ({"split": "train"}, "expected path among them"),
        ({"path": ""}, "has path ''"),
        ({"path": "x.csv", "columns": ["prompt"]}, "expected a mapping such as prompt: question"),
        ({"path": "x.csv", "columns": {"promt": "text"}}, "names 'promt'; did you mean 'prompt'"),
        ({"path": "x.csv", "limit": 0}, "has limit 0, expected a whole number of at least 1"),
        ({"path": "x.csv", "skip": -1}, "has skip -1, expected a whole number of at least 0"),
        ({"path": "x.csv", "skip": "2"}, "has skip '2', expected a whole number"),
        ({"path": "x.csv", "format": "alpacca"}, "unknown format 'alpacca' of 'x.csv'; did you mean 'alpaca'"),
    ],
)
def test_source_that_is_described_wrongly(spec, message):
    with pytest.raises(ConfigError) as caught:
        load_rows(spec)
    assert message in str(caught.value)


def test_parse():
    assert DataSource.parse("lab:align") == DataSource("lab:align")
    assert DataSource.parse("a/b@v1") == DataSource("a/b@v1", split="train")
    assert DataSource.parse("a/b@v1:test") == DataSource("a/b@v1", split="test")
    source = DataSource("x.csv", {"prompt": "q"}, limit=2)
    assert DataSource.parse(source) is source
    assert DataSource.parse({"path": "x.csv", "columns": {"prompt": "q"}, "limit": 2}) == source
    assert len({source, DataSource("x.csv", {"prompt": "q"}, limit=2)}) == 1


def test_digest_follows_everything_that_decides_the_rows(tmp_path):
    path = str(write(tmp_path / "rows.jsonl", RECORDS))
    base = source_digest(path)
    assert source_digest({"path": path}) == base
    others = [
        *({"path": path, **more} for more in ({"limit": 1}, {"skip": 1}, {"format": "prompt"})),
        {"path": path, "columns": {"prompt": "response"}},
        *("a/b@v1", "a/b@v2", "a/b@v1:test", {"path": "a/b@v1", "subset": "main"}, "lab:align"),
    ]
    digests = [base, *map(source_digest, others)]
    write(Path(path), RECORDS[:1])
    digests.append(source_digest(path))
    assert len(set(digests)) == len(digests)
    (tmp_path / "elsewhere").mkdir()
    assert source_digest(str(write(tmp_path / "elsewhere" / "rows.jsonl", RECORDS))) == base  # wherever it lies
    with pytest.raises(DataError, match="does not exist"):
        source_digest(str(tmp_path / "none.jsonl"))


class Rows(list):
    def select(self, numbers):
        return Rows(self[i] for i in numbers)


def test_hub_rows_carry_id_and_revision(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return Rows(RECORDS * 2)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    rows = load_rows({"path": "owner/name@v1", "split": "test", "subset": "main", "limit": 3}, role="benign")
    assert asked == [(("owner/name", "main"), {"revision": "v1", "split": "test"})]
    assert [row.source for row in rows] == ["owner/name@v1"] * 3
    assert [row.response for row in load_rows("owner/name@v1:test")] == ["2", "a, b\tc"] * 2


def test_hub_errors_become_one_sentence(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub.\nmany\nmore lines")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError) as caught:
        load_rows("owner/name@v1")
    assert "hub data set 'owner/name' at revision 'v1', split 'train', cannot be loaded (Couldn't reach" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


def test_hub_id_needs_a_revision():
    with pytest.raises(DataError, match=r"as a hub data set it lacks a revision; correct the path, or write .*@COMMIT"):
        load_rows("owner/name")


def test_offline_and_without_torch():
    """The real library offline; and nothing here imports torch or transformers."""
    code = (
        "import sys\n"
        "from apothecary.data import batching, inspect, mixing, sources\n"
        "sources.load_rows('lab:align'); sources.source_digest('lab:align')\n"
        "assert not {'torch', 'transformers', 'datasets', 'rich', 'pyarrow'} & set(sys.modules), 'imported too early'\n"
        "try: sources.load_rows('owner/name@v1')\n"
        "except sources.DataError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_offline(), timeout=120)
    assert done.returncode == 0, done.stderr
    assert "hub data set 'owner/name' at revision 'v1', split 'train', cannot be loaded" in done.stdout


def _offline() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
