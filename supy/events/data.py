"""Documents with events, and the files that hold them: FewFC and DuEE 1.0, both JSON lines."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from supy.events.schema import TRIGGER, EventSchema

log = logging.getLogger(__name__)


class Argument(NamedTuple):
    """One argument: `text[start:end]` plays `role`. The trigger is the argument of role TRIGGER.

    >>> Argument("buyer", 0, 4)
    Argument(role='buyer', start=0, end=4)
    """

    role: str
    start: int
    end: int


class Event(NamedTuple):
    """One event: its type and its arguments, the trigger among them."""

    type: str
    arguments: tuple[Argument, ...]

    @classmethod
    def make(cls, type: str, arguments: Iterable[tuple[str, int, int]]) -> Event:
        """The canonical form: arguments sorted, each once.

        >>> event = Event.make("sale", [("seller", 0, 2), ("buyer", 5, 9), ("seller", 0, 2)])
        >>> [argument.role for argument in event.arguments]
        ['buyer', 'seller']
        """
        return cls(type, tuple(sorted({Argument(*argument) for argument in arguments})))


@dataclass
class Document:
    """A text and its events. Offsets count Python characters of `text`, which is kept as read."""

    text: str
    events: list[Event] = field(default_factory=list)
    id: str | None = None


class DataError(ValueError):
    """A file holds bad records: the message is the first, `.problems` lists each as "path:line: what is wrong"."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        more = f" (and {len(problems) - 1} more bad records)" if len(problems) > 1 else ""
        super().__init__(problems[0] + more)


def read_fewfc(
    path: os.PathLike | str,
    *,
    schema: EventSchema | os.PathLike | str | None = None,
    on_error: str = "raise",
) -> list[Document]:
    """Read a FewFC file (Zhou et al. 2021, "What the Role is vs. What Plays the Role").

    One JSON object a line, span ends exclusive: `{"id": "7", "content": "...", "events": [{"type":
    "...", "mentions": [{"word": "...", "span": [3, 5], "role": "trigger"}]}]}`; `id` is optional.
    Each record is checked whole: UTF-8, JSON, fields and their types, offsets inside the text, word
    equal to the text at its span and, with a `schema` (or the path of one), known types and roles.
    Events come as annotated, repetitions included.

    `on_error="raise"`: DataError after the last line, which names every bad record by line.
    `on_error="skip"`: bad records are left out, each with one warning in the log. A file without a
    single good record is a DataError either way.
    """
    return _read(path, _parse_fewfc, schema, on_error)


def read_duee(
    path: os.PathLike | str,
    schema: EventSchema | os.PathLike | str | None = None,
    *,
    on_error: str = "raise",
) -> list[Document]:
    """Read a DuEE 1.0 file (Li et al. 2020); checks, `schema` and `on_error` as `read_fewfc`.

    One JSON object a line: `{"id": "7", "text": "...", "event_list": [{"event_type": "...",
    "trigger": "...", "trigger_start_index": 3, "arguments": [{"role": "...", "argument": "...",
    "argument_start_index": 0, "alias": []}]}]}`. The unlabelled test files lack `event_list`: their
    documents have no events. Aliases carry no offsets and are not read.
    """
    return _read(path, _parse_duee, schema, on_error)


