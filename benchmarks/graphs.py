"""The graphs of the clique benchmarks, as int64 edges `[M, 2]` and a number of nodes, and the libraries to compare with."""

from __future__ import annotations

import torch


def tiny(count: int = 10_000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Graphs as event extraction has them: 2 to 12 nodes, 1 to 4 overlapping cliques. (edges, edge_offsets, node_counts)"""
    generator = torch.Generator().manual_seed(0)

    def between(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    edges, offsets, counts = [], [0], []
    for _ in range(count):
        nodes = between(2, 12)
        pairs = set()
        for _ in range(between(1, 4)):
            members = torch.randperm(nodes, generator=generator)[: between(2, nodes)].tolist()
            pairs |= {(a, b) for a in members for b in members if a < b}
        edges += sorted(pairs)
        offsets.append(len(edges))
        counts.append(nodes)
    return torch.tensor(edges), torch.tensor(offsets), torch.tensor(counts)


def dense(nodes: int, probability: float) -> tuple[torch.Tensor, int]:
    """Each edge with the same probability."""
    edges = torch.triu_indices(nodes, nodes, 1).T
    chosen = torch.rand(len(edges), generator=torch.Generator().manual_seed(0)) < probability
    return edges[chosen].contiguous(), nodes


def moon_moser(nodes: int) -> tuple[torch.Tensor, int]:
    """All pairs but those inside a group of three: 3 ** (nodes / 3) maximal cliques, the most there can be."""
    edges = torch.triu_indices(nodes, nodes, 1).T
    return edges[edges[:, 0] // 3 != edges[:, 1] // 3].contiguous(), nodes


def sparse(nodes: int, edges: int) -> tuple[torch.Tensor, int]:
    """Random pairs."""
    return torch.randint(0, nodes, (edges, 2), generator=torch.Generator().manual_seed(0)), nodes


def attached(nodes: int, degree: int) -> tuple[torch.Tensor, int]:
    """Preferential attachment (Barabasi and Albert): few hubs with many neighbours."""
    import networkx

    return torch.tensor(list(networkx.barabasi_albert_graph(nodes, degree, seed=0).edges)), nodes


def geometric(nodes: int, edges: int) -> tuple[torch.Tensor, int]:
    """Points of a square, the nearest pairs joined: large cliques that overlap."""
    points = torch.rand(nodes, 2, generator=torch.Generator().manual_seed(0))
    radius = (2 * edges / nodes**2 / torch.pi) ** 0.5
    found = []
    for first in range(0, nodes, 1000):
        near = (torch.cdist(points[first : first + 1000], points) < radius).nonzero()
        near[:, 0] += first
        found.append(near[near[:, 0] < near[:, 1]])
    return torch.cat(found), nodes


def igraph_of(edges: torch.Tensor, nodes: int):
    import igraph

    return igraph.Graph(n=nodes, edges=edges.tolist())


def networkx_of(edges: torch.Tensor, nodes: int):
    import networkx

    graph = networkx.Graph(edges.tolist())
    graph.remove_edges_from(networkx.selfloop_edges(graph))
    graph.add_nodes_from(range(nodes))
    return graph


def each(edges: torch.Tensor, offsets: torch.Tensor, counts: torch.Tensor, cliques_of) -> list:
    """``cliques_of(edges, nodes)`` of every graph of a batch."""
    return [
        clique
        for begin, end, nodes in zip(offsets.tolist(), offsets[1:].tolist(), counts.tolist())
        for clique in cliques_of(edges[begin:end], nodes)
    ]


def summary(cliques) -> tuple[int, int]:
    """(number of cliques, sum of their sizes) of a list of cliques or of supy's tensors."""
    if isinstance(cliques, list):
        return len(cliques), sum(map(len, cliques))
    return len(cliques.offsets) - 1, len(cliques.nodes)
