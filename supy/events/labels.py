"""From documents to the label rows that train the heads, and windows over long documents."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch

from supy._checks import require
from supy.events.data import Argument, Document, Event
from supy.events.schema import EventSchema

Offsets = Sequence[tuple[int, int]]
"""The characters of each token of one text: (start, end), end exclusive."""


class Dropped(NamedTuple):
    """An argument that no label can stand for, and why."""

    document: int
    event: Event
    argument: Argument
    reason: str


class EventLabels(NamedTuple):
    """The labels of a batch: int64 tensors with sorted rows, each once; all positions are tokens.

    spans: `[N, 4]` rows (document, label, first token, last token), both tokens inclusive.
    head_links: `[M, 4]` rows (document, link head, min, max) of two arguments' first tokens.
    tail_links: `[M', 4]` likewise of their last tokens.
    dropped: the arguments that are in none of them.
    """

    spans: torch.Tensor
    head_links: torch.Tensor
    tail_links: torch.Tensor
    dropped: list[Dropped]


def encode(
    documents: Sequence[Document],
    schema: EventSchema,
    offsets: Sequence[Offsets] | None = None,
    *,
    typed: bool = False,
) -> EventLabels:
    """GPLinker's labels for a batch of documents (kexue.fm/archives/8926).

    An argument is a span of the label (event type, role). Two arguments of one event are linked
    when the pair of their first tokens is a head link and the pair of their last tokens a tail
    link; a pair is unordered and stored as (min, max), and two roles on one span give the diagonal
    cells. `typed=False` keys links on the pair alone, link head 0, as published; `typed=True` has
    one link head for each type of `schema.types`, which confuses fewer overlapping events.

    Tokens are characters, or those of `offsets`: for each document its tokens' (start, end)
    characters; tokens without characters, such as [CLS], count as positions and match nothing.
    An argument that does not begin and end with a token is left out and listed in `.dropped`.

    >>> sale = Event.make("sale", [("seller", 0, 3), ("trigger", 4, 9)])
    >>> labels = encode([Document("Ann sells", [sale])], EventSchema.from_documents(
    ...     [Document("", [sale])]))
    >>> labels.spans.tolist(), labels.head_links.tolist(), labels.tail_links.tolist()
    ([[0, 0, 0, 2], [0, 1, 4, 8]], [[0, 0, 0, 4]], [[0, 0, 2, 8]])
    """
    require(
        offsets is None or len(offsets) == len(documents),
        "events.encode",
        f"offsets has {len(offsets or ())} entries, expected {len(documents)} (from documents)",
    )
    spans, heads, tails, dropped = set(), set(), set(), []
    for number, document in enumerate(documents):
        first, last = _token_maps(document.text, offsets[number] if offsets is not None else None)
        for event in dict.fromkeys(Event.make(*event) for event in document.events):
            link_head = schema.type_id(event.type) if typed else 0
            nodes = []
            for argument in event.arguments:
                label = schema.label_id(event.type, argument.role)
                start, end = first.get(argument.start), last.get(argument.end)
                if start is None or end is None or start > end:
                    inside = first and min(first) <= argument.start and argument.end <= max(last)
                    reason = "not on token boundaries" if inside else "outside the tokens"
                    dropped.append(Dropped(number, event, argument, reason))
                    continue
                nodes.append((start, end))
                spans.add((number, label, start, end))
            for (h1, t1), (h2, t2) in combinations(nodes, 2):
                heads.add((number, link_head, min(h1, h2), max(h1, h2)))
                tails.add((number, link_head, min(t1, t2), max(t1, t2)))
    return EventLabels(_rows(spans), _rows(heads), _rows(tails), dropped)


def split_windows(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """Windows (start, stop) of at most `size` tokens that cover `length` tokens.

    Neighbours share at least `overlap` tokens; the last window is moved back to be full.

    >>> split_windows(10, 6, 2), split_windows(11, 6, 2), split_windows(4, 6, 2)
    ([(0, 6), (4, 10)], [(0, 6), (4, 10), (5, 11)], [(0, 4)])
    """
    require(
        0 <= overlap < size, "events", f"overlap is {overlap}, expected 0 <= overlap < size={size}"
    )
    starts = range(0, max(length - overlap, 1), size - overlap)
    return [(max(0, min(start, length - size)), min(start + size, length)) for start in starts]


class WindowedDocument(NamedTuple):
    """A document in pieces: `documents[i]` is the text from character `starts[i]`.

    split: the events that no window holds whole; their arguments are spread over the windows.
    dropped: the (event, argument) pairs that no window holds.
    """

    documents: list[Document]
    starts: list[int]
    split: list[Event]
    dropped: list[tuple[Event, Argument]]


def split_document(document: Document, windows: Sequence[tuple[int, int]]) -> WindowedDocument:
    """Cut a document into `windows`, (start, stop) in characters, which may overlap.

    An event goes, with offsets into the window's text, to each window that holds it whole. Where
    none does, each window gets those of its arguments that it holds.

    >>> event = Event.make("sale", [("seller", 0, 3), ("trigger", 4, 9)])
    >>> pieces = split_document(Document("Ann sells.", [event]), [(0, 8), (4, 10)])
    >>> [piece.text for piece in pieces.documents], len(pieces.split), len(pieces.dropped)
    (['Ann sell', 'sells.'], 1, 0)
    >>> pieces.documents[1].events
    [Event(type='sale', arguments=(Argument(role='trigger', start=0, end=5),))]
    """
    pieces = [Document(document.text[start:stop], [], document.id) for start, stop in windows]
    split, dropped = [], []
    for event in dict.fromkeys(Event.make(*event) for event in document.events):
        held = [
            [a for a in event.arguments if start <= a.start and a.end <= stop]
            for start, stop in windows
        ]
        whole = any(len(arguments) == len(event.arguments) for arguments in held)
        if not whole:
            split.append(event)
            found = set().union(*held)
            dropped += [(event, a) for a in event.arguments if a not in found]
        for piece, (start, _), arguments in zip(pieces, windows, held, strict=True):
            if arguments and (not whole or len(arguments) == len(event.arguments)):
                piece.events.append(_shift(Event(event.type, tuple(arguments)), -start))
    return WindowedDocument(pieces, [start for start, _ in windows], split, dropped)


def merge_windows(
    events: Sequence[Sequence[Event]], windows: Sequence[tuple[int, int]]
) -> list[Event]:
    """The events of a document from those of its windows: the inverse of `split_document`.

    `events[i]` are those found in window `windows[i]`, (start, stop) in characters, with offsets
    into the window. Events found twice stay once; an event whose arguments are all in a larger
    event of its type from another window was cut off by a border and goes.

    >>> cut, whole = Event.make("sale", [("seller", 2, 4)]), [("seller", 0, 2), ("trigger", 3, 5)]
    >>> merge_windows([[cut], [Event.make("sale", whole)]], [(0, 5), (2, 9)]) == [
    ...     Event.make("sale", [("seller", 2, 4), ("trigger", 5, 7)])]
    True
    """
    require(
        len(events) == len(windows),
        "events.merge_windows",
        f"events has {len(events)} entries, expected {len(windows)} (from windows)",
    )
    shifted = [
        [_shift(event, start) for event in of_window]
        for of_window, (start, _) in zip(events, windows, strict=True)
    ]
    if len(shifted) == 1:
        return sorted(set(shifted[0]))
    found = [
        (number, event, set(event.arguments))
        for number, of_window in enumerate(shifted)
        for event in of_window
    ]
    return sorted(
        {
            event
            for number, event, arguments in found
            if not any(
                number != other_number and event.type == other.type and arguments < larger
                for other_number, other, larger in found
            )
        }
    )


def _token_maps(text: str, offsets: Offsets | None) -> tuple[dict[int, int], dict[int, int]]:
    """Token that begins at a character, token that ends at one (end exclusive)."""
    if offsets is None:
        offsets = [(i, i + 1) for i in range(len(text))]
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for token, (start, end) in enumerate(offsets):
        if end > start:
            first.setdefault(start, token)  # several tokens may share one character
            last[end] = token
    return first, last


def _rows(rows: set[tuple[int, int, int, int]]) -> torch.Tensor:
    return torch.tensor(sorted(rows), dtype=torch.int64).reshape(-1, 4)


def _shift(event: Event, by: int) -> Event:
    if by == 0:
        return event
    return Event(event.type, tuple(Argument(r, s + by, e + by) for r, s, e in event.arguments))
