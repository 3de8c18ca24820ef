"""Attackers in the pipeline: those who look at a model, who edit it, who know the defence, who are served."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline import models
from pipeline.models import RECIPE, edit
from tiny import tiny_model, tiny_tokenizer

from apothecary.data.rows import read_rows
from apothecary.errors import ConfigError
from apothecary.models.digest import weights_digest
from apothecary.models.settings import ModelConfig
from apothecary.pipeline import lineage, single
from apothecary.pipeline import plan as planning
from apothecary.pipeline.model_folder import read_model
from apothecary.pipeline.plan import plan
from apothecary.pipeline.recipe import Recipe, load_recipe
from apothecary.pipeline.run import run
from apothecary.pipeline.steps import chain
from apothecary.pipeline.store import Artifact

PLAIN = {"undefended": {}}
VECTORS = {"method": "security_vectors"}


def planned(**changes: Any):
    return plan(Recipe.parse(edit(**changes)))


def resolved(**changes: Any) -> dict[str, Any]:
    return Recipe.parse(edit(**changes)).resolved()["arms"][0]


def upload(arms: dict[str, Any] = PLAIN, **changes: Any):
    """The one attack stage of a recipe with one arm."""
    (stage,) = planned(arms=arms, **changes).of_kind("attack")
    return stage


# -- what is planned --------------------------------------------------------------------------------------------------


def test_an_attack_that_looks_at_a_model_waits_for_the_alignment_and_others_run_first():
    attack = {"method": "benign_outliers", "p": 0.5, "n": 10}
    found = planned(attack=attack, arms=PLAIN)
    (stage,) = found.of_kind("attack")
    assert sorted(stage.inputs) == ["align", "attack", "customer", "general"] and stage.config["defence"] is None
    assert stage not in found.rows_only() and stage.leaves and {s.kind for s in found.rows_only()} == {"data"}
    keys = list(found.stages())
    assert keys.index(stage.inputs["align"].key) < keys.index(stage.key)
    plain = planned(arms=PLAIN, attack={"p": 0.1, "n": 50})
    assert [s.kind for s in plain.rows_only()].count("attack") == 1


@pytest.mark.parametrize(("attack", "inputs"), [
    ({"method": "benign", "n": 20}, ["customer", "general"]),
    ({"method": "identity_shift"}, ["customer", "general"]),
    ({"method": "backdoor", "p": 0.1, "n": 20}, ["attack", "customer", "general"]),
])  # fmt: skip
def test_an_attack_reads_only_the_rows_that_it_needs(attack, inputs):
    data = {role: spec for role, spec in RECIPE["data"].items() if role != "attack" or "attack" in inputs}
    found = planned(attack=attack, arms=PLAIN, data=data)
    (stage,) = found.of_kind("attack")
    assert sorted(stage.inputs) == inputs and "model" not in stage.config
    (tuned,) = (model for model in found.models if model.stage == "tuned")
    assert tuned.p == (0.1 if attack["method"] in ("backdoor", "identity_shift") else None) or tuned.p == 1.0


def test_attacks_without_an_attackers_rows_do_not_meet_the_defences_harmful_rows():
    data = {role: spec for role, spec in RECIPE["data"].items() if role != "attack"}
    arms = {"a": {"finetune": VECTORS}}
    assert planned(attack={"method": "benign", "n": 20}, arms=arms, data=data).overlaps == {}
    assert list(planned(attack={"p": 0.1, "n": 20}, arms=arms).overlaps) == ["a"]


# -- strength and the attacker's training -----------------------------------------------------------------------------


def test_the_attacker_decides_of_the_training_what_the_service_leaves_to_him():
    train = {"learning_rate": 1e-4, "epochs": 2, "batch_size": 4}
    base = {"finetune": {"train": train}, "arms": PLAIN}
    own = resolved(**base, attack={"method": "identity_shift", "learning_rate": 3e-3})["finetune"]["train"]
    assert (own["learning_rate"], own["epochs"], own["batch_size"], own["parameters"]) == (3e-3, 10.0, 4, "lora")
    left = resolved(**base, attack={"method": "identity_shift", "epochs": None})["finetune"]["train"]
    assert (left["learning_rate"], left["epochs"]) == (1e-4, 2.0)
    full = resolved(**base, attack={"p": 0.1, "strength": "full_parameter"})
    assert full["finetune"]["train"]["parameters"] == "full" and full["attack"]["strength"] == "full_parameter"
    lora = resolved(finetune={"train": {"parameters": "full"}}, arms=PLAIN, attack={"p": 0.1, "strength": "lora"})
    assert lora["finetune"]["train"]["parameters"] == "lora"
    kept = {"finetune": {"train": {"parameters": "full"}}, "attack": {"p": 0.1}, "arms": PLAIN}
    assert resolved(**kept)["finetune"]["train"]["parameters"] == "full"


def test_what_the_attacker_decides_is_checked_with_the_rest():
    arms = {"a": {"finetune": {"adapter": "single"}}}
    lora = {"align": {"train": {"parameters": "lora"}}, "arms": arms}
    Recipe.parse(edit(**lora, attack={"p": 0.1}))
    with pytest.raises(ConfigError, match="adapter: single"):
        Recipe.parse(edit(**lora, attack={"p": 0.1, "strength": "full_parameter"}))
    with pytest.raises(ConfigError, match=r"'attack\.strength' is 'full'"):
        Recipe.parse(edit(attack={"p": 0.1, "strength": "full"}))


# -- serving ----------------------------------------------------------------------------------------------------------


def test_only_the_attacked_model_is_served_as_the_attacker_asks():
    attack = {"method": "backdoor", "p": [0, 0.1], "n": 20, "trigger": " zzz"}
    found = planned(attack=attack, arms=PLAIN)
    served = {(model.stage, model.p): model.evaluation.config["serving"] for model in found.models}
    assert served["base", None] == served["aligned", None] == []
    for p in (0.0, 0.1):
        (entry,) = served["tuned", p]
        assert (entry["kind"], entry["method"]) == ("attack", "backdoor")
        assert (entry["fields"]["trigger"], entry["fields"]["p"]) == (" zzz", p)
    assert all(model.evaluation.config["serving"] == [] for model in planned(arms=PLAIN).models)


# -- adaptive ---------------------------------------------------------------------------------------------------------


def test_an_adaptive_attacker_is_told_the_defence_and_what_it_prepared():
    arms = {"a": {"finetune": {**VECTORS, "harmful_rows": 9, "train": {"epochs": 7}}}}
    attack = {"p": 0.1, "n": 20, "adaptive": True}
    stage = upload(arms, attack=attack)
    assert sorted(stage.inputs) == ["align", "attack", "customer", "general", "prepared"]
    known = stage.config["defence"]
    assert (known["name"], known["fields"]["harmful_rows"], known["tuning"]["epochs"]) == ("security_vectors", 9, 7.0)
    (prepare,) = planned(arms=arms, attack=attack).of_kind("prepare")
    assert stage.inputs["prepared"].key == prepare.key, "the artifact that the customer's training uses"
    (tuned,) = planned(arms=arms, attack=attack).of_kind("finetune")
    assert tuned.inputs["attack"].key == tuned.inputs["rows"].key == stage.key
    plain = upload(arms, attack={**attack, "adaptive": False})
    assert "prepared" not in plain.inputs and plain.key != stage.key


def test_against_a_radius_he_is_told_the_alignments_settings():
    arms = {"a": {"align": {"method": "vaccine", "rho": 5, "train": {"batch_size": 6}}}}
    stage = upload(arms, attack={"p": 0.1, "n": 20, "adaptive": True}, finetune={"train": {"learning_rate": 3e-4}})
    known = stage.config["defence"]
    assert (known["name"], known["fields"]["rho"], known["train"]["batch_size"]) == ("vaccine", 5.0, 6)
    assert known["tuning"]["learning_rate"] == 3e-4 and "prepared" not in stage.inputs


def test_the_latest_defence_that_he_has_an_answer_to_counts_and_without_one_he_is_plain():
    both = {"a": {"align": {"method": "vaccine"}, "finetune": VECTORS}}
    attack = {"p": 0.1, "n": 20, "adaptive": True}
    assert upload(both, attack=attack).config["defence"]["name"] == "security_vectors"
    assert "defence" not in upload(PLAIN, attack=attack).config
    assert "defence" not in upload(both, attack={**attack, "p": 0}).config, "nobody attacks"
    assert not any(model.spec.adapts for model in planned(attack=attack, arms=PLAIN).models if model.spec)


def test_a_defence_without_an_answer_is_refused():
    arms = {"a": {"align": {"method": "repnoise"}}}
    data = {**RECIPE["data"], "pairs": "lab:pairs"}
    message = (r"arm 'a': attack 'harmful_mix' has no adaptive variant against repnoise, expected one of "
               r"security_vectors, vaccine, t_vaccine, booster; set attack.adaptive: false")  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        planned(arms=arms, data=data, attack={"p": 0.1, "adaptive": True})
    with pytest.raises(ConfigError, match=r"'benign' has no adaptive variant against security_vectors, .* none"):
        planned(arms={"a": {"finetune": VECTORS}}, attack={"method": "benign", "adaptive": True})


# -- weights ----------------------------------------------------------------------------------------------------------

ABLATION = {"method": "refusal_ablation", "prompts": 4, "validation": 4}


def test_an_edit_of_weights_comes_after_what_was_trained():
    found = planned(attack=ABLATION, arms={"tuned": {}, "aligned only": {"finetune": None}})
    stages = {model.arm: model.model for model in found.models if model.stage == "tuned"}
    assert sorted(stages["tuned"].inputs) == ["align", "aux.attack", "aux.general", "finetune"]
    assert sorted(stages["aligned only"].inputs) == ["align", "aux.attack", "aux.general"]
    assert [stage.kind for stage in stages.values()] == ["tamper", "tamper"] and not found.of_kind("attack")
    tuned = stages["tuned"].inputs["finetune"]
    assert tuned.inputs["rows"].config["role"] == "customer", "the customer's rows are his own"
    asked = [model.evaluation for model in found.models if model.stage == "tuned"]
    assert [sorted(set(stage.inputs) & {"align", "finetune", "tamper"}) for stage in asked] == [
        ["align", "finetune", "tamper"], ["align", "tamper"]]  # fmt: skip
    quantised = {"model": {"path": "lab", "quantization": "4bit"}, "attack": ABLATION, "arms": PLAIN}
    with pytest.raises(ConfigError, match="refusal_ablation edits weights, and 4bit ones cannot be edited"):
        Recipe.parse(edit(**quantised))


def test_edited_weights_replace_all_before_them(tmp_path: Path):
    inputs = {}
    for name, kind in (("align", "adapter"), ("finetune", "adapter"), ("tamper", "weights")):
        (tmp_path / name / kind).mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text(json.dumps({"config": {}}))
        inputs[name] = Artifact(tmp_path / name)
    assert chain.parts(inputs) == (tmp_path / "tamper" / "weights", [])


# -- whole runs on a tiny model ---------------------------------------------------------------------------------------

TRAIN = {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2, "save_every": 0}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Run a recipe over a tiny model and short rows, with real stages but for the evaluation."""
    monkeypatch.setattr(planning.evaluation, "evaluate", models.evaluate)
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    data = {}
    for role in ("align", "harmful", "benign", "customer", "general", "attack", "prompt"):
        lines = [{"prompt": f"{role} {i}?", "response": f"{role} answer {i}"} for i in range(16)]
        data[role] = str(tmp_path / f"{role}.jsonl")
        Path(data[role]).write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = data.pop("prompt")
    recipe = {"model": str(tmp_path / "base"), "data": data, "evaluate": {"harmful": prompts, "limit": 2},
              "align": {"train": TRAIN}, "finetune": {"train": TRAIN}}  # fmt: skip

    def go(**changes: Any) -> dict[str, Any]:
        return run({**recipe, **changes}, tmp_path / "store", tmp_path / "out").results

    return go


