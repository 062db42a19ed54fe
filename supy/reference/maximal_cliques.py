"""All maximal cliques: Bron and Kerbosch (1973) with the pivot of Tomita, Tanaka and Takahashi (2006)."""

from __future__ import annotations

import torch


class CliqueLimitError(RuntimeError):
    """A graph has more maximal cliques than the limit that was given."""


def _cliques(edges: list[list[int]], num_nodes: int):
    """Yields the maximal sets of nodes that are pairwise joined, in no particular order.

    expand(R, P, X): P are the nodes that see all of the clique R; X those that do too, but whose cliques were found. R is
    maximal when both are empty. A maximal clique cannot consist of the pivot's neighbours alone, so they need no branch.
    """
    neighbours = [set() for _ in range(num_nodes)]
    for a, b in edges:
        if a != b:
            neighbours[a].add(b)
            neighbours[b].add(a)
    stack = [([], set(range(num_nodes)), set())] if num_nodes else []
    while stack:
        clique, candidates, excluded = stack.pop()
        if not candidates and not excluded:
            yield sorted(clique)
        pivot = max(candidates | excluded, key=lambda u: len(candidates & neighbours[u]), default=0)
        for node in candidates - neighbours[pivot]:
            near = neighbours[node]
            stack.append(([*clique, node], candidates & near, excluded & near))
            candidates = candidates - {node}
            excluded = excluded | {node}


def _sorted_cliques(edges: torch.Tensor, num_nodes: int, limit: int, graph: str) -> list[list[int]]:
    found = []
    for clique in _cliques(edges.tolist(), num_nodes):
        if len(found) == limit:
            raise CliqueLimitError(f"supy.{graph} has more than limit={limit} maximal cliques")
        found.append(clique)
    return sorted(found)


def _pack(cliques: list[list[int]], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    offsets = like.new_tensor([0] + [len(clique) for clique in cliques]).cumsum(0)
    return offsets, like.new_tensor([node for clique in cliques for node in clique])


def maximal_cliques(edges: torch.Tensor, num_nodes: int, limit: int):
    """Cliques in lexicographic order, one after another, and where each begins; a negative ``limit`` is none."""
    return _pack(_sorted_cliques(edges, num_nodes, limit, "maximal_cliques: the graph"), edges)


def batched_maximal_cliques(
    edges: torch.Tensor, edge_offsets: torch.Tensor, node_counts: torch.Tensor, limit: int
):
    bounds, first, cliques = edge_offsets.tolist(), [0], []
    for g, count in enumerate(node_counts.tolist()):
        own = edges[bounds[g] : bounds[g + 1]]
        cliques += _sorted_cliques(own, count, limit, f"batched_maximal_cliques: graph {g}")
        first.append(len(cliques))
    return edges.new_tensor(first), *_pack(cliques, edges)
