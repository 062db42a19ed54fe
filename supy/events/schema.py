"""Event types and the roles of each: the classes that an extractor can tell apart."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from supy.events.data import Document

TRIGGER = "trigger"
"""The role of the words that name the event: the trigger is one more argument."""


class EventSchema:
    """An ordered tuple of labels (event type, role); a label's place in it is its class number.

    >>> schema = EventSchema([("sale", "buyer"), ("sale", "trigger"), ("gift", "trigger")])
    >>> schema.types, schema.label_id("gift", "trigger")
    (('sale', 'gift'), 2)
    >>> EventSchema.from_json(schema.to_json()) == schema
    True
    """

    def __init__(self, labels: Iterable[tuple[str, str]]):
        self.labels: tuple[tuple[str, str], ...] = tuple((type, role) for type, role in labels)
        for label in self.labels:
            if not all(isinstance(name, str) and name for name in label):
                raise ValueError(
                    f"supy.events: label is {label!r}, expected (type, role), two names"
                )
        self.types: tuple[str, ...] = tuple(dict.fromkeys(type for type, _ in self.labels))
        self._labels = {label: index for index, label in enumerate(self.labels)}
        self._types = {type: index for index, type in enumerate(self.types)}
        if not self.labels:
            raise ValueError("supy.events: the schema has no labels, expected at least one")
        if len(self._labels) != len(self.labels):
            twice = next(label for label in self.labels if self.labels.count(label) > 1)
            raise ValueError(f"supy.events: the schema has the label {twice} twice, expected once")

    def __len__(self) -> int:
        return len(self.labels)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EventSchema) and self.labels == other.labels

    def __hash__(self) -> int:
        return hash(self.labels)

    def __repr__(self) -> str:
        return f"EventSchema({len(self.types)} types, {len(self.labels)} labels)"

    def label_id(self, type: str, role: str) -> int:
        """The class number of a label; ValueError for an unknown type or role."""
        label = self._labels.get((type, role))
        if label is None:
            self.type_id(type)
            roles = [known for of, known in self.labels if of == type]
            raise ValueError(f"role {role!r} of event type {type!r} is not one of {_some(roles)}")
        return label

    def type_id(self, type: str) -> int:
        """The place of an event type in `.types`; ValueError for an unknown one."""
        if type not in self._types:
            raise ValueError(f"event type {type!r} is not one of {_some(self.types)}")
        return self._types[type]

    @classmethod
    def from_documents(cls, documents: Iterable[Document]) -> EventSchema:
        """The labels that occur in `documents`, sorted."""
        return cls(
            sorted(
                {
                    (event.type, argument.role)
                    for document in documents
                    for event in document.events
                    for argument in event.arguments
                }
            )
        )

    @classmethod
    def read(cls, path: os.PathLike | str) -> EventSchema:
        """Read what `to_json` wrote, or a DuEE schema, whose types each get the role TRIGGER.

        A DuEE schema has one JSON object a line: `{"event_type": "...", "role_list": [{"role":
        "..."}]}`. Anything else: ValueError that names the file, and the line where it can.
        """
        path = os.fspath(path)
        with open(path, "rb") as file:
            content = file.read()
        try:
            text = content.decode("utf-8-sig")
            whole = _json(text)
            if isinstance(whole, dict) and "labels" in whole:
                return cls.from_json(text)
            return cls(_duee_labels(text))
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise ValueError(f"{path}:{line}: expected UTF-8, got {error.reason}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_json(self) -> str:
        """The schema as JSON text, which `from_json` and `read` understand."""
        return json.dumps({"labels": self.labels}, ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> EventSchema:
        """The inverse of `to_json`; ValueError for other text."""
        value = _json(text)
        labels = value.get("labels") if isinstance(value, dict) else None
        if not isinstance(labels, list) or not all(
            isinstance(label, list) and len(label) == 2 for label in labels
        ):
            raise ValueError('expected {"labels": [[type, role], ...]}, got ' + repr(text[:60]))
        return cls(labels)


def _json(text: str) -> Any:
    """The value of JSON text, None where it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _duee_labels(text: str) -> list[tuple[str, str]]:
    labels: dict[tuple[str, str], None] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        record = _json(line)
        try:
            type = record["event_type"]
            roles = [TRIGGER] + [item["role"] for item in record["role_list"]]
        except (TypeError, KeyError):
            raise ValueError(
                'expected {"labels": [[type, role], ...]} or lines {"event_type": ..., '
                f'"role_list": [{{"role": ...}}]}}, got {line[:60]!r} in line {number}'
            ) from None
        for role in roles:
            labels[type, role] = None
    return list(labels)


def _some(names: Iterable[str], shown: int = 8) -> str:
    names = sorted(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