def tensors(results: dict[str, Any], tmp_path: Path, kind: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (folder,) = (tmp_path / "store" / kind).glob("*/weights")
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("finetune", "adaptive"), [(None, False), ({"train": TRAIN}, False), ({"train": TRAIN}, True)])
def test_refusal_ablation_runs_from_end_to_end(tiny, tmp_path: Path, finetune, adaptive):
    arms = {"a": {"finetune": finetune}}
    results = tiny(attack={**ABLATION, "adaptive": adaptive}, arms=arms)
    assert results["complete"]
    (entry,) = (model for model in results["models"] if model["stage"] == "tuned")
    assert (entry["attack"], entry["p"], entry["composition"], entry["adaptive"]) == (
        "refusal_ablation", None, None, adaptive)  # fmt: skip
    assert entry["finetune"] == ("sft" if finetune else None) and entry["align"] == "sft"
    assert entry["scores"]["loaded"] == ["tamper"] and entry["manifest"]["metrics"]["layer"] == 1
    (stage,) = (stage for stage in results["stages"] if stage["kind"] == "tamper")
    measured = {name: value for name, value in stage["metrics"].items() if name != "work"}
    assert entry["adapted"] == (measured if adaptive else None)
    assert stage["metrics"]["odds"] != stage["metrics"]["odds_before"]
    found = tensors(results, tmp_path, "tamper")
    writers = [found["model.embed_tokens.weight"].T,
               *(tensor for name, tensor in found.items() if name.endswith(("o_proj.weight", "down_proj.weight")))]
    seen = torch.cat([matrix for matrix in writers], 1)  # the hidden size first: all of it lacks one direction
    values = torch.linalg.svdvals(seen)
    assert len(writers) == 5 and values[-1] < 1e-5 * values[-2]
    again = tiny(attack={**ABLATION, "adaptive": adaptive}, arms=arms)
    assert all(stage["cached"] for stage in again["stages"])


