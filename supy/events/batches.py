"""Documents as batches of windows, and predictions of windows as events of documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import torch

from supy.events.data import Document, Event
from supy.events.decode import decode_batch
from supy.events.labels import merge_windows, split_document, split_windows
from supy.events.metrics import evaluate
from supy.events.model import EventModel
from supy.events.tokens import CharTokenizer, PretrainedTokenizer, Tokens

Tokenizer = CharTokenizer | PretrainedTokenizer

THRESHOLDS = (0.0, -4.0)
"""Of spans and of links, while training and unless :meth:`Predictor.tune` finds better ones. A missing link splits an
event, so where links are hard to learn they do best well below 0."""
LINK_THRESHOLDS, MARGIN = (-6.0, -4.0, -2.0, 0.0), 0.02
"""What `tune` tries, and by how much the sum of both F1 must grow: less is noise on a few hundred sentences, and to choose
by it costs more than it brings (benchmarks/NOTES.md)."""
MOST_EVENTS = 200
"""Of one type in one window. Annotated sentences have 23 at most; a model in its first epochs may find any number."""


class Window(NamedTuple):
    """What fits into the encoder at once: a document or, if that is longer, a part of it."""

    number: int  # of the document
    characters: tuple[int, int]  # the part of the text, end exclusive
    document: Document  # that part, with the events it holds, at offsets into the part
    tokens: Tokens


class Windows(NamedTuple):
    """All windows of some documents; what the cutting lost is counted, never silent."""

    windows: list[Window]
    split_events: int  # that no window holds whole
    lost_arguments: int  # longer than a window


def make_windows(
    documents: Sequence[Document], tokenizer: Tokenizer, *, size: int, overlap: int
) -> Windows:
    """Cuts each document into overlapping windows of at most ``size`` tokens, those of the tokenizer included."""
    windows, split, lost = [], 0, 0
    room = size - tokenizer.specials
    for number, document in enumerate(documents):
        tokens = tokenizer(document.text)
        if len(tokens.ids) <= size:
            windows.append(Window(number, (0, len(document.text)), document, tokens))
            continue
        real = [pair for pair in tokens.offsets if pair[1] > pair[0]]
        parts = [
            (real[start][0], real[stop - 1][1])
            for start, stop in split_windows(len(real), room, min(overlap, room - 1))
        ]
        pieces = split_document(document, parts)
        split += len(pieces.split)
        lost += len(pieces.dropped)
        windows += [
            Window(number, part, piece, _at_most(tokenizer(piece.text), size))
            for part, piece in zip(parts, pieces.documents, strict=True)
        ]
    return Windows(windows, split, lost)


def _at_most(tokens: Tokens, size: int) -> Tokens:
    # Cutting a text between two of its tokens can change how the pieces tokenise, by a token or so.
    return Tokens(tokens.ids[:size], tokens.offsets[:size])


def bucketed(
    windows: Sequence[Window], batch_size: int, random: Random | None = None
) -> list[list[Window]]:
    """Batches of windows of like length, so that little is padded; shuffled with ``random``.

    A batch has at most ``batch_size`` windows and 256 tokens for each of them: fewer windows where they are long.
    """
    jitter = random.random if random else lambda: 0.0
    order = sorted(windows, key=lambda window: len(window.tokens.ids) + 16 * jitter())
    batches: list[list[Window]] = []
    for window in order:
        size = len(batches[-1]) + 1 if batches else 0
        fits = 0 < size <= batch_size and size * len(window.tokens.ids) <= 256 * batch_size
        if fits:
            batches[-1].append(window)
        else:
            batches.append([window])
    if random:
        random.shuffle(batches)
    return batches


def collate(
    batch: Sequence[Window], padding: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids int64 `[B, T]` and lengths int64 `[B]`."""
    rows = [torch.tensor(window.tokens.ids, dtype=torch.int64) for window in batch]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
    return ids.to(device), lengths.to(device)


@dataclass(frozen=True)
class Predictor:
    """What turns documents into events: a model in eval mode, and how to feed it."""

    model: EventModel
    tokenizer: Tokenizer
    size: int  # of a window, in tokens
    overlap: int
    bf16: bool

    def __call__(
        self,
        documents: Sequence[Document],
        thresholds: tuple[float, float] = THRESHOLDS,
        undecoded: list[tuple[int, str]] | None = None,
    ) -> list[list[Event]]:
        """The events of each document. undecoded: collects (document, event type) with too many to decode."""
        batches = self._batches(documents, thresholds)
        return self._events(len(documents), batches, thresholds, undecoded)

    def tune(self, documents: Sequence[Document]) -> tuple[float, float]:
        """Thresholds for documents like these: the usual ones, unless other links are clearly better."""
        span, usual = THRESHOLDS
        batches = list(self._batches(documents, (span, min(LINK_THRESHOLDS))))

        def total(link):
            scores = evaluate(documents, self._events(len(documents), batches, (span, link)))
            return scores.event.f1 + scores.argument.f1

        totals = {link: total(link) for link in LINK_THRESHOLDS}
        best = max(totals, key=totals.get)
        return span, best if totals[best] > totals[usual] + MARGIN else usual

    @torch.inference_mode()
    def _batches(self, documents, thresholds):
        device = next(self.model.parameters()).device
        windows = make_windows(documents, self.tokenizer, size=self.size, overlap=self.overlap)
        for batch in bucketed(windows.windows, 32):
            ids, lengths = collate(batch, self.tokenizer.PADDING, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                hidden = self.model(ids, lengths)
            yield batch, self.model.predict(hidden, lengths, thresholds)

    def _events(self, count, batches, thresholds, undecoded=None) -> list[list[Event]]:
        span, link = thresholds
        found: list[list[tuple[tuple[int, int], list[Event]]]] = [[] for _ in range(count)]
        for batch, rows in batches:
            failed: list[tuple[int, str]] = []
            decoded = decode_batch(
                *(table[scores > t] for (table, scores), t in zip(rows, (span, link, link))),
                self.model.schema,
                len(batch),
                typed=self.model.typed,
                offsets=[window.tokens.offsets for window in batch],
                limit=MOST_EVENTS,
                undecoded=failed,
            )
            if undecoded is not None:
                undecoded += [(batch[place].number, type) for place, type in failed]
            for window, events in zip(batch, decoded, strict=True):
                found[window.number].append((window.characters, events))
        return [
            merge_windows([events for _, events in parts], [part for part, _ in parts])
            for parts in found
        ]
