"""Single stages on a random tiny model, from files to files."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from apothecary.data.rows import read_rows
from apothecary.errors import ConfigError, ModelError, StoreError
from apothecary.models import load as load_module
from apothecary.models.digest import weights_digest
from apothecary.models.settings import ModelConfig
from apothecary.pipeline import single
from apothecary.pipeline.model_folder import new_folder, read_model
from apothecary.train import fit

TRAIN = {"max_steps": 2, "batch_size": 2, "learning_rate": 1e-2, "save_every": 0}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def rows(path: Path, count: int = 4, role: str = "") -> Path:
    lines = (
        {"prompt": f"Question {i}?", "response": f"Answer {i}.", **({"role": role} if role else {})}
        for i in range(count)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in read_model(model).load().model.state_dict().items()}


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_a_chain_of_stages(model: Path, tmp_path: Path):
    data = rows(tmp_path / "rows.jsonl")
    aligned, tuned = tmp_path / "aligned", tmp_path / "tuned"
    single.align(data, aligned, model=model, train=TRAIN)
    extra = {"harmful": rows(tmp_path / "h.jsonl"), "benign": rows(tmp_path / "b.jsonl")}
    single.finetune(data, tuned, "security_vectors", model=aligned, aux=extra, train=TRAIN,
                    settings={"harmful_rows": 2, "vectors": {**TRAIN, "learning_rate": 0.1}})  # fmt: skip
    assert sorted(path.name for path in tuned.iterdir()) == ["adapter", "before", "model.json"]
    chain = read_model(tuned)
    assert [entry["method"] for entry in chain.lineage] == ["sft", "security_vectors"]
    assert chain.lineage[1]["prepared"]["converged"] is False, "what the preparation found stands with the model"
    assert chain.adapters == (tuned / "before" / "00", tuned / "adapter")
    base, first, second = weights(model), weights(aligned), weights(tuned)
    assert furthest(base, first) > 1e-3 and furthest(first, second) > 1e-3


def test_the_folder_stands_alone(model: Path, tmp_path: Path):
    data, aligned, tuned = rows(tmp_path / "rows.jsonl"), tmp_path / "aligned", tmp_path / "tuned"
    single.align(data, aligned, model=model, train=TRAIN)
    single.finetune(data, tuned, model=aligned, train=TRAIN)
    before = weights(tuned)
    aligned.rename(tmp_path / "away")
    tuned.rename(tmp_path / "moved")
    assert furthest(before, weights(tmp_path / "moved")) == 0


def test_single_goes_on_with_the_adapter(model: Path, tmp_path: Path):
    data, aligned, tuned = rows(tmp_path / "rows.jsonl"), tmp_path / "aligned", tmp_path / "tuned"
    single.align(data, aligned, model=model, train=TRAIN)
    still = {**TRAIN, "learning_rate": 1e-30}
    single.finetune(data, tuned, model=aligned, adapter="single", train=still)
    assert len(read_model(tuned).adapters) == 1
    assert furthest(weights(aligned), weights(tuned)) == 0
    with pytest.raises(ConfigError, match="LoRA adapter"):
        single.finetune(data, tmp_path / "no", model=model, adapter="single", train=TRAIN)


def test_full_parameters_then_lora(model: Path, tmp_path: Path):
    data, aligned, tuned = rows(tmp_path / "rows.jsonl"), tmp_path / "aligned", tmp_path / "tuned"
    single.align(data, aligned, model=model, train={**TRAIN, "parameters": "full"})
    assert (aligned / "weights" / "model.safetensors").is_file() and not (aligned / "adapter").exists()
    single.finetune(data, tuned, model=aligned, train={**TRAIN, "learning_rate": 1e-30})
    assert furthest(weights(aligned), weights(tuned)) == 0 < furthest(weights(model), weights(aligned))


def test_same_seed_same_model(model: Path, tmp_path: Path):
    data = rows(tmp_path / "rows.jsonl", 8)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        single.align(data, tmp_path / name, model=model, train=TRAIN, seed=seed)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert furthest(a, b) == 0 < furthest(a, c)


def test_evaluate_names_the_model_by_its_lineage(model: Path, tmp_path: Path):
    data = {"customer": rows(tmp_path / "r.jsonl", 8), "attack": rows(tmp_path / "h.jsonl")}
    customer = single.attack(tmp_path / "c.jsonl", data=data, settings={"p": 0.25, "n": 8})
    assert customer["composition"]["roles"] == {"attack": 2, "customer": 6}
    single.finetune(tmp_path / "c.jsonl", tmp_path / "tuned", model=model, train=TRAIN)
    prompts = {"harmful": rows(tmp_path / "e.jsonl", 3), "max_new_tokens": 4}
    base, tuned = (single.evaluate(m, tmp_path / f"scores-{m.name}", prompts) for m in (model, tmp_path / "tuned"))
    assert [r["models"][0]["stage"] for r in (base, tuned)] == ["base", "tuned"]
    assert tuned["models"][0]["p"] == 0.25 and tuned["models"][0]["finetune"] == "sft"
    assert tuned["models"][0]["scores"]["harmful"]["n"] == 3 and list(tuned["models"][0]["scores"]) == ["harmful"]
    assert json.loads((tmp_path / "scores-tuned" / "results.json").read_text()) == json.loads(json.dumps(tuned))
    assert len(tuned["models"][0]["samples"]) == 3
    assert [(r["models"][0]["attack"], r["models"][0]["adapter"]) for r in (base, tuned)] == [
        (None, None),
        ("harmful_mix", "merged"),
    ]
    manifest = tuned["models"][0]["manifest"]
    assert manifest["generation"] == {"dtype": "float32"} and manifest["weights_digest"] == digest_of(model)
    assert manifest["model_digest"] and base["models"][0]["manifest"]["model_digest"] is None
    assert str(tmp_path) not in json.dumps([base, tuned])


def digest_of(model: Path) -> str:
    return weights_digest(ModelConfig(str(model)))


def test_curate_keeps_a_share_and_says_how(model: Path, tmp_path: Path):
    out = tmp_path / "core.jsonl"
    data = rows(tmp_path / "rows.jsonl", 8)
    assert single.curate(data, out, "random", 0.5, model=model, seed=1)["pool"] == 8
    kept = read_rows(out)
    manifest = json.loads((tmp_path / "core.jsonl.manifest.json").read_text())
    assert len(kept) == 4 and {row.role for row in kept} == {"align"}
    assert (manifest["rows"], manifest["keep"], manifest["data"]["composition"]["rows"]) == (4, 0.5, 8)


CURATE = {
    "method": "pharmacist",
    "keep": 0.5,
    "settings": {"epochs": 1, "batch_size": 2, "eta_w": 0.5, "warmup": {**TRAIN, "save_every": 1}},
}


@pytest.mark.parametrize(("method", "keep"), [("random", 0.5), ("full", 1.0), ("dsir", 0.5)])
def test_selectors_that_read_words_alone_load_no_model(model: Path, tmp_path: Path, monkeypatch, method, keep):
    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(load_module, "load_model", load)
    data, out = rows(tmp_path / "rows.jsonl", 8), tmp_path / "core.jsonl"
    single.curate(data, out, method, keep, model=model, aux={"validation": rows(tmp_path / "v.jsonl")})
    assert len(read_rows(out)) == 8 * keep
    with pytest.raises(AssertionError, match="was loaded"):
        single.curate(data, out, "loss", model=model)


def test_full_refuses_a_share(model: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"'full' got keep 0\.5, expected 1"):
        single.curate(rows(tmp_path / "rows.jsonl"), tmp_path / "core.jsonl", "full", model=model)
    assert not (tmp_path / "core.jsonl").exists()


def test_two_selections_do_not_meet(model: Path, tmp_path: Path):
    one, other = rows(tmp_path / "one.jsonl", 8), rows(tmp_path / "other.jsonl", 6)
    aux = {"harmful": rows(tmp_path / "h.jsonl"), "validation": rows(tmp_path / "v.jsonl")}
    kept = {}
    for name, data, seed in (("a", one, 1), ("b", other, 2)):
        for place in ("shared", f"apart-{name}"):
            out = tmp_path / place / f"{name}.jsonl"
            single.curate(data, out, model=model, aux=aux, seed=seed, **CURATE)
            kept[name, place] = out.read_bytes()
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == [
        f"{name}.jsonl{end}" for name in "ab" for end in ("", ".manifest.json")
    ]
    assert all(kept[name, "shared"] == kept[name, f"apart-{name}"] for name in "ab")


def test_model_json_says_what_the_model_is_made_of(model: Path, tmp_path: Path):
    core, aligned = tmp_path / "core.jsonl", tmp_path / "aligned"
    chosen = single.curate(rows(tmp_path / "rows.jsonl", 8), core, model=model)
    assert chosen["weights_digest"] == digest_of(model) and {"seconds", "peak_memory_mb", "versions"} <= {*chosen}
    single.align(core, aligned, model=model, train={**TRAIN, "lora": {"rank": 4, "alpha": 12}}, seed=3)
    card = json.loads((aligned / "model.json").read_text())
    (entry,) = card["lineage"]
    assert (entry["scale"], entry["seed"], entry["adapter"]) == (3.0, 3, "merged")
    assert entry["data"]["made"] == {"kind": "curate", "method": "random", "settings": {}, "seed": 0, "keep": 0.5}
    assert {"seconds", "peak_memory_mb", "versions", "source", "host"} <= {*entry}
    assert card["weights_digest"] == digest_of(model)
    tensors = aligned / "adapter" / "adapter_model.safetensors"
    recorded = card["payload"]["adapter/adapter_model.safetensors"]["sha256"]
    assert recorded == hashlib.sha256(tensors.read_bytes()).hexdigest()
    assert read_model(aligned).digest == card["digest"]
    found = single.evaluate(aligned, tmp_path / "scores", {"harmful": core, "max_new_tokens": 2})
    assert found["models"][0]["curate"] == "random 50 %"


@pytest.mark.parametrize("change", ["altered", "is missing", "was added"])
def test_a_model_altered_by_hand_is_refused(change: str, model: Path, tmp_path: Path):
    aligned = tmp_path / "aligned"
    single.align(rows(tmp_path / "rows.jsonl"), aligned, model=model, train=TRAIN)
    tensors = aligned / "adapter" / "adapter_model.safetensors"
    if change == "altered":
        tensors.write_bytes(tensors.read_bytes()[:-1] + b"!")
    elif change == "is missing":
        tensors.unlink()
    else:
        shutil.copytree(aligned / "adapter", aligned / "before" / "00")
    with pytest.raises(ModelError, match=rf"safetensors.*{change}|before/00.*{change}"):
        single.evaluate(aligned, tmp_path / "scores")


def test_paths_stay_as_they_were_given(model: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows(tmp_path / "rows.jsonl")
    single.align("rows.jsonl", "out/aligned", model="base", train=TRAIN)
    text = (tmp_path / "out" / "aligned" / "model.json").read_text()
    assert str(tmp_path) not in text and json.loads(text)["base"]["path"] == "../../base"
    assert read_model("out/aligned").base.path == "base"
    single.finetune("rows.jsonl", "tuned", model="out/aligned", train=TRAIN)
    assert json.loads((tmp_path / "tuned" / "model.json").read_text())["base"]["path"] == "../base"
    expected = weights("tuned")
    monkeypatch.chdir(tmp_path / "out")
    assert read_model("../tuned").base.path == "../base" and furthest(expected, weights("../tuned")) == 0


def test_a_failure_leaves_nothing(model: Path, tmp_path: Path, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "fit", fail)
    data = rows(tmp_path / "rows.jsonl")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        single.align(data, tmp_path / "out", model=model, train=TRAIN)
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_result_is_not_replaced(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as draft:
        (draft / "file").touch()
    with pytest.raises(StoreError, match="exists already"), new_folder(tmp_path / "out"):
        pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_several_processes_are_refused(model: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun"):
        single.align(rows(tmp_path / "rows.jsonl"), tmp_path / "out", model=model)


def test_model_json_cannot_ask_for_remote_code(tmp_path: Path):
    (tmp_path / "adapter").mkdir()
    card = {"base": {"path": "lab", "trust_remote_code": True}, "lineage": [], "payload": {}}
    (tmp_path / "model.json").write_text(json.dumps(card))
    assert read_model(tmp_path).base.trust_remote_code is False
    assert (
        read_model({"path": str(tmp_path), "trust_remote_code": True, "dtype": "float32"}).base.trust_remote_code
        is True
    )
    assert read_model({"path": str(tmp_path), "dtype": "float32"}).base.dtype == "float32"


@pytest.mark.parametrize("card", ["{", "{}", '{"base": 1, "lineage": []}', '{"base": {"path": "lab"}, "lineage": []}'])
def test_a_broken_model_folder_is_named(card: str, tmp_path: Path):
    (tmp_path / "model.json").write_text(card)
    with pytest.raises(ModelError, match=str(tmp_path)):
        read_model(tmp_path)
