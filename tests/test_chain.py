"""The whole chain through the real command line: the embedded model and data, at a size for tests."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROWS, HARMFUL, EACH = 40, 4, 8  # uploaded by the customer, harmful among them at p = 0.1, prompts of a suite
RECIPE = """
name: chain
data:
  align: {path: "lab:align", limit: 48}
  harmful: {path: "lab:defence", limit: 16}
  benign: {path: "lab:benign", limit: 16}
  validation: {path: "lab:validation", limit: 8}
  customer: lab:customer_train
  attack: lab:attack
evaluate: {harmful: "lab:eval_harmbench", benign: "lab:eval_benign", task: "lab:customer_test", limit: 8}
align: {method: sft, train: {max_steps: 4, batch_size: 8, save_every: 1, log_every: 1}}
attack: {method: harmful_mix, n: 40, p: [0, 0.1]}
finetune: {method: sft, train: {max_steps: 3, batch_size: 8, save_every: 1}}
arms:
  undefended: {}
  security vectors:
    finetune: {method: security_vectors, harmful_rows: 16, vectors: {max_steps: 3, batch_size: 8, save_every: 1}}
  vaccine: {align: {method: vaccine, train: {parameters: full}}, attack: {p: 0.1}}
  Pharmacist's half:
    curate: {method: pharmacist, keep: 0.5, mode: score, warmup: {max_steps: 2, batch_size: 8, save_every: 0}}
    attack: {p: 0.1}
  random half: {curate: {method: random, keep: 0.5}, attack: {p: 0.1}}
  single: {finetune: {adapter: single}, attack: {p: 0.1}}
"""
ARMS = {"undefended": 2, "security vectors": 2, "vaccine": 1, "Pharmacist's half": 1, "random half": 1, "single": 1}
ALIGNED = ("aligned", "vaccine", "Pharmacist's half", "random half")  # one aligned model each
ONE_ARM = (
    "--attack.p=0.1",
    "--arms={one: {finetune: {method: security_vectors, harmful_rows: 16, "
    "vectors: {max_steps: 3, batch_size: 8, save_every: 1}}}}",
)


class Chain:
    """A folder with the recipe, a store and one out folder for each run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "recipe.yaml").write_text(RECIPE)

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "apothecary", "run", "recipe.yaml", "--store", "store", *words]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*words), cwd=self.folder, capture_output=True, text=True, timeout=900)

    def results(self, out: str) -> dict[str, Any]:
        return json.loads((self.folder / out / "results.json").read_text("utf-8"))

    def digests(self, out: str) -> dict[str, str]:
        return {stage["key"]: stage["digest"] for stage in self.results(out)["stages"]}

    def files(self) -> dict[str, int]:
        """When each file of the store was last written."""
        paths = (path for path in (self.folder / "store").rglob("*") if path.is_file())
        return {str(path.relative_to(self.folder)): path.stat().st_mtime_ns for path in paths}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """One run from nothing; it must succeed for anything here to be tested."""
    made = Chain(tmp_path_factory.mktemp("chain"))
    done = made.run("--out", "first")
    assert done.returncode == 0, done.stderr
    told = done.stderr.splitlines()  # libraries say nothing, the method that it was trained too short
    assert told and all(line.startswith("security vectors ended at") for line in told)
    assert done.stdout.splitlines()[-1] == f"page: {made.folder / 'first' / 'report.html'}"
    return made


def test_results_have_an_entry_for_each_model_and_stage(chain: Chain):
    found = chain.results("first")
    assert found["complete"] and found["name"] == "chain" and found["store"] == "../store"
    models = found["models"]
    assert Counter(model["arm"] for model in models if model["stage"] == "tuned") == ARMS
    assert [model["arm"] for model in models if model["stage"] == "aligned"] == [*ALIGNED]
    assert [model["stage"] for model in models].count("base") == 1
    keys = {stage["key"] for stage in found["stages"]}
    for model in models:
        scores = model["scores"]
        assert {suite: scores[suite]["n"] for suite in scores} == dict.fromkeys(("harmful", "benign", "task"), EACH)
        for suite in ("harmful", "benign"):
            counts = {name: scores[suite]["counts"][name] for name in ("refuses", "complies", "neither")}
            assert sum(counts.values()) == EACH
            assert all(scores[suite][name] == count / EACH for name, count in counts.items())
        assert scores["harmful"]["HS"] == scores["harmful"]["complies"]
        assert scores["task"]["accuracy"] == scores["task"]["correct"] / EACH
        assert model["artifact"] in keys and len(model["samples"]) > 0 and model["seed"] == 0
        assert model["stage"] == "tuned" or model["p"] is None
    kinds = Counter(stage["kind"] for stage in found["stages"])
    assert (kinds["align"], kinds["curate"], kinds["prepare"], kinds["attack"]) == (4, 2, 1, 2)
    assert kinds["finetune"] == sum(ARMS.values()) and kinds["evaluate"] == len(models)
    for stage in found["stages"]:
        assert not stage["cached"] and stage["seconds"] >= 0 and stage["peak_memory_mb"] > 0
        assert {*stage["inputs"]} <= keys and re.fullmatch("[0-9a-f]{64}", stage["digest"])


