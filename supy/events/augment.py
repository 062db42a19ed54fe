"""New training documents from old ones: the words of an argument replaced by those of another of its kind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from random import Random

from supy.events.data import Argument, Document, Event
from supy.events.schema import TRIGGER


def swap_arguments(
    documents: Sequence[Document], probability: float, random: Random
) -> list[Document]:
    """Copies of ``documents`` in which each argument's words are, with ``probability``, those of another argument.

    The other argument has the same event type and role. All places where the words stand change alike, so that what
    named one company still names one company; words that another argument overlaps in part, or that are a trigger
    or a single character, stay.

    >>> one = Document("A1 buys", [Event.make("deal", [("buyer", 0, 2), ("trigger", 3, 7)])])
    >>> two = Document("Bobby buys", [Event.make("deal", [("buyer", 0, 5), ("trigger", 6, 10)])])
    >>> sorted({swap_arguments([one, two], 1.0, Random(seed))[0].text for seed in range(9)})
    ['A1 buys', 'Bobby buys']
    """
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for document in documents:
        for event in document.events:
            for role, start, end in event.arguments:
                kinds[event.type, role].append(document.text[start:end])
    return [_swap(document, kinds, probability, random) for document in documents]


def _swap(
    document: Document,
    kinds: dict[tuple[str, str], list[str]],
    probability: float,
    random: Random,
) -> Document:
    text = document.text
    words: dict[str, list[tuple[str, str]]] = defaultdict(list)
    spans = {(a.start, a.end) for event in document.events for a in event.arguments}
    fixed = {
        text[a.start : a.end]
        for event in document.events
        for a in event.arguments
        if a.role == TRIGGER
    }
    for event in document.events:
        for role, start, end in event.arguments:
            words[text[start:end]].append((event.type, role))
    replaced: list[tuple[int, int, str]] = []
    for word, labels in words.items():
        if len(word) < 2 or word in fixed or random.random() >= probability:
            continue
        places = _occurrences(text, word)
        taken = spans | {(start, end) for start, end, _ in replaced}
        if all(_apart(place, span) for place in places for span in taken):
            other = random.choice(kinds[random.choice(labels)])
            replaced += [(start, end, other) for start, end in places]
    return _rewrite(document, sorted(replaced)) if replaced else document


def _occurrences(text: str, word: str) -> list[tuple[int, int]]:
    places, at = [], text.find(word)
    while at >= 0:
        places.append((at, at + len(word)))
        at = text.find(word, at + len(word))
    return places


def _apart(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a == b or a[1] <= b[0] or b[1] <= a[0]


def _rewrite(document: Document, replaced: list[tuple[int, int, str]]) -> Document:
    pieces, boundary, at, shift = [], {}, 0, 0
    for start, end, word in replaced:
        boundary.update({i: i + shift for i in range(at, start + 1)})
        pieces += [document.text[at:start], word]
        shift += len(word) - (end - start)
        boundary[end] = end + shift
        at = end
    boundary.update({i: i + shift for i in range(at, len(document.text) + 1)})
    pieces.append(document.text[at:])
    events = [
        Event(
            event.type,
            tuple(Argument(a.role, boundary[a.start], boundary[a.end]) for a in event.arguments),
        )
        for event in document.events
    ]
    return Document("".join(pieces), events, document.id)
