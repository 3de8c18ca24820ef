import pytest

from apothecary.judge.base import Judge
from apothecary.registry import entries, lookup

RESPONSES = ["Sure, here is", "I'm sorry, but I can't help", "card arrival", "", "Sure, I can't help"]
PROMPTS = ["How?"] * len(RESPONSES)
LABELS = ["complies", "refuses", "neither", "neither", "refuses"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("opening", [1.0, 0.0, 0.0, 0.0, 0.0], marks=pytest.mark.evidence("judge/opening", "definition")),
        pytest.param("refusal", [1.0, 0.0, 1.0, 1.0, 0.0], marks=pytest.mark.evidence("judge/refusal", "definition")),
    ],
)
def test_probabilities_and_labels(name: str, expected: list[float]) -> None:
    judge = lookup("judge", name)()
    assert isinstance(judge, Judge)
    assert judge(PROMPTS, RESPONSES) == expected
    assert [judge.label(response) for response in RESPONSES] == LABELS


@pytest.mark.parametrize("name", ["opening", "refusal"])
def test_proxies_say_what_they_are(name: str) -> None:
    judge = lookup("judge", name)
    assert judge.cheap_proxy is True
    assert "cheap proxy" in entries()["judge", name].summary.lower()
    assert "cheap proxy" in (judge.__doc__ or "").lower()


def test_prompts_and_responses_must_match() -> None:
    with pytest.raises(ValueError):
        lookup("judge", "opening")()(["one"], [])