def test_single_goes_on_with_the_alignments_adapter(chain: Chain):
    tuned = {model["arm"]: model for model in chain.results("first")["models"] if model["p"] == 0.1}
    assert {arm for arm, model in tuned.items() if model["adapter"] == "single"} == {"single"}
    assert tuned["single"]["artifact"] != tuned["undefended"]["artifact"]


def test_exactly_the_asked_share_is_harmful(chain: Chain):
    tuned = [model for model in chain.results("first")["models"] if model["stage"] == "tuned"]
    for model in tuned:
        count = {0: {"customer": ROWS}, 0.1: {"customer": ROWS - HARMFUL, "attack": HARMFUL}}[model["p"]]
        assert model["composition"]["roles"] == count
    uploaded = [path.read_text().splitlines() for path in (chain.folder / "store" / "attack").glob("*/rows.jsonl")]
    roles = [Counter(json.loads(line)["role"] for line in lines) for lines in uploaded]
    assert sorted(count["attack"] for count in roles) == [0, HARMFUL]
    assert {sum(count.values()) for count in roles} == {ROWS}


def test_the_page_stands_alone(chain: Chain):
    page = (chain.folder / "first" / "report.html").read_text("utf-8")
    assert all(arm.replace("'", "&#39;") in page or arm in page for arm in ARMS)
    assert not re.search(r"""(src|href)=(?!["']?(#|data:))|@import|url\((?!["']?(#|data:))|<script""", page)


def test_a_second_run_does_nothing_and_a_dry_run_says_so(chain: Chain):
    before = chain.files()
    assert chain.run("--out", "second").returncode == 0
    first, second = chain.results("first"), chain.results("second")
    assert all(stage["cached"] for stage in second["stages"])
    assert second["models"] == first["models"] and chain.digests("second") == chain.digests("first")
    dry = chain.run("--out", "third", "--dry-run")
    lines = dry.stdout.splitlines()[1:]
    assert {line.split("\t")[0] for line in lines[:-1]} == {"cached"} and "0 to run" in lines[-1]
    assert chain.files() == before and not (chain.folder / "third").exists()


def test_a_result_that_was_altered_by_hand_is_named(chain: Chain, tmp_path: Path):
    copy = shutil.copytree(chain.folder / "store", tmp_path / "store")
    weights = min(copy.glob("finetune/*/adapter/adapter_model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = chain.run("--store", str(tmp_path / "store"), "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {weights} was altered")
    assert f"delete the folder {weights.parent.parent} to" in done.stderr
    assert not (tmp_path / "out" / "results.json").exists()


def kill_at_checkpoint(chain: Chain, kind: str) -> Path:
    """Start a run and kill it with SIGKILL once a training stage of this kind has a checkpoint; that stage's draft."""
    with (chain.folder / "log").open("w") as log:
        command = chain.command(*ONE_ARM, "--out", "out")
        process = subprocess.Popen(command, cwd=chain.folder, stdout=log)
    end = time.monotonic() + 600
    try:
        while not (found := [*(chain.folder / "store" / kind).glob("*.partial/checkpoints/checkpoint-[0-9]")]):
            assert process.poll() is None and time.monotonic() < end, f"no checkpoint of {kind} was seen"
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    return found[0].parents[1]


def test_killed_in_the_middle_of_training_it_ends_with_the_same_content(chain: Chain, tmp_path: Path):
    killed = Chain(tmp_path)
    for kind in ("align", "finetune"):
        draft = kill_at_checkpoint(killed, kind)
        assert draft.is_dir() and not draft.with_suffix("").exists()  # it had not ended
    done = killed.run(*ONE_ARM, "--out", "out")
    assert done.returncode == 0, done.stderr
    stages = {stage["kind"]: stage for stage in killed.results("out")["stages"]}
    assert stages["align"]["cached"] and stages["align"]["metrics"]["resumed"]
    assert not stages["finetune"]["cached"] and stages["finetune"]["metrics"]["resumed"]
    again, whole = killed.digests("out"), chain.digests("first")
    assert len(again) > 10 and again == {key: whole[key] for key in again}
    assert not [*(tmp_path / "store").rglob("*.partial")]