def write_fewfc(path: os.PathLike | str, documents: Iterable[Document]) -> None:
    """Write documents as a FewFC file: whole or not at all, by way of a temporary file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for document in documents:
                file.write(json.dumps(_fewfc_record(document), ensure_ascii=False) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def event_to_json(event: Event, text: str) -> dict[str, Any]:
    """An event as plain JSON values, arguments in the order of the text, ends exclusive.

    >>> event_to_json(Event.make("sale", [("seller", 0, 3), ("trigger", 4, 9)]), "Ann sells")
    ... # doctest: +NORMALIZE_WHITESPACE
    {'type': 'sale', 'arguments': [{'role': 'seller', 'text': 'Ann', 'start': 0, 'end': 3},
                                   {'role': 'trigger', 'text': 'sells', 'start': 4, 'end': 9}]}
    """
    ordered = sorted(event.arguments, key=lambda argument: (argument.start, argument.end))
    return {
        "type": event.type,
        "arguments": [
            {"role": role, "text": text[start:end], "start": start, "end": end}
            for role, start, end in ordered
        ],
    }


def data_folder() -> Path | None:
    """The folder of real data: SUPY_DATA, else ../shared/data beside a source checkout, else None.

    An empty SUPY_DATA means none.
    """
    named = os.environ.get("SUPY_DATA")
    if named is not None:
        if named and not Path(named).is_dir():
            log.warning("SUPY_DATA is %s, which is not a folder: going on without it", named)
        return Path(named) if named and Path(named).is_dir() else None
    checkout = Path(__file__).resolve().parents[2]
    beside = checkout.parent / "shared" / "data"
    return beside if (checkout / "pyproject.toml").exists() and beside.is_dir() else None


class _BadRecord(Exception):
    """What is wrong with one record, without file and line."""


def _read(
    path: os.PathLike | str,
    parse: Callable[[dict, EventSchema | None], Document],
    schema: EventSchema | os.PathLike | str | None,
    on_error: str,
) -> list[Document]:
    if on_error not in ("raise", "skip"):
        raise ValueError(f'supy.events: on_error is {on_error!r}, expected "raise" or "skip"')
    if schema is not None and not isinstance(schema, EventSchema):
        schema = EventSchema.read(schema)
    documents, problems = [], []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                documents.append(parse(_json_object(line, first=number == 1), schema))
            except _BadRecord as problem:
                problems.append(f"{os.fspath(path)}:{number}: {problem}")
                if on_error == "skip":
                    log.warning("%s (record left out)", problems[-1])
    if problems and (on_error == "raise" or not documents):
        raise DataError(problems)
    if not documents:
        raise DataError([f"{os.fspath(path)}:1: expected one JSON object a line, found none"])
    return documents


def _json_object(line: bytes, first: bool) -> dict:
    try:
        record = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise _BadRecord(f"expected UTF-8, got byte 0x{line[error.start]:02x}") from None
    except json.JSONDecodeError as error:
        problem = f"expected a JSON object, got {error.msg} at column {error.colno}"
        raise _BadRecord(problem) from None
    except (ValueError, RecursionError) as error:  # a huge number, deep nesting
        raise _BadRecord(f"expected a JSON object, got {error}") from None
    return _typed(record, dict, "the record")


_NAMES = {dict: "an object", list: "a list", str: "a string", int: "an integer"}


def _typed(value: Any, kind: type, name: str) -> Any:
    if type(value) is not kind:  # an exact comparison: True is an int for isinstance
        raise _BadRecord(f"expected {name} to be {_NAMES[kind]}, got {_short(value)}")
    if kind is str and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _BadRecord(f"expected {name} to be text, got half a surrogate pair") from None
    return value


def _field(record: dict, name: str, kind: type, where: str) -> Any:
    if name not in record:
        raise _BadRecord(f'expected a field "{name}" in {where}, got {_short(sorted(record))}')
    return _typed(record[name], kind, f"{where}.{name}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _argument(text: str, role: str, word: str, start: int, end: int, where: str) -> Argument:
    if not 0 <= start < end <= len(text):
        raise _BadRecord(
            f"expected {where} inside the text of {len(text)} characters, got span [{start}, {end}]"
        )
    if text[start:end] != word:
        raise _BadRecord(
            f"expected {where} to be {_short(word)}, got {_short(text[start:end])} "
            f"at [{start}, {end}]"
        )
    return Argument(role, start, end)


def _event(type: str, arguments: list[Argument], schema: EventSchema | None, where: str) -> Event:
    if schema is not None:
        try:
            schema.type_id(type)
            for argument in arguments:
                schema.label_id(type, argument.role)
        except ValueError as error:
            raise _BadRecord(f"{where}: {error}") from None
    return Event(type, tuple(arguments))


def _id(record: dict) -> str | None:
    return _typed(record["id"], str, "id") if record.get("id") is not None else None


def _parse_fewfc(record: dict, schema: EventSchema | None) -> Document:
    text = _field(record, "content", str, "the record")
    events = []
    for i, item in enumerate(_field(record, "events", list, "the record")):
        where = f"events[{i}]"
        kind = _field(_typed(item, dict, where), "type", str, where)
        arguments = []
        for j, mention in enumerate(_field(item, "mentions", list, where)):
            at = f"{where}.mentions[{j}]"
            role = _field(_typed(mention, dict, at), "role", str, at)
            word = _field(mention, "word", str, at)
            span = _field(mention, "span", list, at)
            if len(span) != 2:
                raise _BadRecord(f"expected {at}.span to be [start, end], got {_short(span)}")
            start, end = (_typed(bound, int, f"{at}.span") for bound in span)
            arguments.append(_argument(text, role, word, start, end, at))
        events.append(_event(kind, arguments, schema, where))
    return Document(text, events, _id(record))


def _parse_duee(record: dict, schema: EventSchema | None) -> Document:
    text = _field(record, "text", str, "the record")
    events = []
    for i, item in enumerate(_typed(record.get("event_list", []), list, "event_list")):
        where = f"event_list[{i}]"
        kind = _field(_typed(item, dict, where), "event_type", str, where)
        trigger = _field(item, "trigger", str, where)
        start = _field(item, "trigger_start_index", int, where)
        end = start + len(trigger)
        arguments = [_argument(text, TRIGGER, trigger, start, end, f"{where}.trigger")]
        for j, entry in enumerate(_field(item, "arguments", list, where)):
            at = f"{where}.arguments[{j}]"
            role = _field(_typed(entry, dict, at), "role", str, at)
            word = _field(entry, "argument", str, at)
            start = _field(entry, "argument_start_index", int, at)
            arguments.append(_argument(text, role, word, start, start + len(word), at))
        events.append(_event(kind, arguments, schema, where))
    return Document(text, events, _id(record))


def _fewfc_record(document: Document) -> dict[str, Any]:
    text = document.text
    events = [
        {
            "type": event.type,
            "mentions": [
                {"word": text[start:end], "span": [start, end], "role": role}
                for role, start, end in event.arguments
            ],
        }
        for event in document.events
    ]
    return {"id": document.id, "content": text, "events": events}

