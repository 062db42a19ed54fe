"""GPLinker's network: an encoder of characters or words, and three Efficient GlobalPointer heads over it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from supy.events.labels import EventLabels
from supy.events.schema import EventSchema
from supy.nn import EfficientGlobalPointer, GatedAttentionUnit


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of :class:`GAUEncoder`, the encoder that is trained from scratch, and what it drops while training.

    dropout: of what a unit adds; outer_dropout: of the embeddings and of the result. Characters and pairs are replaced by
    the unknown one with their probability, so that the unknown ones are trained too; naming the characters that were
    replaced is part of the loss, times ``restoring``.
    """

    width: int = 256
    layers: int = 4
    value_size: int = 512
    key_size: int = 64
    pair_size: int = 64
    dropout: float = 0.15
    outer_dropout: float = 0.25
    character_dropout: float = 0.1
    pair_dropout: float = 0.2
    restoring: float = 0.5


class GAUEncoder(nn.Module):
    """Embeddings of characters and of pairs of them, and a stack of gated attention units, pre-norm.

    Words are what a small training set does not teach an attention layer, so two things bring them in: a pair of
    neighbouring characters has an embedding of its own, and before each unit a quarter of the channels comes from the
    character before and a quarter from the one after.

    Args:
        vocabulary: number of characters. pairs: sorted int64 codes ``first * vocabulary + second`` of the known pairs.
    """

    UNKNOWN = 1

    def __init__(self, vocabulary: int, pairs: torch.Tensor, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.register_buffer("pairs", pairs)
        self.characters = nn.Embedding(vocabulary, config.width)
        self.pair_embedding = nn.Embedding(len(pairs) + 1, config.pair_size)  # the last: unknown
        self.pair_projection = nn.Linear(config.pair_size, config.width, bias=False)
        nn.init.normal_(self.pair_projection.weight, std=config.pair_size**-0.5)
        self.units = nn.ModuleList(
            GatedAttentionUnit(config.width, value_size=config.value_size, key_size=config.key_size)
            for _ in range(config.layers)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(config.width) for _ in range(config.layers + 1))
        self.restore = nn.Linear(config.width, vocabulary)
        nn.init.normal_(self.restore.weight, std=0.02)
        with torch.no_grad():
            for unit in self.units:  # the sum of all branches keeps the size of one
                unit.project_out.weight /= config.layers**0.5

    @property
    def width(self) -> int:
        return self.config.width

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """ids int64 `[B, T]`, lengths int64 `[B]`: `[B, T, width]`."""
        visible = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        pairs = self._replace(self._pair_numbers(ids), self.config.pair_dropout, len(self.pairs))
        x = self.characters(ids) + self.pair_projection(self.pair_embedding(pairs)).float()
        x = self._dropout(F.rms_norm(x, (self.width,)), self.config.outer_dropout)
        for norm, unit in zip(self.norms, self.units):
            branch = unit(_shift(norm(x), visible), lengths=lengths)
            x = x + self._dropout(branch, self.config.dropout)
        return self._dropout(self.norms[-1](x), self.config.outer_dropout)

    def hide(self, ids: torch.Tensor) -> torch.Tensor:
        """``ids`` with some characters unknown, and so the pairs that they are in."""
        return self._replace(ids, self.config.character_dropout, self.UNKNOWN)

    def restoring_loss(
        self, hidden: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor, hidden_ids: torch.Tensor
    ) -> torch.Tensor:
        """Of naming the characters that `hide` replaced: they teach words that the few labels do not."""
        visible = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        replaced = visible & (ids != hidden_ids)
        loss = F.cross_entropy(self.restore(hidden[replaced]), ids[replaced], reduction="sum")
        return self.config.restoring * loss / len(ids)

    def _pair_numbers(self, ids: torch.Tensor) -> torch.Tensor:
        """The number of the pair that each character forms with the next, ``len(pairs)`` for an unknown one."""
        code = ids * self.characters.num_embeddings + F.pad(ids[:, 1:], (0, 1))[:, : ids.shape[1]]
        place = torch.searchsorted(self.pairs, code)
        known = F.pad(self.pairs, (0, 1), value=-1)[place] == code
        return place.masked_fill(~known, len(self.pairs))

    def _replace(self, ids: torch.Tensor, probability: float, by: int) -> torch.Tensor:
        if not self.training or probability == 0:
            return ids
        return ids.masked_fill(torch.rand(ids.shape, device=ids.device) < probability, by)

    def _dropout(self, x: torch.Tensor, probability: float) -> torch.Tensor:
        if not self.training or probability == 0:
            return x
        # A random byte a number, eight at a time: on a CPU torch's own draws them one by one, a tenth of a training step.
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device)
        noise = words.random_(-(2**63), None).view(torch.uint8)[: x.numel()].view(x.shape)
        dropped = round(256 * probability)
        return x * (noise >= dropped) * (256 / (256 - dropped))


