"""GPLinker's network: an encoder of characters or words, and three Efficient GlobalPointer heads over it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from supy.events.labels import EventLabels
from supy.events.schema import EventSchema
from supy.nn import EfficientGlobalPointer, GatedAttentionUnit


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of :class:`GAUEncoder`, the encoder that is trained from scratch."""

    width: int = 256
    layers: int = 4
    value_size: int = 512
    key_size: int = 64
    dropout: float = 0.1
    character_dropout: float = 0.05


class GAUEncoder(nn.Module):
    """Character embeddings and a stack of gated attention units, pre-norm.

    Before each unit a quarter of the channels comes from the previous character and a quarter from the next: words are
    local, and learning that from two thousand sentences by attention alone is hard.
    """

    def __init__(self, vocabulary: int, config: EncoderConfig, unknown: int = 1):
        super().__init__()
        self.config, self.unknown = config, unknown
        self.embedding = nn.Embedding(vocabulary, config.width)
        self.units = nn.ModuleList(
            GatedAttentionUnit(
                config.width, value_size=config.value_size, key_size=config.key_size
            )
            for _ in range(config.layers)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(config.width) for _ in range(config.layers + 1))
        with torch.no_grad():
            for unit in self.units:  # the sum of all branches keeps the size of one
                unit.project_out.weight /= config.layers**0.5

    @property
    def width(self) -> int:
        return self.config.width

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """ids int64 `[B, T]`, lengths int64 `[B]`: `[B, T, width]`."""
        visible = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        if self.training and self.config.character_dropout:
            dropped = torch.rand(ids.shape, device=ids.device) < self.config.character_dropout
            ids = ids.masked_fill(dropped & visible, self.unknown)
        x = F.rms_norm(self.embedding(ids), (self.width,))
        x = self._dropout(x)
        for norm, unit in zip(self.norms, self.units):
            x = x + self._dropout(unit(_shift(norm(x), visible), lengths=lengths).float())
        return self._dropout(self.norms[-1](x))

    def _dropout(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.config.dropout, self.training)


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
        """The sum of the three heads' losses, each a mean over the batch of a sum over its heads."""
        return sum(
            pointer.loss(hidden, rows, lengths=lengths)
            for pointer, rows in (
                (self.spans, labels.spans),
                (self.head_links, labels.head_links),
                (self.tail_links, labels.tail_links),
            )
        )

    @torch.no_grad()
    def predict(
        self, hidden: torch.Tensor, lengths: torch.Tensor, thresholds: tuple[float, float]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Spans, head links and tail links above the two thresholds (spans, links), for `decode_batch`."""
        span, link = thresholds
        return (
            self.spans.spans(hidden, threshold=span, lengths=lengths)[0],
            self.head_links.spans(hidden, threshold=link, lengths=lengths)[0],
            self.tail_links.spans(hidden, threshold=link, lengths=lengths)[0],
        )
