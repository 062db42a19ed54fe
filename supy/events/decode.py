"""From spans and links back to events: each maximal clique of linked arguments is an event."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from supy._checks import require
from supy.events.data import Argument, Event
from supy.events.labels import Offsets
from supy.events.schema import TRIGGER, EventSchema
from supy.ops import CliqueLimitError, batched_maximal_cliques

log = logging.getLogger(__name__)

MAX_NODES = 256
"""The most arguments of one event type in one document that are decoded. Gold data has 35 at most;
only a model that predicts spans everywhere, as an untrained one does, has more."""

# A row is packed into one integer of 63 bits: 27 for document and head, 18 for each position.
MAX_POSITION = 2**18
MAX_HEADS = 2**27

Table = torch.Tensor | np.ndarray | Sequence[Sequence[int]]


def decode(
    spans: Table,
    links: tuple[Table, Table],
    schema: EventSchema,
    *,
    typed: bool = False,
    offsets: Offsets | None = None,
    require_trigger: bool = False,
    drop_subsets: bool = False,
    limit: int | None = 1_000,
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
    spans, head_links, tail_links = (
        np.pad(_rows(name, table, 3), ((0, 0), (1, 0)))
        for name, table in (("spans", spans), ("head_links", links[0]), ("tail_links", links[1]))
    )
    return decode_batch(
        spans,
        head_links,
        tail_links,
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
    limit: int | None = 1_000,
    undecoded: list[tuple[int, str]] | None = None,
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
    Spans that begin or end with a token without characters, such as [CLS], are left out.
    require_trigger: leave out events without a trigger.
    drop_subsets: leave out an event whose arguments, trigger aside, are all arguments of another
    event of its type.
    limit: a graph of more cliques, or of more than 256 nodes, gives no events, and the log gets one
    warning a call; the document's other types and the other documents are not affected.
    undecoded: collects these (document, event type) instead of the warning.

    Events have character offsets, end exclusive, and come sorted, with sorted arguments.
    """
    num_heads = len(schema.types) if typed else 1
    span_keys = _keys("spans", spans, num_documents, "label", len(schema))
    head_keys = _keys("head_links", head_links, num_documents, "link head", num_heads)
    tail_keys = _keys("tail_links", tail_links, num_documents, "link head", num_heads)
    if offsets is not None:
        span_keys = _with_characters(span_keys, len(schema), num_documents, offsets)
    skipped: list[tuple[int, int]] = []
    nodes = _nodes(span_keys, schema, skipped)
    edges, edge_offsets = _edges(nodes, head_keys, tail_keys, num_heads)
    every_graph = range(len(nodes.graph_sizes))

    arguments = _arguments(nodes, schema, offsets)
    documents, types = nodes.document.tolist(), [schema.types[i] for i in nodes.type_id.tolist()]
    events: list[list[Event]] = [[] for _ in range(num_documents)]
    for clique in _cliques(nodes, edges, edge_offsets, every_graph, limit, skipped):
        event = Event(types[clique[0]], tuple([arguments[node] for node in clique]))
        if not require_trigger or any(argument.role == TRIGGER for argument in event.arguments):
            events[documents[clique[0]]].append(event)
    if offsets is not None:  # tokens that share a character give the same argument twice
        events = [sorted({Event.make(*event) for event in found}) for found in events]
    if undecoded is not None:
        undecoded += [(int(document), schema.types[type_id]) for document, type_id in skipped]
    elif skipped:
        log.warning(
            "%d times a document has more than %d arguments or %s events of one type, and none of "
            "that type is decoded; first: document %d, type %s",
            len(skipped),
            MAX_NODES,
            limit,
            skipped[0][0],
            schema.types[skipped[0][1]],
        )
    return [_without_subsets(found) for found in events] if drop_subsets else events


class _Nodes(NamedTuple):
    """The nodes of G graphs, graph after graph: `[N]` each, the last two `[G]`."""

    document: np.ndarray
    label: np.ndarray
    type_id: np.ndarray
    first: np.ndarray
    last: np.ndarray
    graph: np.ndarray
    graph_sizes: np.ndarray
    graph_starts: np.ndarray


