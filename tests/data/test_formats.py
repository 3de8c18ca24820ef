import pytest

from apothecary.data.files import Record
from apothecary.data.formats import FORMAT_NAMES, to_rows, unique_ids
from apothecary.data.rows import Row, content_id
from apothecary.errors import DataError

USER = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}
BYE = {"role": "assistant", "content": "bye"}
SYSTEM = {"role": "system", "content": "be kind"}
HI = (("user", "hi"),)


def rows(*records: dict, role: str = "", columns: dict | None = None, form: str | None = None) -> list[Row]:
    return to_rows([Record(f"line {i}", r) for i, r in enumerate(records, 1)], "f.jsonl", role, columns, form)


CASES = {
    "messages": ({"messages": [USER, HELLO]}, HI, "hello", None),
    "messages with system": ({"messages": [SYSTEM, USER, HELLO]}, (("system", "be kind"), *HI), "hello", None),
    "several turns": ({"messages": [USER, HELLO, USER, HELLO]}, (*HI, ("assistant", "hello"), *HI), "hello", None),
    "text parts": (
        {"messages": [{**USER, "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, HELLO]},
        HI, "hello", None),
    "prompt and completion": ({"prompt": "hi", "completion": "hello"}, HI, "hello", None),
    "conversational completion": ({"prompt": [SYSTEM, USER], "completion": [HELLO]},
                                  (("system", "be kind"), *HI), "hello", None),
    "prompt and response": ({"prompt": "hi", "response": "hello"}, HI, "hello", None),
    "chosen and rejected": ({"prompt": "hi", "chosen": "hello", "rejected": "bye"}, HI, "hello", "bye"),
    "chosen as conversation": ({"prompt": "hi", "chosen": [USER, HELLO], "rejected": [USER, BYE]}, HI, "hello", "bye"),
    "refusal and compliance": ({"prompt": "hi", "refusal": "hello", "compliance": "bye"}, HI, "hello", "bye"),
    "response and rejected": ({"prompt": "hi", "response": "hello", "rejected": "bye"}, HI, "hello", "bye"),
    "alpaca": ({"instruction": "say", "input": "hi", "output": "hello"}, (("user", "say\nhi"),), "hello", None),
    "alpaca, empty input": ({"instruction": "hi", "input": " ", "output": "hello"}, HI, "hello", None),
    "alpaca, no input": ({"instruction": "hi", "output": "hello"}, HI, "hello", None),
    "bare prompt": ({"prompt": "hi"}, HI, None, None),
    "rejected answer alone": ({"prompt": "hi", "rejected": "bye"}, HI, None, "bye"),
    "completion and rejected": ({"prompt": "hi", "completion": "hello", "rejected": "bye"}, HI, "hello", "bye"),
    "number as answer": ({"prompt": "hi", "response": 42}, HI, "42", None),
    "table's missing cell": ({"prompt": "hi", "response": "hello", "rejected": float("nan")}, HI, "hello", None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_format_is_told_by_the_columns(case):
    record, prompt, response, rejected = CASES[case]
    (row,) = rows(record)
    assert (row.prompt, row.response, row.rejected) == (prompt, response, rejected)
    assert (row.id, row.source, row.role) == (content_id(prompt, response), "f.jsonl", "")


def test_columns_are_mapped():
    (row,) = rows({"text": "hi", "category": "hello"}, columns={"prompt": "text", "response": "category"})
    assert (row.prompt, row.response, row.meta) == (HI, "hello", {})


@pytest.mark.parametrize("column", ["question", "goal", "Behavior"])
def test_bare_prompts_under_another_name_need_a_mapping(column):
    with pytest.raises(DataError, match=f"has the columns {column}, expected messages or"):
        rows({column: "hi"})
    assert rows({column: "hi"}, columns={"prompt": column})[0].prompt == HI


def test_mapping_decides_where_columns_are_ambiguous():
    record = {"messages": [USER, HELLO], "text": "q", "label": "a"}
    assert rows(record)[0].response == "hello"
    assert rows(record, columns={"prompt": "text", "response": "label"})[0].response == "a"


def test_mapping_may_swap_columns():
    (row,) = rows({"prompt": "hello", "response": "hi"}, columns={"prompt": "response", "response": "prompt"})
    assert (row.prompt, row.response) == (HI, "hello")


def test_format_can_be_forced():
    record = {"prompt": "hi", "response": "hello", "instruction": "say", "output": "done"}
    assert rows(record)[0].response == "hello"
    assert rows(record, form="alpaca")[0].response == "done"
    assert rows(record, form="prompt")[0].response is None
    with pytest.raises(DataError, match="expected messages; name yours"):
        rows(record, form="messages")
    assert FORMAT_NAMES == ("messages", "preference", "completion", "alpaca", "prompt")


def test_own_id_source_role_and_category_are_kept():
    record = {
        "id": 7,
        "source": "book",
        "role": "align",
        "prompt": "hi",
        "response": "x",
        "category": "c",
        "meta": {"a": 1},
    }
    (row,) = rows(record)
    assert (row.id, row.source, row.role, row.meta) == ("7", "book", "align", {"a": 1, "category": "c"})
    assert rows(record, role="benign")[0].role == "benign"
    assert rows({**record, "role": "a doctor"})[0].role == ""  # a persona, not a role of ours


def test_ids_are_unique_and_stable():
    same = {"prompt": "hi", "response": "hello"}
    first, second = (row.id for row in rows(same, same))
    assert second == f"{first}#2"
    ids = [row.id for row in unique_ids([Row(i, HI) for i in ("a", "a", "a#2", "a", "b")])]
    assert ids == ["a", "a#2", "a#2#2", "a#3", "b"]


def test_rows_without_response_are_allowed_only_where_none_is_trained_on():
    complete, lacking = {"prompt": "hi", "response": "hello"}, {"prompt": "hi", "response": ""}
    for role in ("", "prompt"):
        assert [row.response for row in rows(complete, lacking, {"prompt": "x"}, role=role)] == ["hello", "", None]
    with pytest.raises(DataError, match=r"^f\.jsonl line 2: no response; rows of role align need .* column 'response'"):
        rows(complete, lacking, role="align")


def test_last_message_must_be_the_assistants_for_training():
    unanswered = {"messages": [USER]}
    assert rows(unanswered, role="prompt")[0].response is None
    with pytest.raises(DataError, match=r"line 1: no response; rows of role customer need .* as the last message"):
        rows(unanswered, role="customer")


def test_pairs_need_a_rejected_answer():
    with pytest.raises(DataError, match="line 1: no rejected answer; rows of role pairs need one in column 'rejected'"):
        rows({"prompt": "hi", "response": "hello"}, role="pairs")


BAD = {
    "unknown role": ({"messages": [{"role": "bot", "content": "x"}]}, "role 'bot', expected one of system, user"),
    "no content": ({"messages": [{"role": "user"}]}, "expected objects with role and content"),
    "content is null": ({"messages": [USER, {"role": "assistant", "content": None}]}, "'content' is missing"),
    "image part": ({"messages": [{"role": "user", "content": [{"type": "image"}]}, HELLO]}, "'content' holds"),
    "messages as text": ({"messages": "hi"}, "'messages' holds 'hi', expected a list"),
    "no messages": ({"messages": []}, "empty list"),
    "answer alone": ({"messages": [HELLO]}, "before the answer is missing, expected one from the user"),
    "answer after answer": ({"messages": [USER, HELLO, HELLO]}, "comes from assistant, expected one from the user"),
    "prompt ends with answer": ({"prompt": [USER, HELLO], "response": "x"}, "comes from assistant"),
    "completion from user": ({"prompt": "hi", "completion": [USER]}, "'completion' is from user, expected"),
    "empty prompt": ({"prompt": " ", "response": "x"}, "the prompt is empty"),
    "prompt is null": ({"prompt": None, "response": "x"}, "'prompt' is missing"),
    "prompt is an object": ({"prompt": {"a": 1}, "response": "x"}, "'prompt' holds {'a': 1}, expected text"),
    "response is a boolean": ({"prompt": "hi", "response": True}, "'response' holds True, expected text"),
    "half a surrogate pair": ({"prompt": "a\ud800", "response": "x"}, "half of a surrogate pair at character 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_record_is_told_with_its_place(case):
    record, message = BAD[case]
    with pytest.raises(DataError) as caught:
        rows({"prompt": "fine", "messages": [USER, HELLO], "response": "x"} if "messages" in record else
             {"prompt": "fine", "response": "x", "completion": "x"} if "completion" in record else
             {"prompt": "fine", "response": "x"}, record)  # fmt: skip
    assert str(caught.value).startswith("f.jsonl line 2: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_columns_are_named_with_a_way_out():
    with pytest.raises(DataError, match=r"has the columns text, label, expected .* columns: \{prompt: question"):
        rows({"text": "a", "label": "b"})


def test_mapping_to_a_missing_column_suggests_one():
    with pytest.raises(DataError, match="no column 'questoin' to read as prompt; did you mean 'question'"):
        rows({"question": "hi"}, columns={"prompt": "questoin"})
