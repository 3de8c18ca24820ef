import pytest

from apothecary.data.chat import IGNORE, opening_ids, prompt_ids, render, render_all, render_prompt
from apothecary.data.rows import Row
from apothecary.errors import DataError, ModelError

ROW = Row("r1", (("system", "be kind"), ("user", "hi")), "Sure.")


def test_labels_mask_exactly_the_prompt(tokenizer):
    row = render(ROW, tokenizer, 100)
    assert tokenizer.decode(row.ids[: row.start]) == "s:be kind<|end|>u:hi<|end|>a:"
    assert row.labels == [IGNORE] * row.start + list(row.ids[row.start :])
    assert row.supervised == len(row.labels) - row.labels.count(IGNORE)


def test_response_and_eos_are_supervised(tokenizer):
    row = render(ROW, tokenizer, 100)
    supervised = [label for label in row.labels if label != IGNORE]
    assert tokenizer.decode(supervised) == "Sure.<|end|>"
    assert supervised[-1] == tokenizer.eos_token_id
    assert supervised.count(tokenizer.eos_token_id) == 1


def test_no_merge_crosses_the_boundary(tokenizer):
    row = render(ROW, tokenizer, 100)
    together = tokenizer(tokenizer.decode(row.ids), add_special_tokens=False)["input_ids"]
    assert ":S" in tokenizer.convert_ids_to_tokens(together)  # what tokenising the whole text would do
    assert ":S" not in tokenizer.convert_ids_to_tokens(row.ids)
    assert list(row.ids[: row.start]) == prompt_ids(ROW.prompt, tokenizer)
    assert list(row.ids[: row.start]) == list(render_prompt(ROW, tokenizer).ids)


def test_eos_as_padding_token_stays_supervised(tokenizer):
    before = render(ROW, tokenizer, 100)
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert render(ROW, tokenizer, 100) == before
    assert before.labels[-1] == tokenizer.eos_token_id


def test_answer_takes_the_place_of_the_response(tokenizer):
    row = render(ROW, tokenizer, 100, answer="No.")
    assert tokenizer.decode(row.ids[row.start :]) == "No.<|end|>"


def test_bare_prompt_has_no_supervised_token(tokenizer):
    row = render_prompt(ROW, tokenizer)
    assert row.supervised == 0
    assert set(row.labels) == {IGNORE}


def test_missing_chat_template_names_the_tokenizer(tokenizer):
    tokenizer.chat_template = None
    tokenizer.name_or_path = "plain-model"
    with pytest.raises(ModelError, match="'plain-model' has no chat template"):
        render(ROW, tokenizer, 100)


def test_the_opening_of_an_answer_is_what_the_template_adds_for_it(tokenizer):
    assert tokenizer.decode(opening_ids(tokenizer)) == "a:"
    tokenizer.chat_template = "{% for m in messages %}[INST]{{ m['content'] }}[/INST]{% endfor %}"
    tokenizer.name_or_path = "headless"
    with pytest.raises(ModelError, match="template of 'headless' has no opening of its own for an assistant's turn"):
        opening_ids(tokenizer)


def test_missing_eos(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no eos token"):
        render(ROW, tokenizer, 100)


def test_template_that_refuses_the_messages_names_row_and_roles(tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"row 'r1' with the roles system, user \(System role not supported\)"):
        render(ROW, tokenizer, 100)


@pytest.mark.parametrize("response", [None, ""])
def test_row_without_supervised_token_is_named(tokenizer, response):
    with pytest.raises(DataError, match="row 'bare' has no response, so no supervised token"):
        render(Row("bare", ROW.prompt, response), tokenizer, 100)


def test_over_long_row_is_named_with_both_lengths(tokenizer):
    length = len(render(ROW, tokenizer, 100).ids)
    assert render(ROW, tokenizer, length).supervised
    with pytest.raises(DataError, match=f"row 'r1' has {length} tokens, expected at most {length - 1}"):
        render(ROW, tokenizer, length - 1)


def test_over_long_rows_are_dropped_on_request_only(tokenizer):
    long = Row("long", ROW.prompt, "Sure. " * 50)
    with pytest.raises(DataError, match="row 'long'"):
        render_all([ROW, long], tokenizer, 60)
    assert [row.row_id for row in render_all([ROW, long], tokenizer, 60, over_long="drop")] == ["r1"]
    with pytest.raises(DataError, match="no rows to train on"):
        render_all([long], tokenizer, 60, over_long="drop")


def test_dropping_over_long_rows_does_not_hide_a_missing_response(tokenizer):
    with pytest.raises(DataError, match="row 'bare' has no response"):
        render_all([ROW, Row("bare", ROW.prompt)], tokenizer, 60, over_long="drop")


def test_dropping_over_long_rows_does_not_hide_a_template_that_refuses(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match="no system role"):
        render_all([ROW], tokenizer, 60, over_long="drop")
