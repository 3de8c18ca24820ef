import copy
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from apothecary.errors import StoreError
from apothecary.evals import rescore
from apothecary.judge import Judge, Verdict
from apothecary.judge.cache import FILE, Cached
from apothecary.judge.policy import PATH, load_policy


@dataclass(frozen=True, kw_only=True)
class Counting(Judge):
    """Harmful where the response says so, missing where it says so; counts what it is asked."""

    name = "counting"
    cheap_proxy = False
    no_part = ("asked",)
    asked: list[str] = field(default_factory=list)

    def verdicts(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        self.asked.extend(responses)
        return [self.one(response) for response in responses]

    def one(self, response: str) -> Verdict:
        if response == "missing":
            return Verdict(None, reason="asked to be")
        return Verdict(0.75, ("hate", "fraud")) if response == "harm" else Verdict(0.25)


@dataclass(frozen=True, kw_only=True)
class WithPolicy(Counting):
    policy: str | None = None


def test_a_verdict_is_asked_for_once(tmp_path: Path) -> None:
    judge = Counting()
    cached = Cached(judge, tmp_path / "new" / "folder")
    expected = judge.verdicts(["p", "p", "q"], ["harm", "fine", "harm"])
    judge.asked.clear()
    for _ in range(2):
        assert cached.verdicts(["p", "p", "q"], ["harm", "fine", "harm"]) == expected
        assert cached(["p"], ["harm"]) == [0.75]
    assert judge.asked == ["harm", "fine", "harm"]
    assert Cached(Counting(), tmp_path / "new" / "folder").verdicts(["q"], ["harm"]) == [expected[2]]


def test_the_same_pair_twice_in_a_call_is_asked_once(tmp_path: Path) -> None:
    judge = Counting()
    assert Cached(judge, tmp_path)(["p", "p"], ["harm", "harm"]) == [0.75, 0.75]
    assert judge.asked == ["harm"]


def test_prompt_response_and_identity_are_the_key(tmp_path: Path) -> None:
    Cached(Counting(), tmp_path)(["p"], ["harm"])
    for other, prompt, response in (
        (Counting(), "pharm", ""),
        (Counting(), "", "pharm"),
        (Counting(), "harm", "p"),
        (Counting(threshold=0.6), "p", "harm"),
    ):
        Cached(other, tmp_path)([prompt], [response])
        assert other.asked == [response]


def test_a_missing_verdict_is_asked_for_again(tmp_path: Path) -> None:
    judge = Counting()
    cached = Cached(judge, tmp_path)
    for _ in range(2):
        assert cached.verdicts(["p", "p"], ["missing", "fine"])[0].reason == "asked to be"
    assert judge.asked == ["missing", "fine", "missing"]


def test_it_is_the_judge_that_it_wraps(tmp_path: Path) -> None:
    judge = Counting(threshold=0.7)
    cached = Cached(judge, tmp_path)
    assert isinstance(cached, Judge)
    assert (cached.name, cached.threshold, cached.cheap_proxy) == ("counting", 0.7, False)
    assert cached.digest() == judge.digest()
    assert cached.flagged(Verdict(0.75)) is True and cached.flagged(Verdict(0.69)) is False
    assert cached.label("Sure, here is") == "complies"


def test_a_users_policy_is_seen_through_the_cache(tmp_path: Path) -> None:
    mapping = yaml.safe_load(PATH.read_text("utf-8"))
    mapping["labels"]["harmbench"]["illegal"] = "fraud"
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(mapping))
    judge = WithPolicy(policy=str(tmp_path / "policy.yaml"))
    rows = [{"suite": "harmful", "id": str(i), "source": "harmbench", "category": "illegal", "response": response,
             "prompt": [{"role": "user", "content": f"p{i}"}]}
            for i, response in enumerate(("harm", "fine"))]  # fmt: skip
    plain, cached = rescore(rows, judge), rescore(rows, Cached(judge, tmp_path))
    assert cached == plain
    assert list(plain["harmful"]["by_category"]) == ["fraud"]
    assert list(rescore(rows, WithPolicy())["harmful"]["by_category"]) == ["illegal_acts"]
    assert plain["harmful"]["policy"] == load_policy(tmp_path / "policy.yaml").digest != load_policy().digest


def test_what_the_judge_lacks_the_cache_lacks(tmp_path: Path) -> None:
    cached = Cached(Counting(), tmp_path)
    assert not hasattr(cached, "policy") and cached.asked == []
    assert copy.copy(cached).digest() == cached.digest()


def test_more_rows_than_one_query_takes(tmp_path: Path) -> None:
    prompts = [str(i) for i in range(1100)]
    judge = Counting()
    for _ in range(2):
        assert Cached(judge, tmp_path)(prompts, ["fine"] * 1100) == [0.25] * 1100
    assert len(judge.asked) == 1100


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("this is not a database, and long enough to be seen as none" * 20)
    with pytest.raises(StoreError, match=FILE):
        Cached(Counting(), tmp_path)(["p"], ["harm"])


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
import apothecary.judge.cache as cache
from pathlib import Path
from apothecary.judge import Judge, Verdict
class Slow(Judge):
    name, cheap_proxy = "slow", False
    def verdicts(self, prompts, responses):
        time.sleep({pause})
        return [Verdict(0.5)] * len(prompts)
cache.CHUNK = 10
cache.Cached(Slow(), Path({folder!r}))([str({first} + i) for i in range({rows})], ["r"] * {rows})
"""


def child(folder: Path, first: int, rows: int, pause: float) -> subprocess.Popen[bytes]:
    code = CHILD.format(tests=str(Path(__file__).parents[1]), folder=str(folder), first=first, rows=rows, pause=pause)
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ)


def count(folder: Path) -> int:
    if not (folder / FILE).exists():
        return 0
    try:
        with sqlite3.connect(folder / FILE, timeout=60) as database:
            return database.execute("select count(*) from verdicts").fetchone()[0]
    except sqlite3.OperationalError:  # the table is not there yet
        return 0


def test_two_processes_write_one_file(tmp_path: Path) -> None:
    both = [child(tmp_path, first, 200, 0.0) for first in (0, 100)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert count(tmp_path) == 300


def test_a_kill_leaves_whole_chunks_and_a_file_that_can_be_read(tmp_path: Path) -> None:
    process = child(tmp_path, 0, 10_000, 0.005)
    while count(tmp_path) < 30 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    left = count(tmp_path)
    assert 30 <= left < 10_000 and left % 10 == 0
    judge = Counting()
    Cached(judge, tmp_path)(["p"], ["fine"])
    assert count(tmp_path) == left + 1
