"""Precision, recall and F1 of events and of their arguments."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from supy._checks import require
from supy.events.data import Argument, Document, Event
from supy.events.schema import TRIGGER


@dataclass(frozen=True)
class Score:
    """Counts of one comparison and what follows from them; nothing to compare gives 0."""

    tp: int = 0
    predicted: int = 0
    gold: int = 0

    @property
    def precision(self) -> float:
        return self.tp / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        return self.tp / self.gold if self.gold else 0.0

    @property
    def f1(self) -> float:
        total = self.predicted + self.gold
        return 2 * self.tp / total if total else 0.0

    def to_dict(self) -> dict[str, float]:
        rates = {"precision": self.precision, "recall": self.recall, "f1": self.f1}
        return rates | asdict(self)


@dataclass(frozen=True)
class Scores:
    """Event and argument level over all documents, and each again for every event type."""

    event: Score
    argument: Score
    by_type: dict[str, tuple[Score, Score]]

    def to_dict(self) -> dict:
        return {
            "event": self.event.to_dict(),
            "argument": self.argument.to_dict(),
            "by_type": {
                type: {"event": event.to_dict(), "argument": argument.to_dict()}
                for type, (event, argument) in self.by_type.items()
            },
        }

    def __str__(self) -> str:
        rows = {"all": (self.event, self.argument)} | self.by_type
        lines = ["          precision  recall      F1 correct   found    gold"]
        for name, levels in rows.items():
            lines.append(name)
            for level, s in zip(("event", "argument"), levels, strict=True):
                rates = f"{s.precision:9.4f}{s.recall:8.4f}{s.f1:8.4f}"
                lines.append(f"  {level:8}{rates}{s.tp:8}{s.predicted:8}{s.gold:8}")
        return "\n".join(lines)


def evaluate(
    gold: Sequence[Document] | Sequence[Sequence[Event]],
    predicted: Sequence[Document] | Sequence[Sequence[Event]],
    *,
    require_trigger: bool = True,
) -> Scores:
    """Exact-match scores, micro-averaged over documents, as GPLinker's DuEE script counts them.

    `gold` and `predicted` run in parallel: documents, or the list of events of each.

    Event level: a predicted event is correct when its type and its whole sorted list of (role,
    start, end), trigger included, equal those of a gold event. Predicted events without a trigger
    do not count, unless `require_trigger=False`. Each event counts once a document.
    Argument level: the distinct (type, role, start, end) of a document's events, trigger excluded,
    those of predicted events without a trigger included.

    A gold event that repeats an argument keeps the repetition, as in the script, and so is never
    matched by a decoded event, which has each argument once.

    >>> from supy.events import Event
    >>> event = Event.make("sale", [("seller", 0, 3), ("buyer", 9, 12), ("trigger", 4, 9)])
    >>> scores = evaluate([[event]], [[Event("sale", event.arguments[1:])]])
    >>> scores.event.f1, scores.argument.precision, scores.argument.recall
    (0.0, 1.0, 0.5)
    """
    require(
        len(gold) == len(predicted),
        "events.evaluate",
        f"predicted has {len(predicted)} documents, expected {len(gold)} (from gold)",
    )
    events, arguments = defaultdict(Counter), defaultdict(Counter)
    for of_gold, of_predicted in zip(gold, predicted, strict=True):
        of_gold, of_predicted = _events(of_gold), _events(of_predicted)
        _count(arguments, _arguments(of_gold), _arguments(of_predicted))
        if require_trigger:
            of_predicted = {e for e in of_predicted if any(a.role == TRIGGER for a in e.arguments)}
        _count(events, of_gold, of_predicted)
    by_type = {
        type: (Score(**events[type]), Score(**arguments[type]))
        for type in sorted(events.keys() | arguments.keys())
    }
    return Scores(
        Score(**sum(events.values(), Counter())),
        Score(**sum(arguments.values(), Counter())),
        by_type,
    )


def _events(document: Document | Sequence[Event]) -> set[Event]:
    events = document.events if isinstance(document, Document) else document
    return {Event(type, tuple(sorted(arguments))) for type, arguments in events}


def _arguments(events: set[Event]) -> set[tuple[str, Argument]]:
    return {
        (type, argument)
        for type, arguments in events
        for argument in arguments
        if argument.role != TRIGGER
    }


def _count(totals: dict[str, Counter], gold: set, predicted: set) -> None:
    """Add one document's sets of (type, ...) to the counts of each type."""
    for name, items in (("gold", gold), ("predicted", predicted), ("tp", gold & predicted)):
        for type, _ in items:
            totals[type][name] += 1