def _shift(x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """A quarter of the channels from the token before, a quarter from the token after."""
    x = x * visible[..., None]
    quarter = x.shape[-1] // 4
    before = F.pad(x[..., :quarter], (0, 0, 1, 0))[:, :-1]
    after = F.pad(x[..., quarter : 2 * quarter], (0, 0, 0, 1))[:, 1:]
    return torch.cat([before, after, x[..., 2 * quarter :]], -1)


class PretrainedEncoder(nn.Module):
    """Any Hugging Face ``AutoModel`` that returns a last hidden state."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        return self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state

    def hide(self, ids: torch.Tensor) -> torch.Tensor:
        return ids

    def restoring_loss(self, *_) -> float:
        """None: pre-training has taught the words."""
        return 0.0


class EventModel(nn.Module):
    """Spans labelled (event type, role), and links between the first and the last tokens of two spans of one event.

    Links are symmetric, so their heads see only pairs (min, max), and know no distance: they have no rotary positions
    (kexue.fm post 8926). ``typed`` gives each event type link heads of its own; the published method has one.
    """

    def __init__(self, encoder: nn.Module, schema: EventSchema, *, typed: bool = True):
        super().__init__()
        self.encoder, self.schema, self.typed = encoder, schema, typed
        width, links = encoder.width, len(schema.types) if typed else 1
        self.spans = EfficientGlobalPointer(width, len(schema))
        self.head_links = EfficientGlobalPointer(width, links, rotary=False)
        self.tail_links = EfficientGlobalPointer(width, links, rotary=False)
        for pointer in (self.spans, self.head_links, self.tail_links):
            nn.init.constant_(pointer.biases.bias, -1.0)  # begins with few positives, as there are

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """ids int64 `[B, T]`, lengths int64 `[B]`: hidden states `[B, T, width]`, for `loss` and `decode`."""
        return self.encoder(ids, lengths)

    def loss(
        self, hidden: torch.Tensor, lengths: torch.Tensor, labels: EventLabels
    ) -> torch.Tensor:
        """The sum of the three heads' losses, each a mean over the batch of a sum over its heads.

        Links are only ever asked for between spans, so that is where they are trained: between tokens that begin (end) one.
        """
        spans, head_links, tail_links = (rows.to(hidden.device) for rows in labels[:3])
        first, last = _ends(spans, hidden)
        return (
            self.spans.loss(hidden, spans, lengths=lengths)
            + self.head_links.loss(hidden, head_links, lengths=lengths, among=first)
            + self.tail_links.loss(hidden, tail_links, lengths=lengths, among=last)
        )

    @torch.no_grad()
    def predict(
        self, hidden: torch.Tensor, lengths: torch.Tensor, thresholds: tuple[float, float]
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """(rows, scores) of the spans, head links and tail links above the thresholds (of spans, of links).

        Where spans of one label overlap, the best one stays.
        """
        span, link = thresholds
        spans = without_overlaps(*self.spans.spans(hidden, threshold=span, lengths=lengths))
        first, last = _ends(spans[0], hidden)
        return (
            spans,
            self.head_links.spans(hidden, threshold=link, lengths=lengths, among=first),
            self.tail_links.spans(hidden, threshold=link, lengths=lengths, among=last),
        )


def without_overlaps(
    spans: torch.Tensor, scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Leaves out a span that overlaps a better one of its label: two guesses of where one argument ends."""
    taken: dict[tuple[int, int], set[int]] = defaultdict(set)
    kept = torch.zeros(len(spans), dtype=torch.bool)
    order = scores.argsort(descending=True, stable=True)
    for place, (document, label, first, last) in zip(order.tolist(), spans[order].tolist()):
        tokens = range(first, last + 1)
        if taken[document, label].isdisjoint(tokens):
            taken[document, label].update(tokens)
            kept[place] = True
    return spans[kept], scores[kept]


def _ends(spans: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool `[B, T]` each: the tokens that begin a span, and those that end one."""
    document, _, first, last = spans.unbind(1)
    marks = torch.zeros(2, *hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    marks[0, document, first] = True
    marks[1, document, last] = True
    return marks[0], marks[1]
