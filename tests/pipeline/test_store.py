"""The store: what is promised about altered, missing and half-written artifacts."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline import fakes

from apothecary.errors import StoreError
from apothecary.pipeline.stage import Executor
from apothecary.pipeline.store import Artifact, Store, content_digest, payload_files, write_atomic, writing

FAKES = Path(fakes.__file__)
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(["src", str(FAKES.parents[1])])}


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return Executor(Store(tmp_path)).execute(fakes.chain())


def test_a_finished_artifact_says_what_it_is(artifact: Artifact, tmp_path: Path):
    manifest = artifact.verify().manifest
    assert artifact.folder == tmp_path / "align" / manifest["key"][:20]
    assert set(manifest["payload"]) == {"half.txt", "weights/model.json"}
    assert manifest["payload"]["weights/model.json"]["size"] == artifact.path("weights/model.json").stat().st_size
    assert manifest["digest"] == content_digest(manifest["payload"])
    assert manifest["config"] == {"bias": 0, "pause": 0.0, "seed": 0} and manifest["seed"] == 0
    source = manifest["inputs"]["numbers"]
    assert Artifact(tmp_path / source["kind"] / source["key"][:20]).digest == source["digest"]
    assert {"torch", "transformers", "peft", "apothecary"} <= set(manifest["versions"])
    assert manifest["seconds"] >= 0 and manifest["peak_memory_mb"] > 1 and manifest["host"]["cores"] == os.cpu_count()
    events = [json.loads(line) for line in (artifact.folder / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["started", "finished"]
    assert set(events[0]) == {"time", "event", "stage", "detail"}
    assert not (artifact.folder / "checkpoints").exists()
    assert not list(tmp_path.glob("*/*.partial"))


def test_the_content_digest_covers_names_and_bytes_and_nothing_else():
    one = {"a": {"sha256": "1", "size": 1}, "b": {"sha256": "2", "size": 1}}
    assert content_digest(one) == content_digest({"b": {"sha256": "2"}, "a": {"sha256": "1"}})
    assert content_digest(one) != content_digest({"a": {"sha256": "2"}, "b": {"sha256": "1"}})


def test_payload_leaves_out_what_differs_between_equal_runs(tmp_path: Path):
    for name in ("manifest.json", "events.jsonl", "x.log", "checkpoints/1/a", "logs/h.json", "weights/a", "rows.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert payload_files(tmp_path) == ["rows.jsonl", "weights/a"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "weights/model.json").write_text("7"), ["weights/model.json", "was altered"]),
        (lambda folder: (folder / "weights/model.json").unlink(), ["weights/model.json", "is missing"]),
        (lambda folder: (folder / "weights/extra").write_text("x"), ["weights/extra", "was added"]),
        (lambda folder: (folder / "manifest.json").unlink(), ["manifest.json", "is missing"]),
        (lambda folder: (folder / "manifest.json").write_text("{"), ["manifest.json", "unreadable"]),
        (lambda folder: (folder / "manifest.json").write_text("{}"), ["manifest.json", "lacks 'payload'"]),
    ],
)
def test_an_altered_artifact_is_refused_with_the_way_out(artifact: Artifact, change, words: list[str]):
    change(artifact.folder)
    executor = Executor(Store(artifact.folder.parents[1]))
    with pytest.raises(StoreError) as caught:
        executor.execute(fakes.chain())
    assert all(word in str(caught.value) for word in [*words, f"delete the folder {artifact.folder}"]), str(
        caught.value
    )


def test_a_manifest_that_was_made_to_fit_an_altered_file_is_refused(artifact: Artifact):
    manifest = json.loads((artifact.folder / "manifest.json").read_text())
    manifest["payload"]["half.txt"]["sha256"] = "0" * 64
    (artifact.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"manifest\.json was altered"):
        Artifact(artifact.folder).verify()


def test_logs_and_events_may_change(artifact: Artifact):
    (artifact.folder / "events.jsonl").write_text("")
    (artifact.folder / "train.log").unlink()
    assert artifact.verify() is artifact


def test_deleting_the_folder_rebuilds_the_same_content(artifact: Artifact, tmp_path: Path):
    digest, root = artifact.digest, tmp_path
    for path in sorted(artifact.folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    artifact.folder.rmdir()
    again = Executor(Store(root))
    assert again.execute(fakes.chain()).digest == digest
    assert [record.cached for record in again.records.values()] == [True, False]


def test_a_full_disk_is_one_sentence_and_leaves_no_artifact(tmp_path: Path):
    """A file-size limit stands in for a full disk: writing ends with EFBIG (SIGXFSZ is ignored by Python)."""
    done = subprocess.run(
        [sys.executable, FAKES, tmp_path, "fill"], env=ENVIRONMENT, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)),
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("apothecary.errors.StoreError: the disk is full") and str(tmp_path) in last
    assert [path.suffix for path in sorted((tmp_path / "align").iterdir())] == [".lock", ".partial"]
    after = subprocess.run([sys.executable, FAKES, tmp_path, "fill"], env=ENVIRONMENT, capture_output=True, text=True)
    assert after.returncode == 0, after.stderr
    assert not list((tmp_path / "align").glob("*.partial"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_recognised_behind_the_libraries_errors(error: Exception, tmp_path: Path):
    with pytest.raises(StoreError, match="the disk is full"), writing("x", tmp_path):
        try:
            raise error
        except Exception as inner:
            raise ValueError("saving failed") from inner


def test_other_errors_pass_unchanged(tmp_path: Path):
    with pytest.raises(PermissionError), writing("x", tmp_path):
        raise PermissionError(errno.EACCES, "denied", "/somewhere/else")
    with pytest.raises(StoreError, match="choose a writable folder"), writing("x", tmp_path):
        raise PermissionError(errno.EACCES, "denied", str(tmp_path / "y"))


def test_an_unwritable_store_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match=r"cannot write the store in .*; choose a writable folder"):
        Executor(Store(tmp_path / "file" / "store")).execute(fakes.chain())


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "results.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
