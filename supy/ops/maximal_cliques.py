"""All maximal cliques of one graph, or of many at once."""

from __future__ import annotations

from typing import NamedTuple

import torch

from supy import _extension
from supy._checks import Shapes, require
from supy._library import Kernel, define
from supy.reference import maximal_cliques as reference
from supy.reference.maximal_cliques import CliqueLimitError

__all__ = ["BatchedCliques", "CliqueLimitError", "Cliques", "batched_maximal_cliques", "maximal_cliques"]


class Cliques(NamedTuple):
    """Clique c holds the nodes ``nodes[offsets[c] : offsets[c + 1]]``."""

    offsets: torch.Tensor  # int64 [C + 1]
    nodes: torch.Tensor  # int64 [offsets[C]]


class BatchedCliques(NamedTuple):
    """Graph g has the cliques ``graph_offsets[g] : graph_offsets[g + 1]``; clique c is as in ``Cliques``."""

    graph_offsets: torch.Tensor  # int64 [G + 1]
    offsets: torch.Tensor  # int64 [C + 1]
    nodes: torch.Tensor  # int64 [offsets[C]]


def _check_nodes(op: str, edges: list[list[int]], first: int, num_nodes: int, graph: str) -> None:
    for row, ends in enumerate(edges, first):
        for column, node in enumerate(ends):
            expected = f"a node number in [0, {num_nodes}){graph}"
            message = f"edges[{row}, {column}] is {node}, expected {expected}"
            require(0 <= node < num_nodes, op, message)


# The C++ search checks values as it reads them. The references trust theirs, so these check them before.
def _single_reference(edges, num_nodes, limit):
    _check_nodes("maximal_cliques", edges.tolist(), 0, num_nodes, "")
    return reference.maximal_cliques(edges, num_nodes, limit)


def _batched_reference(edges, edge_offsets, node_counts, limit):
    op = "batched_maximal_cliques"
    bounds, counts = edge_offsets.tolist(), node_counts.tolist()
    for g, n in enumerate(counts):
        require(0 <= n <= _MOST_NODES, op, f"node_counts[{g}] is {n}, expected 0 to {_MOST_NODES}")
        expected = f"at least edge_offsets[{g}], which is {bounds[g]}"
        message = f"edge_offsets[{g + 1}] is {bounds[g + 1]}, expected {expected}"
        require(bounds[g] <= bounds[g + 1], op, message)
    require(bounds[0] == 0, op, f"edge_offsets[0] is {bounds[0]}, expected 0")
    expected = f"{len(edges)}, the number of edges"
    message = f"edge_offsets[{len(counts)}] is {bounds[-1]}, expected {expected}"
    require(bounds[-1] == len(edges), op, message)
    for g, n in enumerate(counts):
        own = edges[bounds[g] : bounds[g + 1]].tolist()
        _check_nodes(op, own, bounds[g], n, f" of graph {g}")
    return reference.batched_maximal_cliques(edges, edge_offsets, node_counts, limit)


def _kernels(name: str) -> tuple[Kernel, ...]:
    def run(*args):
        device = args[0].device
        args = (arg.cpu().contiguous() if isinstance(arg, torch.Tensor) else arg for arg in args)
        found = getattr(_extension.C, name)(*args)
        return found if device.type == "cpu" else tuple(tensor.to(device) for tensor in found)

    return tuple(Kernel(device, "cpp", run, (torch.int64,)) for device in ("CPU", "CUDA"))


def _unknown_sizes(edges):
    new_size = torch.library.get_ctx().new_dynamic_size
    return edges.new_empty(new_size(min=1)), edges.new_empty(new_size())


_MOST_NODES = 2**31 - 1

_maximal_cliques = define(
    "maximal_cliques(Tensor edges, SymInt num_nodes, int limit) -> (Tensor, Tensor)",
    _single_reference,
    fake=lambda edges, num_nodes, limit: _unknown_sizes(edges),
    kernels=_kernels("maximal_cliques"),
)

_batched_maximal_cliques = define(
    "batched_maximal_cliques(Tensor edges, Tensor edge_offsets, Tensor node_counts, int limit)"
    " -> (Tensor, Tensor, Tensor)",
    _batched_reference,
    fake=lambda edges, offsets, *_: (torch.empty_like(offsets), *_unknown_sizes(edges)),
    kernels=_kernels("batched_maximal_cliques"),
)


