"""Documents as batches of windows, and predictions of windows as events of documents."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import torch

from supy.events.data import Document, Event
from supy.events.decode import decode_batch
from supy.events.labels import merge_windows, split_document, split_windows
from supy.events.model import EventModel
from supy.events.tokens import CharTokenizer, PretrainedTokenizer, Tokens

Tokenizer = CharTokenizer | PretrainedTokenizer


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
    """Batches of windows of like length, so that little is padded; shuffled with ``random``."""
    jitter = random.random if random else lambda: 0.0
    order = sorted(windows, key=lambda window: len(window.tokens.ids) + 16 * jitter())
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
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


@torch.inference_mode()
def predict(
    model: EventModel,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    thresholds: tuple[float, float],
    size: int,
    overlap: int,
    bf16: bool = False,
    batch_size: int = 32,
) -> list[list[Event]]:
    """The events of each document. The model must be in eval mode."""
    device = next(model.parameters()).device
    windows = make_windows(documents, tokenizer, size=size, overlap=overlap).windows
    found: list[list[tuple[tuple[int, int], list[Event]]]] = [[] for _ in documents]
    for batch in bucketed(windows, batch_size):
        ids, lengths = collate(batch, tokenizer.PADDING, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            hidden = model(ids, lengths)
        decoded = decode_batch(
            *model.predict(hidden, lengths, thresholds),
            model.schema,
            len(batch),
            typed=model.typed,
            offsets=[window.tokens.offsets for window in batch],
        )
        for window, events in zip(batch, decoded, strict=True):
            found[window.number].append((window.characters, events))
    return [
        merge_windows([events for _, events in parts], [part for part, _ in parts])
        for parts in found
    ]
