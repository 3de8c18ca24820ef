"""Recipes and single stages refuse rows whose answers contradict their role; ours and the lab's all pass."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline import models
from pipeline.models import RECIPE, edit

from apothecary.config import load_yaml
from apothecary.data.sources import lab_names, load_rows
from apothecary.errors import DataError
from apothecary.pipeline import single
from apothecary.pipeline.overlay import on_lab
from apothecary.pipeline.plan import plan
from apothecary.pipeline.recipe import Recipe
from apothecary.pipeline.run import run
from apothecary.train.contradiction import refuse_contradiction

ROOT = Path(__file__).parents[2]
RECIPES = [*sorted((ROOT / "recipes").glob("*.yaml")), *sorted((ROOT / "recipes" / "paper").glob("*.yaml")),
           *(ROOT / "src/apothecary/lab/recipes" / name for name in ("check.yaml", "demo.yaml"))]  # fmt: skip
WRONG = [("harmful", "lab:validation"), ("harmful", "lab:align"), ("harmful", "lab:pairs"),
         ("attack", "lab:validation"), ("validation", "lab:attack")]  # fmt: skip
ARMS = {"booster": {"align": {"method": "booster"}}, "pharmacist": {"curate": {"method": "pharmacist"}}}


@pytest.mark.parametrize(("role", "source"), WRONG)
def test_a_recipe_with_rows_of_the_wrong_kind_stops_before_any_model(tmp_path, monkeypatch, role, source):
    models.install(monkeypatch)
    recipe = edit(data={**RECIPE["data"], role: source}, arms=ARMS)
    seen = []
    with pytest.raises(DataError, match=f"{role} rows: {source}: .* answers of role '{role}'"):
        run(recipe, tmp_path / "store", tmp_path / "out", progress=lambda update: seen.append(update.detail))
    assert {detail["kind"] for detail in seen if "kind" in detail} <= {"data", "overlap"}
    allowed = {"allow_contradicting_rows": True, "allow_same_harmful": True}
    assert run({**recipe, **allowed}, tmp_path / "store", tmp_path / "out").results["complete"]


def test_the_switch_reaches_the_stages_that_train_or_select():
    def kinds(**changes: object) -> set[str]:
        stages = plan(Recipe.parse(edit(arms=ARMS, **changes))).stages().values()
        return {stage.kind for stage in stages if stage.config.get("allow_contradicting_rows")}

    assert kinds() == set() and {"align", "curate"} <= kinds(allow_contradicting_rows=True)


def test_single_stages_refuse_them(tmp_path):
    given = {"aux": {"harmful": "lab:validation"}}
    with pytest.raises(DataError, match="of role 'harmful' refuse"):
        single.align("lab:align", tmp_path / "aligned", "booster", **given)
    with pytest.raises(DataError, match="of role 'validation' open affirmatively"):
        aux = {"validation": "lab:attack", "harmful": "lab:defence"}
        single.curate("lab:align", tmp_path / "core.jsonl", "pharmacist", aux=aux)
    data = {"customer": "lab:customer_train", "attack": "lab:validation"}
    with pytest.raises(DataError, match="of role 'attack' refuse"):
        single.attack(tmp_path / "rows.jsonl", data=data, settings={"n": 10})
    single.attack(tmp_path / "rows.jsonl", data=data, settings={"n": 10}, allow_contradicting_rows=True)
    assert not (tmp_path / "aligned").exists() and not (tmp_path / "core.jsonl").exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_rows_of_the_right_kind_on_the_lab(path):
    mapping = load_yaml(path)
    mapping.pop("sweep", None)
    recipe = Recipe.parse(on_lab(mapping) if mapping.get("model", "lab") != "lab" else mapping)
    sources = {pair for arm in (recipe.base, *recipe.arms) for pair in arm.data.items()}
    assert sources and not recipe.allow_contradicting_rows
    for role, source in sources:
        refuse_contradiction(role, load_rows(source, role))


def test_the_labs_sets_pass_in_their_own_role():
    own = {"attack": ("attack", "attack_harmfulqa"), "harmful": ("defence", "defence_advbench"),
           "validation": ("validation",), "pairs": ("pairs",)}  # fmt: skip
    assert {name for names in own.values() for name in names} <= set(lab_names())
    for role, names in own.items():
        for name in names:
            refuse_contradiction(role, load_rows(f"lab:{name}", role))
