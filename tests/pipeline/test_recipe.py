"""Recipes: how arms and sections resolve, and what is refused before any work."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pipeline.models import RECIPE, edit

from apothecary.config import override
from apothecary.data.sources import DataSource
from apothecary.errors import ApothecaryError, ConfigError
from apothecary.pipeline.recipe import Recipe, load_recipe


def arms(**changes: Any) -> dict[str, Any]:
    return {arm.name: arm for arm in Recipe.parse(edit(**changes)).arms}


def test_arms_change_what_they_name_and_keep_the_rest():
    found = arms()
    assert list(found) == list(RECIPE["arms"])
    vaccine = found["vaccine"].align
    assert vaccine.method == "vaccine" and vaccine.fields["rho"] == 2.0  # the method's default is written out
    assert vaccine.train == found["undefended"].align.train
    assert vaccine.train.learning_rate == 6e-4 and vaccine.train.parameters == "full"
    assert found["random half"].curate.keep == 0.5 and found["undefended"].curate is None
    assert found["undefended"].attack.p == (0.0, 0.1)
    left = {"epochs": None, "learning_rate": None}  # to the service
    assert found["undefended"].attack.points()[1] == (0.1, {"p": 0.1, "n": 50, "general": 0, **left})


def test_an_arm_overrides_nested_training_data_and_attack():
    changes = {
        "a": {"align": {"train": {"epochs": 1}}, "attack": {"p": 0.3}, "data": {"harmful": "lab:defence_advbench"}},
        "b": {"attack": None, "finetune": None},
    }
    found = arms(arms=changes)
    a, b = found["a"], found["b"]
    assert (a.align.train.epochs, a.align.train.learning_rate) == (1.0, 6e-4)
    assert a.attack.p == (0.3,) and a.attack.fields["n"] == 50
    assert a.data["harmful"] == DataSource("lab:defence_advbench") and b.data["harmful"] == DataSource("lab:defence")
    assert b.attack is None and b.finetune is None


def test_another_method_drops_the_old_ones_hyper_parameters_but_keeps_the_sections():
    top = {"method": "security_vectors", "lamb": 0.5, "adapter": "merged", "seed": 7, "train": {"epochs": 2}}
    found = arms(
        finetune=top, arms={"same": {"finetune": {"harmful_rows": 9}}, "other": {"finetune": {"method": "sft"}}}
    )
    assert (found["same"].finetune.fields["lamb"], found["same"].finetune.fields["harmful_rows"]) == (0.5, 9)
    other = found["other"].finetune
    assert (other.method, other.fields, other.seed, other.train.epochs) == ("sft", {}, 7, 2.0)


def test_the_shortest_recipe_is_enough():
    recipe = Recipe.parse({"data": {"align": "lab:align", "customer": "lab:customer_train"}})
    assert [arm.name for arm in recipe.arms] == ["undefended"] and recipe.seeds == (0,)
    assert recipe.arms[0].attack is None and recipe.arms[0].align.method == "sft"
    assert recipe.evaluate.harmful and recipe.evaluate.task  # the lab's held-out prompts


def test_naming_one_suite_leaves_out_the_others():
    evaluate = Recipe.parse(edit(evaluate={"task": {"path": "my.jsonl", "columns": {"prompt": "q"}}})).evaluate
    assert evaluate.task == (DataSource("my.jsonl", {"prompt": "q"}),)
    assert evaluate.harmful == evaluate.benign == evaluate.overrefusal == ()


def test_three_lines_swap_in_another_model_and_other_data():
    mapping = override(RECIPE, ["model=owner/model", "data.customer=mine.csv", "evaluate.task=test.csv"])
    recipe = Recipe.parse(mapping)
    assert recipe.model.path == "owner/model" and recipe.arms[0].data["customer"].path == "mine.csv"
    assert recipe.evaluate.task == (DataSource("test.csv"),)


def test_the_resolved_recipe_is_json_and_a_file_gives_the_same(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    recipe = load_recipe(path, ["seeds=[1,2]", "--align.train.learning_rate=5e-4"])
    resolved = json.loads(json.dumps(recipe.resolved()))
    assert resolved["seeds"] == [1, 2] and resolved["align"]["train"]["learning_rate"] == 5e-4
    assert [arm["name"] for arm in resolved["arms"]] == list(RECIPE["arms"])
    assert load_recipe(path).resolved() == Recipe.parse(RECIPE).resolved()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"algin": {}}, ["unknown key 'algin'", "did you mean 'align'"]),
        ({"align": {"method": "vacine"}}, ["unknown align method 'vacine'", "did you mean 'vaccine'"]),
        ({"align": {"method": "vaccine", "roh": 1}}, ["unknown key 'align.roh'", "did you mean 'rho'", "train"]),
        ({"align": {"train": {"epoch": 1}}}, ["unknown key 'align.train.epoch'", "did you mean 'epochs'"]),
        ({"align": {"train": {"epochs": "many"}}}, ["'align.train.epochs' is 'many'", "float"]),
        ({"finetune": {"adapter": "both"}}, ["'finetune.adapter' is 'both'", "'merged', 'single'"]),
        ({"curate": {"keep": 0.5}}, ["'curate.method' is missing"]),
        ({"curate": {"method": "random", "keep": 1.5}}, ["curate.keep is 1.5", "(0, 1]"]),
        ({"arms": {"a": {"curate": {"method": "full"}}}}, ["arm 'a'", "'full' got keep 0.5", "set keep: 1"]),
        ({"attack": {"p": 1.5}}, ["'attack.p' is 1.5", "[0, 1]"]),
        ({"attack": {"p": [0, "x"]}}, ["'attack.p[1]' is 'x'"]),
        ({"attack": {"p": []}}, ["'attack.p' is empty"]),
        ({"attack": {"n": "all"}}, ["'attack.n' is 'all'", "an integer"]),
        ({"seeds": []}, ["'seeds' is []"]),
        ({"seeds": [1, 1]}, ["'seeds' is [1, 1]"]),
        ({"seeds": "x"}, ["'seeds' is 'x'"]),
        ({"seeds": [0, -1]}, ["a seed is -1"]),
        ({"align": {"seed": 2**32}}, ["a seed is 4294967296"]),
        ({"name": 3}, ["'name' is 3", "text"]),
        ({"model": {"path": "lab", "dtype": "int8"}}, ["'model.dtype' is 'int8'"]),
        ({"data": {"aling": "lab:align"}}, ["unknown key 'data.aling'", "did you mean 'align'"]),
        ({"data": ["x"]}, ["'data' is ['x']"]),
        ({"evaluate": {"harmfull": "x"}}, ["unknown key 'evaluate.harmfull'", "did you mean 'harmful'"]),
        ({"evaluate": {"judge": "opning"}}, ["unknown judge method 'opning'", "did you mean 'opening'"]),
        ({"evaluate": {"harmful": [], "judge": "opening"}}, ["'evaluate' names no prompts"]),
        ({"evaluate": {"harmful": "x", "max_new_tokens": 0}}, ["max_new_tokens is 0"]),
        ({"arms": {"base": {}}}, ["arm 'base'"]),
        ({"arms": {"a": {"model": "x"}}}, ["unknown key 'arms.a.model'"]),
        ({"arms": {"a": {"align": {"method": "vaccine", "rho": "x"}}}}, ["'arms.a.align.rho' is 'x'"]),
        ({"arms": ["a"]}, ["'arms' is ['a']"]),
        ({"arms": {"a": {"finetune": {"adapter": "single"}}}}, ["arm 'a'", "adapter: single", "parameters: lora"]),
        ({"arms": {"a": {"finetune": {"method": "security_vectors", "train": {"parameters": "full",
                                                                              "weight_decay": 0.1}}}}},
         ["arm 'a'", "set weight_decay: 0 or execution: branch"]),
        ({"model": {"path": "lab", "quantization": "4bit"}, "arms": {"a": {"finetune": "security_vectors"}}},
         ["arm 'a'", "cannot be merged into 4bit weights"]),
        ({"arms": {"a": {"finetune": {"method": "security_vectors", "vectors": {"parameters": "full"}}}}},
         ["arms.a.finetune", "must be removable"]),
        ({"arms": {"a": {"finetune": {"train": {"batch_size": 0}}}}},
         ["arms.a.finetune.train", "batch_size is 0, expected at least 1"]),
        ({"allow_same_harmful": "yes please"}, ["'allow_same_harmful' is 'yes please'", "true or false"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_sentence(changes: dict[str, Any], words: list[str]):
    with pytest.raises(ApothecaryError) as caught:
        Recipe.parse(edit(**changes))
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_a_missing_role_names_arm_method_and_role():
    data = {role: spec for role, spec in RECIPE["data"].items() if role != "harmful"}
    message = r"arm 'security vectors': finetune method 'security_vectors' needs data role 'harmful'"
    with pytest.raises(ConfigError, match=message):
        Recipe.parse(edit(data=data))
    Recipe.parse(edit(data=data, arms={"undefended": {}}))  # nobody needs it here


def test_the_defence_may_not_learn_from_the_attackers_source_unless_asked():
    data = {**RECIPE["data"], "attack": "lab:defence"}
    with pytest.raises(ConfigError, match=r"arm 'security vectors': .*'lab:defence'.*allow_same_harmful"):
        Recipe.parse(edit(data=data))
    assert Recipe.parse(edit(data=data, allow_same_harmful=True)).allow_same_harmful
    Recipe.parse(edit(data=data, arms={"undefended": {}}))  # no defence learns from it


def test_a_single_adapter_needs_equal_lora_settings():
    lora = {"train": {"parameters": "lora", "lora": {"rank": 4}}}
    single = {"adapter": "single", **lora}
    assert arms(align=lora, finetune=single)["undefended"].finetune.adapter == "single"
    with pytest.raises(ConfigError, match="lora settings of align and finetune differ"):
        arms(align={"train": {"parameters": "lora"}}, finetune=single)


def test_a_selector_of_all_rows_keeps_all_of_them():
    (arm,) = Recipe.parse(edit(arms={"a": {"curate": {"method": "full", "keep": 1}}})).arms
    assert arm.curate is not None and arm.curate.keep == 1