def maximal_cliques(
    edges: torch.Tensor, num_nodes: int, *, limit: int | None = None
) -> Cliques:
    """Lists all maximal cliques of an undirected graph: sets of nodes, pairwise joined, that no other node extends.

    Bron-Kerbosch with pivoting (Tomita, Tanaka and Takahashi 2006) on bit sets. A graph of more than 64 nodes is split
    into the neighbourhoods of its nodes, those of hubs in degeneracy order (Eppstein, Loeffler and Strash, arXiv
    1006.5440). Beyond the result and the graph's adjacency lists it uses less than 16 MB of memory.

    Args:
        edges: int64 `[M, 2]`, numbers of nodes. Self-loops and duplicates, in either direction, change nothing.
        num_nodes: the nodes are 0 to num_nodes - 1. One without edges is a clique of its own.
        limit: the most cliques that are wanted; a graph can have 3 ** (num_nodes / 3).

    Returns:
        ``Cliques(offsets [C + 1], nodes)``: the nodes of a clique ascend, the cliques are in lexicographic order. On
        the device of ``edges``; a CUDA tensor is searched on the CPU.

    Raises:
        CliqueLimitError: there are more than ``limit`` cliques; raised as soon as that is known.
        ValueError, TypeError: a node number outside of the graph, a wrong shape or dtype.

    >>> import torch, supy
    >>> triangle_and_tail = torch.tensor([[0, 1], [1, 2], [2, 0], [2, 3]])
    >>> supy.ops.maximal_cliques(triangle_and_tail, 5)
    Cliques(offsets=tensor([0, 3, 5, 6]), nodes=tensor([0, 1, 2, 2, 3, 4]))
    """
    op = "maximal_cliques"
    _check_tensor(Shapes(op), "edges", edges, 2, "[M, 2]", 2)
    if not isinstance(num_nodes, (int, torch.SymInt)):
        raise TypeError(f"supy.{op}: num_nodes is a {type(num_nodes).__name__}, expected an int")
    if not 0 <= num_nodes <= _MOST_NODES:  # not `require`: torch.compile cannot format an unknown size
        raise ValueError(f"supy.{op}: num_nodes is {num_nodes}, expected 0 to {_MOST_NODES}")
    return Cliques(*_maximal_cliques(edges, num_nodes, _limit(op, limit)))


def batched_maximal_cliques(
    edges: torch.Tensor,
    edge_offsets: torch.Tensor,
    node_counts: torch.Tensor,
    *,
    limit: int | None = None,
) -> BatchedCliques:
    """Lists all maximal cliques of many graphs, on as many threads as torch uses; see ``maximal_cliques``.

    Args:
        edges: int64 `[M, 2]`, the edges of one graph after another; each graph numbers its nodes from 0.
        edge_offsets: int64 `[G + 1]`, from 0 to M: graph g has the edges ``edge_offsets[g] : edge_offsets[g + 1]``.
        node_counts: int64 `[G]`.
        limit: the most cliques that are wanted of any one graph.

    Returns:
        ``BatchedCliques(graph_offsets [G + 1], offsets [C + 1], nodes)``: graph g has the cliques
        ``graph_offsets[g] : graph_offsets[g + 1]``, clique c the nodes ``nodes[offsets[c] : offsets[c + 1]]``.

    Raises:
        CliqueLimitError: names the first graph with more than ``limit`` cliques.
        ValueError, TypeError: as ``maximal_cliques``, and for offsets that do not ascend from 0 to M.

    >>> import torch, supy
    >>> edges = torch.tensor([[0, 1], [0, 1], [0, 2]])  # one edge; two edges from node 0
    >>> supy.ops.batched_maximal_cliques(edges, torch.tensor([0, 1, 3]), torch.tensor([2, 3]))
    BatchedCliques(graph_offsets=tensor([0, 1, 3]), offsets=tensor([0, 2, 4, 6]), nodes=tensor([0, 1, 0, 1, 0, 2]))
    """
    op = "batched_maximal_cliques"
    shapes = Shapes(op)
    _check_tensor(shapes, "edges", edges, 2, "[M, 2]", 2)
    _check_tensor(shapes, "node_counts", node_counts, 1, "[G]")
    graphs = node_counts.shape[0]
    expected = f"[G + 1] with G={graphs} (from node_counts)"
    _check_tensor(shapes, "edge_offsets", edge_offsets, 1, expected, graphs + 1)
    shapes.same_device("edge_offsets", edge_offsets, "edges", edges)
    shapes.same_device("node_counts", node_counts, "edges", edges)
    limit = _limit(op, limit)
    return BatchedCliques(*_batched_maximal_cliques(edges, edge_offsets, node_counts, limit))


def _check_tensor(shapes, name, tensor, ndim: int, expected: str, last: int | None = None) -> None:
    """An int64 tensor with ``ndim`` axes, the last of size ``last``."""
    shapes.tensor(name, tensor)
    fits = tensor.ndim == ndim and (last is None or tensor.shape[-1] == last)
    message = f"{name} has shape {list(tensor.shape)}, expected {expected}"
    require(fits, shapes.op, message)
    if tensor.dtype != torch.int64:
        message = f"{name} has dtype {tensor.dtype}, expected torch.int64"
        raise TypeError(f"supy.{shapes.op}: {message}")


def _limit(op: str, limit: int | None) -> int:
    """The limit as the operators take it: negative for none."""
    if limit is None:
        return -1
    require(0 <= limit < 2**63, op, f"limit is {limit}, expected None or a number of cliques")
    return limit
