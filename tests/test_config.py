"""Configuration: what is accepted, and what the messages say of the rest."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apothecary.config import build, canonical, load_yaml, override, to_dict
from apothecary.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    rate: float = 1e-3
    steps: int = 5
    on: bool = False


@dataclass(frozen=True)
class Source:
    path: str

    @classmethod
    def parse(cls, text: str) -> "Source":
        return cls(text.upper())


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    mode: Literal["a", "b", 1] = "a"
    maybe: int | None = None
    mixed: str | tuple[str, ...] = "x"
    pair: tuple[float, float] = (0.0, 1.0)
    items: list[int] = field(default_factory=list)
    table: dict[str, float] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()
    optional: Inner | None = None
    folder: Path | None = None
    number: float | int = 0


def test_everything_that_fits_is_converted():
    made = build(
        Outer,
        {"name": "n", "inner": {"rate": "5e-4", "steps": 3, "on": True}, "mode": 1, "maybe": None, "mixed": ["q", "v"],
         "pair": [0, 2], "items": [1, 2], "table": {"a": 1}, "sources": ["x", {"path": "y"}], "optional": {"rate": 2},
         "folder": "here", "number": 3},
    )  # fmt: skip
    assert made == Outer("n", Inner(0.0005, 3, True), 1, None, ("q", "v"), (0.0, 2.0), [1, 2], {"a": 1.0},
                         (Source("X"), Source("y")), Inner(2.0), Path("here"), 3)  # fmt: skip
    assert isinstance(made.optional.rate, float) and isinstance(made.number, int)


@dataclass(frozen=True)
class Middle:
    inner: Inner = field(default_factory=lambda: Inner(0.5, 7, True))
    other: int = 1


@dataclass(frozen=True)
class Whole:
    middle: Middle = Middle(other=2)
    either: Middle | None = Middle(other=3)


def test_a_mapping_is_laid_over_the_fields_default():
    assert build(Whole, {}) == Whole()
    made = build(Whole, {"middle": {"inner": {"steps": 1}}, "either": {"other": 4}})
    assert made == Whole(Middle(Inner(0.5, 1, True), 2), Middle(other=4))
    assert build(Whole, to_dict(made)) == made
    assert build(Whole, {"middle": Middle(), "either": None}) == Whole(Middle(), None)
    with pytest.raises(ConfigError, match=r"unknown key 'middle\.inner\.step'; did you mean 'steps'"):
        build(Whole, {"middle": {"inner": {"step": 1}}})


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"nmae": "x"}, ["unknown key 'top.nmae'", "did you mean 'name'"]),
        ({"name": "n", "inner": {"stesp": 1}}, ["unknown key 'top.inner.stesp'", "did you mean 'steps'"]),
        ({}, ["'top.name' is missing", "text"]),
        ({"name": 3}, ["'top.name' is 3 (int)", "expected text"]),
        ({"name": "n", "inner": {"steps": 2.5}}, ["'top.inner.steps' is 2.5 (float)", "an integer"]),
        ({"name": "n", "inner": {"steps": True}}, ["'top.inner.steps' is True", "an integer"]),
        ({"name": "n", "inner": {"rate": "fast"}}, ["'top.inner.rate' is 'fast'", "float"]),
        ({"name": "n", "inner": {"rate": float("nan")}}, ["'top.inner.rate' is nan", "a number"]),
        ({"name": "n", "inner": {"rate": False}}, ["'top.inner.rate' is False", "float"]),
        ({"name": "n", "inner": {"on": 1}}, ["'top.inner.on' is 1", "true or false"]),
        ({"name": "n", "inner": [1]}, ["'top.inner' is [1] (list)", "a mapping"]),
        ({"name": "n", "mode": "c"}, ["'top.mode' is 'c'", "one of 'a', 'b', 1"]),
        ({"name": "n", "mode": True}, ["'top.mode' is True"]),
        ({"name": "n", "maybe": "x"}, ["'top.maybe' is 'x'", "an integer or null"]),
        ({"name": "n", "pair": [1]}, ["'top.pair' is [1]", "2 values"]),
        ({"name": "n", "items": [1, "b"]}, ["'top.items[1]' is 'b'"]),
        ({"name": "n", "table": {"k": []}}, ["'top.table.k' is []"]),
        ({"name": "n", "optional": {"rat": 2}}, ["unknown key 'top.optional.rat'", "did you mean 'rate'"]),
    ],
)
def test_what_does_not_fit_is_named_with_its_path(mapping: dict[str, Any], words: list[str]):
    with pytest.raises(ConfigError) as caught:
        build(Outer, mapping, "top")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_value_refused_by_the_dataclass_itself_carries_the_path():
    @dataclass
    class Positive:
        n: int

        def __post_init__(self):
            if self.n < 1:
                raise ValueError(f"n is {self.n}, expected at least 1")

    with pytest.raises(ConfigError, match=r"^attack: n is 0, expected at least 1$"):
        build(Positive, {"n": 0}, "attack")


def test_yaml_errors_name_file_and_line(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text("name: demo\nalign: {method: sft\nseeds: [0]\n")
    with pytest.raises(ConfigError, match=r"r\.yaml, line 3: "):
        load_yaml(path)
    path.write_text("name: demo\narms:\n  a: {}\n  a: {}\n")
    with pytest.raises(ConfigError, match=r"line 4: the key 'a' is given twice"):
        load_yaml(path)
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected 'key: value' lines"):
        load_yaml(path)
    path.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_yaml(path)
    with pytest.raises(ConfigError, match=r"no file .*none\.yaml"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        load_yaml(tmp_path)


def test_overrides_are_yaml_and_make_levels_without_touching_the_original():
    base = {"model": "lab", "attack": {"p": 0.1, "n": 5}, "arms": None}
    made = override(
        base, ["attack.p=[0, 0.1]", "--seeds=3", "model.dtype=float32", "arms.a.align.method=vaccine", "x.y=a=b"]
    )
    assert made == {
        "model": {"path": "lab", "dtype": "float32"},
        "attack": {"p": [0, 0.1], "n": 5},
        "arms": {"a": {"align": {"method": "vaccine"}}},
        "seeds": 3,
        "x": {"y": "a=b"},
    }
    assert base == {"model": "lab", "attack": {"p": 0.1, "n": 5}, "arms": None}


@pytest.mark.parametrize("item", ["seeds", "=3", "a..b=1", "a.=1", "seeds=[1"])
def test_a_malformed_override_is_refused(item: str):
    with pytest.raises(ConfigError, match=r"cannot read"):
        override({}, [item])


def test_an_override_inside_a_number_is_refused():
    with pytest.raises(ConfigError, match=r"'attack\.p' is 0\.1 .*'attack\.p\.x' cannot be set"):
        override({"attack": {"p": 0.1}}, ["attack.p.x=1"])


def test_canonical_text_ignores_order_and_is_json():
    left, right = {"b": (1, Inner()), "a": Path("x")}, {"a": "x", "b": [1, {"on": False, "steps": 5, "rate": 0.001}]}
    assert canonical(left) == canonical(right)
    assert json.loads(canonical(left)) == right
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"a": float("nan")})


@given(st.builds(Inner, st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.booleans()))
def test_a_dataclass_survives_the_way_to_json_and_back(inner: Inner):
    assert build(Inner, json.loads(canonical(inner))) == inner == build(Inner, to_dict(inner))
