"""From spans and links back to events: each maximal clique of linked arguments is an event."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch

from supy._checks import require
from supy.events.data import Argument, Event
from supy.events.labels import Offsets
from supy.events.schema import TRIGGER, EventSchema
from supy.ops import CliqueLimitError, batched_maximal_cliques

log = logging.getLogger(__name__)

MAX_NODES = 512
"""Arguments of one event type in one document that are decoded; gold data has 35 at most, and only
a model that predicts spans everywhere, as an untrained one does, has more."""

Table = torch.Tensor | Sequence[Sequence[int]]


def decode(
    spans: Table,
    links: tuple[Table, Table],
    schema: EventSchema,
    *,
    typed: bool = False,
    offsets: Offsets | None = None,
    require_trigger: bool = False,
    drop_subsets: bool = False,
    limit: int | None = 100_000,
) -> list[Event]:
    """The events of one document: `decode_batch` without the column of document numbers.

    spans: int64 `[N, 3]` rows (label, first token, last token), tokens inclusive.
    links: `(head_links, tail_links)`, int64 `[M, 3]` rows (link head, min, max).

    >>> schema = EventSchema([("sale", "buyer"), ("sale", "seller"), ("sale", "trigger")])
    >>> spans = [[0, 10, 12], [1, 0, 2], [2, 4, 8]]
    >>> links = [[0, 0, 4], [0, 4, 10], [0, 0, 10]], [[0, 2, 8], [0, 8, 12]]
    >>> for event in decode(spans, links, schema):  # seller and buyer lack their tail link
    ...     print([tuple(argument) for argument in event.arguments])
    [('buyer', 10, 13), ('trigger', 4, 9)]
    [('seller', 0, 3), ('trigger', 4, 9)]
    """
    head_links, tail_links = links
    tables = (
        torch.nn.functional.pad(_table(name, table, ("head", "first", "last")), (1, 0))
        for name, table in (("spans", spans), ("head_links", head_links), ("tail_links", tail_links))
    )
    return decode_batch(
        *tables,
        schema,
        1,
        typed=typed,
        offsets=None if offsets is None else [offsets],
        require_trigger=require_trigger,
        drop_subsets=drop_subsets,
        limit=limit,
    )[0]


def decode_batch(
    spans: Table,
    head_links: Table,
    tail_links: Table,
    schema: EventSchema,
    num_documents: int,
    *,
    typed: bool = False,
    offsets: Sequence[Offsets] | None = None,
    require_trigger: bool = False,
    drop_subsets: bool = False,
    limit: int | None = 100_000,
) -> list[list[Event]]:
    """The events of each document of a batch: the inverse of `encode` (kexue.fm/archives/8926).

    The nodes of a graph are the distinct (role, span) of one event type in one document; two are
    joined when the pair of their first tokens is a head link and that of their last tokens a tail
    link, and each maximal clique is an event. Two roles on one span are two nodes, which their
    diagonal cells join; no node stands in a clique twice, as it did in the published search.

    spans: int64 `[N, 4]` rows (document, label, first token, last token), tokens inclusive.
    head_links, tail_links: int64 `[M, 4]` rows (document, link head, min, max); the link head is 0,
    or with `typed=True` the event type's place in `schema.types`.
    offsets: for each document its tokens' (start, end) characters; without, tokens are characters.
    require_trigger: leave out events without a trigger.
    drop_subsets: leave out an event whose arguments, trigger aside, are all arguments of another
    event of its type.
    limit: a graph of more cliques, or of more than 512 nodes, gives no events and one warning in
    the log; the document's other types and the other documents are not affected.

    Events have character offsets, end exclusive, and come sorted, with sorted arguments.
    """
    num_heads = len(schema.types) if typed else 1
    spans = _table("spans", spans, num_documents, "label", len(schema))
    heads = _table("head_links", head_links, num_documents, "link head", num_heads)
    tails = _table("tail_links", tail_links, num_documents, "link head", num_heads)
    nodes = _nodes(spans, schema)
    edges, edge_counts = _edges(nodes, heads, tails, typed)
    clique_graph, cliques = _cliques(nodes, edges, edge_counts, schema, limit)

    arguments = _arguments(nodes, schema, offsets)
    type_ids, documents = nodes.type_id.tolist(), nodes.document.tolist()
    events: list[list[Event]] = [[] for _ in range(num_documents)]
    for clique in cliques:
        found = tuple([arguments[node] for node in clique])
        if not require_trigger or any(argument.role == TRIGGER for argument in found):
            node = clique[0]
            events[documents[node]].append(Event(schema.types[type_ids[node]], found))
    return [_without_subsets(of) for of in events] if drop_subsets else events


class _Nodes(NamedTuple):
    """The nodes of all graphs, `[N]` each, graph after graph; G graphs."""

    document: torch.Tensor
    label: torch.Tensor
    type_id: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    graph: torch.Tensor
    counts: torch.Tensor  # [G] nodes of each graph
    starts: torch.Tensor  # [G] its first node


def _nodes(spans: torch.Tensor, schema: EventSchema) -> _Nodes:
    # Ranks sort as the names (type, role) do: a graph's nodes come side by side, and ascending
    # cliques in lexicographic order are sorted events with sorted arguments.
    by_name = torch.tensor(sorted(range(len(schema)), key=schema.labels.__getitem__))
    spans = torch.stack((spans[:, 0], by_name.argsort()[spans[:, 1]], spans[:, 2], spans[:, 3]), 1)
    document, rank, first, last = torch.unique(spans, dim=0).unbind(1)
    label = by_name[rank]
    type_id = torch.tensor([schema.type_id(type) for type, _ in schema.labels])[label]
    _, graph, counts = torch.unique_consecutive(
        document * len(schema.types) + type_id, return_inverse=True, return_counts=True
    )
    starts = counts.cumsum(0) - counts
    return _Nodes(document, label, type_id, first, last, graph, counts, starts)


def _edges(
    nodes: _Nodes, heads: torch.Tensor, tails: torch.Tensor, typed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Edges `[M, 2]` in node numbers local to each graph, graph after graph, and the number of
    each graph's edges `[G]`. A graph of more than MAX_NODES nodes gets none."""
    head_of = nodes.type_id if typed else torch.zeros_like(nodes.type_id)
    positions = torch.cat((heads[:, 2:], tails[:, 2:])).flatten()
    size = int(positions.max()) + 1 if len(positions) else 1
    head_keys = _link_keys(*heads.unbind(1), size)
    tail_keys = _link_keys(*tails.unbind(1), size)
    partners = nodes.starts[nodes.graph] + nodes.counts[nodes.graph] - 1
    ...