def _nodes(
    span_keys: np.ndarray, schema: EventSchema, skipped: list[tuple[int, int]]
) -> _Nodes:
    type_of = np.array([schema.type_id(type) for type, _ in schema.labels])
    # Ranks sort as the names (type, role) do. So a graph's nodes stand side by side, and ascending
    # cliques in lexicographic order are sorted events with sorted arguments.
    by_name = np.array(sorted(range(len(schema)), key=schema.labels.__getitem__))
    document, label, first, last = _unpack(span_keys, len(schema))
    ranked = _pack(document, by_name.argsort()[label], first, last, len(schema))
    document, rank, first, last = _unpack(np.unique(ranked), len(schema))
    label = by_name[rank]
    type_id = type_of[label]
    new_graph = np.diff(document * len(schema.types) + type_id, prepend=-1) != 0
    graph, starts = new_graph.cumsum() - 1, new_graph.nonzero()[0]
    sizes = np.diff(starts, append=len(graph))
    if (sizes > MAX_NODES).any():
        skipped += [(document[node], type_id[node]) for node in starts[sizes > MAX_NODES]]
        small = sizes[graph] <= MAX_NODES
        kept = (column[small] for column in (document, label, first, last))
        return _nodes(_pack(*kept, len(schema)), schema, skipped)
    return _Nodes(document, label, type_id, first, last, graph, sizes, starts)


