"""What selection was worth, from stored results: ranking, time, break-even."""

from __future__ import annotations

import pytest

from apothecary.pipeline.combined import combine, compact
from apothecary.report.selectors import as_markdown, made, ranked, rankings, savings, spread
from apothecary.stats import auc_interval, wilson

ALIGN = {"method": "sft", "train": {"epochs": 10.0}}
PICK = {"method": "pick", "keep": 0.25}


def run(seed, selection=20.0, auc=0.9):
    """A pool whose alignment takes 100 s, a quarter of it 25 s, and a selection of 20 s."""
    ranking = {"auc": auc, "rows": 40, "kept": {"0.25": {"precision": 0.8, "kinds": {"good": 8, "bad": 2}}}}
    stages = [{"kind": "align", "key": "whole", "cpu_seconds": 100.0, "inputs": ["pool"], "metrics": {}},
              {"kind": "curate", "key": "picked", "cpu_seconds": selection, "inputs": ["pool"],
               "metrics": {"rows": 10, "pool": 40, "work": 1.0, "ranking": ranking}},
              {"kind": "align", "key": "part", "cpu_seconds": 25.0, "inputs": ["picked"], "metrics": {}}]  # fmt: skip
    plain = {"curate": None, "align": "sft", "p": None, "seed": seed, "scores": {}}
    models = [{**plain, "arm": "aligned", "stage": "aligned", "artifact": "whole"},
              {**plain, "arm": "pick, sft", "stage": "aligned", "artifact": "part", "curate": "pick 25 %"}]  # fmt: skip
    arms = [{"name": "full, sft", "align": ALIGN, "curate": None},
            {"name": "pick, sft", "align": ALIGN, "curate": PICK}]  # fmt: skip
    recipe = {"align": ALIGN, "curate": None, "arms": arms, "seeds": [seed]}
    return {"name": "study", "created": "now", "complete": True, "versions": {}, "recipe": recipe, "models": models,
            "stages": stages}  # fmt: skip


def stored(*runs):
    """As in sessions apart: each run is stored by itself, then they are put together."""
    return compact(combine([compact(one) for one in runs]))


def test_stored_models_tell_how_they_were_made():
    found = made(stored(run(0), run(1, selection=30.0)))
    assert found["aligned"].seconds("align") == {0: 100.0, 1: 100.0} and found["aligned"].curate is None
    assert found["pick, sft"].seconds("curate") == {0: 20.0, 1: 30.0}
    assert found["pick, sft"].seconds("curate", "align") == {0: 45.0, 1: 55.0}
    assert found["pick, sft"].by_seed[0]["curate"]["pool"] == 40


def test_selection_is_weighed_against_what_it_saves():
    (saving,) = savings(stored(run(0), run(1, selection=30.0)))
    assert saving.shares == [0.45, 0.55]
    assert saving.break_even_epochs == pytest.approx([20 / 7.5, 30 / 7.5]), "each epoch of the quarter saves 7.5 s"


def test_rankings_have_a_line_for_each_selection():
    cells = rankings(ranked(stored(run(0), run(1, auc=0.8), run(2, auc=0.7))))
    assert cells[0] == ["selector", "AUC", "good of 25 % kept"] and [line[0] for line in cells[1:]] == ["pick"]
    assert cells[1][1].startswith("0.800 [0.552, 1.000]"), "t = 4.303 for three seeds; no AUC is above 1"
    low, high = (100 * end for end in wilson(8, 10))
    assert cells[1][2] == f"80 [{low:.0f}, {high:.0f}]", "three seeds that keep the same ten rows"
    with pytest.raises(ValueError, match="no selector of these results"):
        ranked({**stored(run(0)), "models": []})


def test_seeds_that_agree_do_not_make_an_order_certain():
    (one,) = ranked(stored(run(0), run(1), run(2)))
    low, high = auc_interval(0.9, 20, 20)
    assert one.auc == f"0.900 [{low:.3f}, {high:.3f}]" == ranked(stored(run(0)))[0].auc


def pools(aucs, against):
    """One selector on pools of 40 rows, 10 of them good, which share none."""
    kept = {"0.25": {"precision": 0.5, "kinds": {"good": 5, "bad": 5}}}
    stages = [{"kind": "curate", "arm": "pick", "seed": seed, "against": pair,
               "metrics": {"ranking": {"auc": auc, "rows": 40, "kept": kept}}}
              for seed, (auc, pair) in enumerate(zip(aucs, against, strict=True))]  # fmt: skip
    return {"disjoint_pools": {"0": {"good": 10, "bad": 30}}, "stages": stages,
            "recipe": {"arms": [{"name": "pick", "curate": PICK}]}}  # fmt: skip


def test_pools_without_a_row_in_common_add_up():
    (one,) = ranked(pools([0.9] * 3, [{}] * 3))
    low, high = auc_interval(0.9, 30, 90)
    assert one.auc == f"0.900 [{low:.3f}, {high:.3f}]" and one.less("other") == ""
    low, high = (100 * end for end in wilson(15, 30))
    assert one.precision("0.25") == f"50 [{low:.0f}, {high:.0f}]"


def test_selectors_are_compared_on_the_rows_that_both_ranked():
    alike = ranked(pools([0.9] * 3, [{"other": [-0.1, 0.03]}] * 3))[0].less("other")
    half = 1.96 * 0.03 / 3**0.5
    assert alike == f"\u22120.1000 [\u2212{0.1 + half:.4f}, \u2212{0.1 - half:.4f}]", "pools that agree: the rows speak"
    apart = ranked(pools([0.9] * 3, [{"other": [shift, 0.0]} for shift in (-0.1, 0.0, 0.1)]))[0]
    assert apart.less("other") == "+0.0000 [\u22120.2484, +0.2484]", "pools that differ: t = 4.303 times 0.1 / sqrt 3"
    cells = rankings([apart], "other")
    assert cells[0][1:3] == ["AUC", "less `other`"] and cells[1][2] == apart.less("other")


def test_a_single_seed_has_no_interval():
    assert spread([0.5]) == "0.500"
    assert as_markdown([["a", "b"], ["x|y", ""]]) == "| a | b |\n| --- | ---: |\n| x\\|y | \u2013 |"
