"""Records to rows: the formats that data sets come in, told apart by their columns.

    messages     messages                                  the last one, from the assistant, is the response
    preference   prompt + chosen / rejected, prompt + refusal / compliance, or prompt + response / rejected
    completion   prompt + completion or response           the prompt is text or a list of messages
    alpaca       instruction (+ input) + output            the input follows on a line of its own
    prompt       prompt                                    evaluated only: no response

Rows that `write_rows` wrote are of the third, second or last kind.  `id`, `source`, `role`, `category` and `meta` are
kept where a record has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from apothecary.data.files import Record
from apothecary.data.rows import ROLES, Row, content_id
from apothecary.errors import DataError, did_you_mean

SPEAKERS = ("system", "user", "assistant")
KEPT = ("id", "source", "role", "category", "meta")
UNTRAINED_ROLES = ("", "prompt")  # rows that need no response
MOST_SHOWN = 20  # columns named in a message

Messages = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Format:
    """Which columns make a prompt, a response and a rejected answer; the first one is always required."""

    name: str
    prompt: str
    response: str | None = None
    rejected: str | None = None
    context: str | None = None  # column whose text follows the prompt, if not empty

    @property
    def required(self) -> tuple[str, ...]:
        return tuple(column for column in (self.prompt, self.response, self.rejected) if column)


FORMATS = (
    Format("messages", "messages"),
    Format("preference", "prompt", "chosen", "rejected"),
    Format("preference", "prompt", "refusal", "compliance"),
    Format("preference", "prompt", "response", "rejected"),
    Format("completion", "prompt", "completion"),
    Format("completion", "prompt", "response"),
    Format("alpaca", "instruction", "output", context="input"),
    Format("prompt", "prompt"),
)
FORMAT_NAMES = tuple(dict.fromkeys(known.name for known in FORMATS))
CONTENT = ("messages", "prompt", "response", "completion", "chosen", "rejected", "refusal", "compliance",
           "instruction", "input", "output")  # fmt: skip
COLUMNS = CONTENT + KEPT


def to_rows(records: Sequence[Record], name: str, role: str = "", columns: Mapping[str, str] | None = None,
            form: str | None = None) -> list[Row]:  # fmt: skip
    """Rows of the records of one source.

    `columns` maps names of `COLUMNS` to the source's own columns; `form` is one of `FORMAT_NAMES`, None detects it.
    `name` is for messages and is the source of rows that bring none.  Rows of a role that is trained on must have a
    response, and rows of role `pairs` a rejected answer too.  Raises DataError with the place of the fault.
    """
    columns = columns or {}
    records = _rename(records, name, columns)
    known = _detect(records, name, columns, form)
    rows = []
    for where, fields in records:
        try:
            row = _row(fields, known, name, role)
            _require_answers(row, known, role)
        except DataError as error:
            raise DataError(f"{name} {where}: {error}") from error
        rows.append(row)
    return unique_ids(rows)


def unique_ids(rows: Iterable[Row]) -> list[Row]:
    """The rows in order; where an id was used before, `#2`, `#3`, ... is added to it."""
    used: set[str] = set()
    unique = []
    for row in rows:
        count, row_id = 1, row.id
        while row_id in used:
            count += 1
            row_id = f"{row.id}#{count}"
        used.add(row_id)
        unique.append(row if row_id == row.id else replace(row, id=row_id))
    return unique


def _rename(records: Sequence[Record], name: str, columns: Mapping[str, str]) -> list[Record]:
    found = list(dict.fromkeys(column for record in records for column in record.fields))
    for target, column in columns.items():
        if column not in found:
            raise DataError(
                f"{name} has no column '{column}' to read as {target}; {did_you_mean(column, found[:MOST_SHOWN])}"
            )
    taken = set(columns.values())
    return [
        Record(where, {**{column: value for column, value in fields.items() if column not in taken},
                       **{target: fields[column] for target, column in columns.items() if column in fields}})
        for where, fields in records
    ]  # fmt: skip


def _detect(records: Sequence[Record], name: str, columns: Mapping[str, str], form: str | None) -> Format:
    found = list(dict.fromkeys(column for record in records for column in record.fields))
    mapped = set(columns) & set(CONTENT)
    for known in FORMATS:
        uses = {*known.required, known.context or known.prompt}
        if form in (None, known.name) and set(known.required) <= set(found) and mapped <= uses:
            return known
    expected = " or ".join(" + ".join(known.required) for known in FORMATS if form in (None, known.name))
    mapping = f" with the mapping of {', '.join(sorted(mapped))}" if mapped else ""
    shown = ", ".join(f"{column:.40}" for column in found[:MOST_SHOWN]) + (", ..." if found[MOST_SHOWN:] else "")
    raise DataError(
        f"{name} has the columns {shown or 'none'}{mapping}, expected {expected}; "
        "name yours, as in columns: {prompt: question, response: answer} or --columns.prompt=question"
    )


def _row(fields: dict[str, Any], known: Format, name: str, role: str) -> Row:
    prompt, response = _split(_prompt(fields, known), known)
    if known.response:
        response = _answer(fields.get(known.response), known.response)
    # Rows that were saved without a response may still bring a rejected answer.
    rejected_column = known.rejected or ("rejected" if known.prompt == "prompt" else "")
    rejected = _answer(fields.get(rejected_column), rejected_column)
    meta = fields.get("meta")
    meta = dict(meta) if isinstance(meta, dict) else {}
    if fields.get("category") is not None:
        meta["category"] = fields["category"]
    row_id, source, own_role = (str(fields[key]) if fields.get(key) not in (None, "") else ""
                                for key in ("id", "source", "role"))  # fmt: skip
    return Row(
        row_id or content_id(prompt, response), prompt, response, rejected or None, source or name,
        role or (own_role if own_role in ROLES else ""), meta,
    )  # fmt: skip


def _require_answers(row: Row, known: Format, role: str) -> None:
    if role not in UNTRAINED_ROLES and not row.response:
        where = "as the last message" if known.name == "messages" else f"in column '{known.response or 'response'}'"
        raise DataError(f"no response; rows of role {role} need the assistant's answer {where}")
    if role == "pairs" and not row.rejected:
        raise DataError(f"no rejected answer; rows of role pairs need one in column '{known.rejected or 'rejected'}'")


def _prompt(fields: dict[str, Any], known: Format) -> Messages:
    value = fields.get(known.prompt)
    if known.context:
        context = fields.get(known.context)
        context = "" if _missing(context) else _text(context, known.context)
        return (("user", _text(value, known.prompt) + (f"\n{context}" if context.strip() else "")),)
    if known.name == "messages" and not isinstance(value, list):
        raise DataError(f"'messages' holds {value!r:.40}, expected a list of objects with role and content")
    return _messages(value, known.prompt)


def _split(messages: Messages, known: Format) -> tuple[Messages, str | None]:
    """Prompt and response; the prompt ends with a message of the user."""
    answered = known.name == "messages" and messages[-1][0] == "assistant"
    prompt, response = (messages[:-1], messages[-1][1]) if answered else (messages, None)
    if not prompt or prompt[-1][0] != "user":
        got = f"comes from {prompt[-1][0]}" if prompt else "is missing"
        raise DataError(f"the message before the answer {got}, expected one from the user")
    if not prompt[-1][1].strip():
        raise DataError("the prompt is empty; fill it in or remove the row")
    return prompt, response


def _messages(value: Any, column: str) -> Messages:
    """Text as one message of the user, or a list of {role, content} objects (OpenAI's text parts are joined)."""
    if not isinstance(value, list):
        return (("user", _text(value, column)),)
    messages = []
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f"'{column}' holds {message!r:.60}, expected objects with role and content")
        role, content = message["role"], message["content"]
        if role not in SPEAKERS:
            raise DataError(f"'{column}' has a message of role {role!r:.40}, expected one of {', '.join(SPEAKERS)}")
        if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            content = "".join(_text(part.get("text"), "text") for part in content)
        messages.append((role, _text(content, "content")))
    if not messages:
        raise DataError(f"'{column}' is an empty list, expected at least one message")
    return tuple(messages)


def _answer(value: Any, column: str) -> str | None:
    if _missing(value):
        return None
    if not isinstance(value, list):
        return _text(value, column)
    role, content = _messages(value, column)[-1]
    if role != "assistant":
        raise DataError(f"the last message of '{column}' is from {role}, expected the assistant's answer")
    return content


def _missing(value: Any) -> bool:
    return value is None or value != value  # NaN: how tables write a missing cell


def _text(value: Any, column: str) -> str:
    if _missing(value):
        raise DataError(f"'{column}' is missing, expected text")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"'{column}' holds {value!r:.40}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"'{column}' holds half of a surrogate pair at character {error.start}; remove it") from error
    return value