def _edges(
    nodes: _Nodes, head_keys: np.ndarray, tail_keys: np.ndarray, num_heads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Edges `[M, 2]` in each graph's own node numbers, graph after graph, and offsets `[G + 1]`."""
    stops = (nodes.graph_starts + nodes.graph_sizes)[nodes.graph]
    link_head = nodes.type_id if num_heads > 1 else np.zeros_like(nodes.type_id)
    found = [np.empty((0, 2), np.int64)]
    for begin in range(0, len(stops), 4096):  # at most 4096 * MAX_NODES pairs at a time
        nodes_here = np.arange(begin, min(begin + 4096, len(stops)))
        later = stops[nodes_here] - nodes_here - 1  # a node is paired with those after it
        a = nodes_here.repeat(later)
        b = np.arange(len(a)) + (nodes_here + 1 - (later.cumsum() - later)).repeat(later)
        for position, link_keys in ((nodes.first, head_keys), (nodes.last, tail_keys)):
            low, high = np.minimum(position[a], position[b]), np.maximum(position[a], position[b])
            keys = _pack(nodes.document[a], link_head[a], low, high, num_heads)
            linked = np.isin(keys, link_keys)
            a, b = a[linked], b[linked]
        found.append(np.stack((a, b), 1))
    edges = np.concatenate(found)
    graph = nodes.graph[edges[:, 0]]
    counts = np.bincount(graph, minlength=len(nodes.graph_sizes))
    return edges - nodes.graph_starts[graph, None], np.append(0, counts.cumsum())


def _cliques(
    nodes: _Nodes,
    edges: np.ndarray,
    edge_offsets: np.ndarray,
    graphs: range,
    limit: int | None,
    skipped: list[tuple[int, int]],
) -> list[list[int]]:
    """The cliques of `graphs`, one after the other, as lists of places in `nodes`."""
    low, high = graphs.start, graphs.stop
    begin, stop = edge_offsets[low], edge_offsets[high]
    arrays = edges[begin:stop], edge_offsets[low : high + 1] - begin, nodes.graph_sizes[low:high]
    try:
        cliques = batched_maximal_cliques(*map(torch.from_numpy, arrays), limit=limit)
    except CliqueLimitError:  # rare: halve until the graphs that exceed it stand alone
        if len(graphs) == 1:
            node = nodes.graph_starts[low]
            skipped.append((nodes.document[node], nodes.type_id[node]))
            return []
        middle = (low + high) // 2
        return [
            clique
            for half in (range(low, middle), range(middle, high))
            for clique in _cliques(nodes, edges, edge_offsets, half, limit, skipped)
        ]
    clique_offsets, offsets, members = (tensor.numpy() for tensor in cliques)
    start_of_clique = nodes.graph_starts[low:high].repeat(np.diff(clique_offsets))
    members = (members + start_of_clique.repeat(np.diff(offsets))).tolist()
    return [members[begin:stop] for begin, stop in pairwise(offsets.tolist())]


def _arguments(
    nodes: _Nodes, schema: EventSchema, offsets: Sequence[Offsets] | None
) -> list[Argument]:
    """Each node as an argument, in characters."""
    columns = (nodes.document, nodes.label, nodes.first, nodes.last)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    roles = [role for _, role in schema.labels]
    if offsets is None:
        return [Argument(roles[label], first, last + 1) for _, label, first, last in rows]
    return [
        Argument(roles[label], offsets[document][first][0], offsets[document][last][1])
        for document, label, first, last in rows
    ]


def _with_characters(
    span_keys: np.ndarray, num_labels: int, num_documents: int, offsets: Sequence[Offsets]
) -> np.ndarray:
    """Leave out spans that begin or end with a token without characters, such as [CLS]."""
    _require(
        len(offsets) == num_documents,
        f"offsets has {len(offsets)} entries, expected {num_documents}, one a document",
    )
    document, _, first, last = _unpack(span_keys, num_labels)
    kept = np.ones(len(span_keys), bool)
    rows = zip(document.tolist(), first.tolist(), last.tolist(), strict=True)
    for row, (number, begin, end) in enumerate(rows):
        tokens = offsets[number]
        if end >= len(tokens):
            _require(False, f"spans has token {end} of document {number} with {len(tokens)} tokens")
        kept[row] = tokens[begin][0] < tokens[begin][1] and tokens[end][0] < tokens[end][1]
    return span_keys[kept]


def _without_subsets(events: list[Event]) -> list[Event]:
    """Leave out events whose arguments, trigger aside, another of the same type has too."""
    sets = [(event, {a for a in event.arguments if a.role != TRIGGER}) for event in events]
    kept: list[tuple[Event, set[Argument]]] = []
    for event, arguments in sorted(sets, key=lambda item: -len(item[1])):
        if not any(event.type == other.type and arguments <= larger for other, larger in kept):
            kept.append((event, arguments))
    return sorted(event for event, _ in kept)


def _require(condition: bool, message: str) -> None:
    require(condition, "events.decode", message)


def _rows(name: str, table: Table, columns: int) -> np.ndarray:
    """A table as an int64 array `[N, columns]`; an empty list is an empty table."""
    rows = np.asarray(table.cpu() if isinstance(table, torch.Tensor) else table)
    if rows.size == 0:
        return np.empty((0, columns), np.int64)
    if rows.dtype.kind not in "iu":
        raise TypeError(f"supy.events.decode: {name} has dtype {rows.dtype}, expected int64")
    _require(
        rows.ndim == 2 and rows.shape[1] == columns,
        f"{name} has shape {list(rows.shape)}, expected [N, {columns}]",
    )
    return rows.astype(np.int64, copy=False)


def _keys(name: str, table: Table, num_documents: int, head: str, num_heads: int) -> np.ndarray:
    """Rows (document, head, first, last), checked and each packed into one integer."""
    document, number, first, last = _rows(name, table, 4).T
    _require(
        num_documents * num_heads < MAX_HEADS,
        f"num_documents is {num_documents}, expected fewer than {MAX_HEADS // num_heads}",
    )
    for column, values, size in (
        ("document", document, num_documents),
        (head, number, num_heads),
        ("first position", first, MAX_POSITION),
        ("last position", last, MAX_POSITION),
    ):
        bad = values[(values < 0) | (values >= size)]
        _require(not len(bad), f"{name} has {column} {bad[:1].tolist()}, expected 0 to {size - 1}")
    backward = (first > last).nonzero()[0][:1].tolist()
    _require(not backward, f"{name} has first > last in row {backward}, expected first <= last")
    return _pack(document, number, first, last, num_heads)


def _pack(document, head, first, last, num_heads):
    return ((document * num_heads + head) * MAX_POSITION + first) * MAX_POSITION + last


def _unpack(keys, num_heads):
    keys, last = np.divmod(keys, MAX_POSITION)
    keys, first = np.divmod(keys, MAX_POSITION)
    return *np.divmod(keys, num_heads), first, last