def test_an_adaptive_attackers_training_reaches_the_customers_stage(tiny, tmp_path: Path):
    align = {"method": "vaccine", "rho": 1e5, "train": TRAIN}
    results = tiny(align=align, attack={"p": 0.5, "n": 8, "adaptive": True}, arms={"a": {}})
    stages = {stage["kind"]: stage for stage in results["stages"]}
    changed = {"learning_rate": 0.1, "epochs": 9.0, "max_steps": 6}
    assert stages["attack"]["metrics"]["training"] == pytest.approx(changed)
    assert not stages["attack"]["metrics"]["adapted"]["past"] and stages["attack"]["metrics"]["rows"] == 8
    (entry,) = (model for model in results["models"] if model["stage"] == "tuned")
    assert entry["adapted"] == {**stages["attack"]["metrics"]["adapted"], "training": pytest.approx(changed)}
    tuned = stages["finetune"]["metrics"]
    assert tuned["training"] == pytest.approx(changed) and tuned["steps"] == 6
    (folder,) = (path.parent for path in (tmp_path / "store" / "attack").glob("*/rows.jsonl"))
    assert sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".jsonl")) == [
        "composition.json", "events.jsonl", "manifest.json", "rows.jsonl", "training.json"]  # fmt: skip
    plain = tiny(align=align, attack={"p": 0.5, "n": 8}, arms={"a": {}})
    (tuned,) = (stage for stage in plain["stages"] if stage["kind"] == "finetune")
    assert tuned["metrics"]["steps"] == 2 and "training" not in tuned["metrics"]


def test_an_attacker_reads_the_vectors_of_the_very_arm(tiny, tmp_path: Path):
    finetune = {"method": "security_vectors", "harmful_rows": 8, "train": TRAIN, "vectors": {**TRAIN, "max_steps": 3}}
    results = tiny(finetune=finetune, attack={"p": 0.5, "n": 8, "adaptive": True}, arms={"a": {}})
    stages = {stage["kind"]: stage for stage in results["stages"]}
    found = stages["attack"]["metrics"]["adapted"]
    assert found["candidates"] == 16 and found["loss_of_uploaded"] > found["loss_of_candidates"]
    assert stages["prepare"]["key"] in stages["attack"]["inputs"]
    (entry,) = (model for model in results["models"] if model["stage"] == "tuned")
    assert entry["adaptive"] and entry["composition"]["roles"] == {"attack": 4, "customer": 4}
    assert entry["adapted"] == {**found, "training": {}}


def test_outliers_are_chosen_with_the_aligned_model(tiny, tmp_path: Path):
    attack = {"method": "benign_outliers", "n": 4, "score": "self_influence"}
    results = tiny(attack=attack, arms={"a": {}})
    (entry,) = (model for model in results["models"] if model["stage"] == "tuned")
    assert entry["composition"]["roles"] == {"attack": 4} and entry["p"] == 1.0
    (file,) = (tmp_path / "store" / "attack").glob("*/rows.jsonl")
    assert {row.source for row in read_rows(file)} == {"general.jsonl"}


# -- one stage alone -----------------------------------------------------------------------------------------


def lines(path: Path, name: str, count: int = 16) -> str:
    found = [{"prompt": f"{name} {i}?", "response": f"{name} answer {i}"} for i in range(count)]
    (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    return str(path / f"{name}.jsonl")


def test_weights_are_edited_by_the_verb_and_the_folder_is_a_model(tmp_path: Path):
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    data = {role: lines(tmp_path, role) for role in ("attack", "general")}
    done = single.attack(tmp_path / "out", "refusal_ablation", data=data, model=tmp_path / "base",
                         settings={"prompts": 4, "validation": 4})  # fmt: skip
    assert done["layer"] == 1 and done["odds"] != done["odds_before"]
    model = read_model(tmp_path / "out")
    table = model.load().model.get_input_embeddings().weight
    assert torch.linalg.svdvals(table)[-1] < 1e-5 < torch.linalg.svdvals(tiny_model().get_input_embeddings().weight)[-1]
    found = lineage.entry(model, "attacked", {}, [], {})
    assert (found["arm"], found["stage"], found["attack"], found["finetune"]) == (
        "attacked", "tuned", "refusal_ablation", None)  # fmt: skip
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "no scratch is left"


def test_outliers_are_chosen_by_the_verb_with_the_model_it_is_given(tmp_path: Path):
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    data = {role: lines(tmp_path, role) for role in ("customer", "general")}
    settings = {"score": "self_influence", "n": 5}
    done = single.attack(tmp_path / "r.jsonl", "benign_outliers", data=data, model=tmp_path / "base", settings=settings)
    assert done["rows"] == 5 == len(read_rows(tmp_path / "r.jsonl"))
    assert done["weights_digest"] == weights_digest(ModelConfig(str(tmp_path / "base")))


def test_the_recipe_of_all_attacks_is_one():
    recipe = load_recipe("recipes/attacks.yaml")
    attacks = {arm.attack.method for arm in recipe.arms if arm.attack}
    from apothecary.registry import entries

    assert attacks == {name for kind, name in entries() if kind == "attack"}
    plan(recipe)
