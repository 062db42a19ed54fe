"""maximal_cliques and batched_maximal_cliques: against networkx, at every size where another search takes over."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import supy
from supy.ops import batched_maximal_cliques, maximal_cliques

native = pytest.mark.skipif(supy._extension.C is None, reason="needs supy._C")


def lists(offsets, nodes):
    bounds, nodes = offsets.tolist(), nodes.tolist()
    return [tuple(nodes[a:b]) for a, b in itertools.pairwise(bounds)]


def search(edges, num_nodes, **options):
    edges = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2)
    return lists(*maximal_cliques(edges, num_nodes, **options))


def by_networkx(edges, num_nodes):
    graph = networkx.Graph()
    graph.add_nodes_from(range(num_nodes))
    graph.add_edges_from((a, b) for a, b in edges if a != b)
    return sorted(tuple(sorted(clique)) for clique in networkx.find_cliques(graph))


def gnp(num_nodes, p, seed):
    rng = random.Random(seed)
    edges = [pair for pair in itertools.combinations(range(num_nodes), 2) if rng.random() < p]
    rng.shuffle(edges)
    return edges


def moon_moser(num_nodes):
    """The graph with the most maximal cliques, 3 ** (n / 3): groups of three, every two of other groups joined."""
    return [(a, b) for a, b in itertools.combinations(range(num_nodes), 2) if a // 3 != b // 3]


@st.composite
def graphs(draw, most_nodes=12):
    """Any list of pairs: self-loops, duplicates and isolated nodes come by themselves."""
    num_nodes = draw(st.integers(0, most_nodes))
    node = st.integers(0, max(num_nodes - 1, 0))
    pairs = st.lists(st.tuples(node, node), max_size=4 * num_nodes)
    return (draw(pairs) if num_nodes else []), num_nodes


def batch(many):
    edges = torch.tensor([e for es, _ in many for e in es], dtype=torch.int64).reshape(-1, 2)
    offsets = torch.tensor([0] + [len(es) for es, _ in many]).cumsum(0)
    return edges, offsets, torch.tensor([n for _, n in many], dtype=torch.int64)


@settings(max_examples=1500, deadline=None)
@given(graphs())
def test_equals_networkx(graph):
    assert search(*graph) == by_networkx(*graph)


@settings(max_examples=100, deadline=None)
@given(graphs())
def test_reference_equals_networkx(graph):
    with supy.use_backend("reference"):
        assert search(*graph) == by_networkx(*graph)


@settings(max_examples=200, deadline=None)
@given(st.lists(graphs(), max_size=12))
def test_batch_equals_singles(many):
    found = batched_maximal_cliques(*batch(many))
    assert found.graph_offsets.shape == (len(many) + 1,)
    cliques, bounds = lists(*found[1:]), found.graph_offsets.tolist()
    for graph, (a, b) in zip(many, itertools.pairwise(bounds)):
        assert cliques[a:b] == search(*graph)
    with supy.use_backend("reference"):
        assert all(map(torch.equal, found, batched_maximal_cliques(*batch(many))))


@pytest.mark.parametrize("num_nodes", [63, 64, 65, 128, 129, 200])  # a word; its edge; more than a word
@pytest.mark.parametrize("p", [0.02, 0.2, 0.4])
def test_sizes_around_a_word(num_nodes, p):
    edges = gnp(num_nodes, p, seed=num_nodes)
    assert search(edges, num_nodes) == by_networkx(edges, num_nodes)


WIDE = {
    # more than 64 candidates after one node: the neighbourhood is searched in degeneracy order
    "hubs": lambda: [(h, b) for h in (0, 3, 70, 149) for b in range(150) if b != h] + gnp(150, 0.1, 1),
    # more than 64 candidates after two nodes as well: sets of several words
    "nearly complete": lambda: gnp(150, 0.999, 2),
    "joined to a complete graph": lambda: [
        *itertools.combinations(range(10, 90), 2),
        *((a, b) for a in range(10) for b in range(10, 150)),
        *moon_moser(9),
    ],
}


@pytest.mark.parametrize("name", WIDE)
def test_more_than_a_word_of_candidates(name):
    edges, relabel = WIDE[name](), list(range(150))
    assert search(edges, 150) == by_networkx(edges, 150)
    random.Random(0).shuffle(relabel)  # hubs get other places in the order
    edges = [(relabel[a], relabel[b]) for a, b in edges]
    assert search(edges, 150) == by_networkx(edges, 150)


def test_hub_with_too_many_cliques_for_its_store():
    # Two hubs see everything, and their cliques take more memory than one node's may before they are sorted.
    leaves = range(35, 75)
    edges = [(a + 2, b + 2) for a, b in moon_moser(33)] + [(0, 1)]
    edges += [(hub, node) for hub in (0, 1) for node in range(2, 75)]
    groups = [range(first, first + 3) for first in range(2, 35, 3)]
    expected = [(0, 1, *rest) for rest in itertools.product(*groups)] + [(0, 1, leaf) for leaf in leaves]
    assert search(edges, 75) == expected


@pytest.mark.parametrize("num_nodes", [3, 15, 30, 36])
def test_moon_moser_count(num_nodes):
    edges = torch.tensor(moon_moser(num_nodes), dtype=torch.int64).reshape(-1, 2)
    offsets, nodes = maximal_cliques(edges, num_nodes)
    assert len(offsets) - 1 == 3 ** (num_nodes // 3)
    assert torch.equal(offsets.diff(), torch.full((3 ** (num_nodes // 3),), num_nodes // 3))
    assert nodes.view(-1, num_nodes // 3)[-1].tolist() == list(range(2, num_nodes, 3))


def test_no_nodes_and_no_edges():
    assert search([], 0) == [] and search([], 3) == [(0,), (1,), (2,)]
    assert search([], 70) == [(i,) for i in range(70)]
    assert search([(1, 1), (1, 1)], 2) == [(0,), (1,)]
    empty = batched_maximal_cliques(*batch([]))
    assert [x.tolist() for x in empty] == [[0], [0], []]


@native
def test_hubs_cost_no_more_than_their_edges():
    n = 100_000
    leaves = torch.arange(2, n)
    star = torch.stack([torch.full_like(leaves, n), leaves], 1)
    both = torch.cat([torch.stack([torch.full_like(leaves, hub), leaves], 1) for hub in (0, 1)])
    complete = torch.combinations(torch.arange(1500))
    start = time.perf_counter()
    assert len(maximal_cliques(star, n + 1).offsets) - 1 == n  # 0 and 1 are alone
    assert len(maximal_cliques(both, n).offsets) - 1 == 2 * (n - 2)
    assert maximal_cliques(complete, 1500).offsets.tolist() == [0, 1500]
    assert time.perf_counter() - start < 20  # a search that is quadratic in a hub's leaves takes minutes


def test_limit():
    edges = torch.tensor(moon_moser(15))
    assert len(maximal_cliques(edges, 15, limit=243).offsets) == 244
    message = r"^supy.maximal_cliques: the graph has more than limit=242 maximal cliques$"
    for backend in ("reference", "cpp") if supy._extension.C else ("reference",):
        with supy.use_backend(backend), pytest.raises(supy.CliqueLimitError, match=message):
            maximal_cliques(edges, 15, limit=242)
    assert search([], 0, limit=0) == []
    with pytest.raises(supy.CliqueLimitError):
        search([], 1, limit=0)
    assert issubclass(supy.CliqueLimitError, RuntimeError)


@native
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_limit_names_the_first_graph(threads):
    # Above 64 nodes too. Every thread meets a graph of too many cliques at once.
    many = [(moon_moser(9), 9)] * 900 + [(moon_moser(12), 12), (moon_moser(99), 99)] * 900
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with pytest.raises(supy.CliqueLimitError, match=r"graph 900 has more than limit=80 maximal cliques$"):
            batched_maximal_cliques(*batch(many), limit=80)
    finally:
        torch.set_num_threads(before)


@native
def test_limit_with_more_nodes_than_memory():
    with pytest.raises(supy.CliqueLimitError):
        search([(0, 1)], 2**31 - 1, limit=10**9)


@native
@pytest.mark.parametrize("num_nodes", [60, 300])  # 3 ** 20 and 3 ** 100 cliques
def test_hostile_graph_stops_at_the_limit(num_nodes):
    start = time.perf_counter()
    with pytest.raises(supy.CliqueLimitError):
        maximal_cliques(torch.tensor(moon_moser(num_nodes)), num_nodes, limit=1000)
    assert time.perf_counter() - start < 5


@native
def test_same_result_for_any_number_of_threads():
    rng = random.Random(5)
    many = [(gnp(n, 0.5, n + i), n) for i in range(40) for n in (2, 5, 12, 40, 70, rng.randrange(90))]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(batched_maximal_cliques(*batch(many)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    cliques, bounds = lists(*found[0][1:3]), found[0][0].tolist()
    for (edges, n), (a, b) in zip(many[:12], itertools.pairwise(bounds)):
        assert cliques[a:b] == by_networkx(edges, n)


@native
def test_one_graph_on_many_threads():
    # Only after a million cliques are the threads asked to help.
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        offsets, nodes = maximal_cliques(torch.tensor(moon_moser(39)), 39)
        with pytest.raises(supy.CliqueLimitError):
            maximal_cliques(torch.tensor(moon_moser(39)), 39, limit=3**13 - 1)
    finally:
        torch.set_num_threads(before)
    digits = (nodes.view(3**13, 13) - torch.arange(0, 39, 3)).to(torch.float64)  # clique c is c in base 3
    assert torch.equal(digits @ 3.0 ** torch.arange(12, -1, -1.0).double(), torch.arange(3**13).double())
    assert torch.equal(offsets, torch.arange(0, 13 * 3**13 + 1, 13))


def test_views_are_read_like_copies():
    edges = torch.tensor(gnp(20, 0.5, 3))
    strided = torch.stack([edges, -edges], 2)[:, :, 0]
    assert not strided.is_contiguous()
    assert all(map(torch.equal, maximal_cliques(edges, 20), maximal_cliques(strided, 20)))
    transposed = torch.empty(2, len(edges), dtype=torch.int64).copy_(edges.T).T
    assert all(map(torch.equal, maximal_cliques(edges, 20), maximal_cliques(transposed, 20)))


def int64(*values):
    return torch.tensor(values, dtype=torch.int64)


E, O, N = int64(0, 1, 0, 1, 1, 2).view(3, 2), int64(0, 1, 3), int64(2, 3)
HUGE = 2**62

BAD = [
    (lambda: maximal_cliques(E, 2), ValueError, r"edges\[2, 1\] is 2, expected a node number in \[0, 2\)$"),
    (lambda: maximal_cliques(-E, 3), ValueError, r"edges\[0, 1\] is -1, expected a node number in \[0, 3\)$"),
    (lambda: maximal_cliques(E + 100, 100), ValueError, r"edges\[0, 0\] is 100,"),
    (lambda: maximal_cliques(E * HUGE, 3), ValueError, rf"edges\[0, 1\] is {HUGE},"),
    (lambda: maximal_cliques(E, 0), ValueError, r"edges\[0, 0\] is 0, expected a node number in \[0, 0\)"),
    (lambda: maximal_cliques(E, -1), ValueError, r"num_nodes is -1, expected 0 to 2147483647"),
    (lambda: maximal_cliques(E, HUGE), ValueError, r"num_nodes is 4611686018427387904, expected"),
    (lambda: maximal_cliques(E, 3.0), TypeError, r"num_nodes is a float, expected an int"),
    (lambda: maximal_cliques(E.int(), 3), TypeError, r"edges has dtype torch.int32, expected torch.int64"),
    (lambda: maximal_cliques(E.view(-1), 3), ValueError, r"edges has shape \[6\], expected \[M, 2\]"),
    (lambda: maximal_cliques(E.view(2, 3), 3), ValueError, r"edges has shape \[2, 3\], expected \[M, 2\]"),
    (lambda: maximal_cliques([[0, 1]], 3), TypeError, r"edges is a list, expected a torch.Tensor"),
    (lambda: maximal_cliques(E, 3, limit=-1), ValueError, r"limit is -1"),
    (lambda: batched_maximal_cliques(E, O, int64(2, 2)), ValueError,
     r"edges\[2, 1\] is 2, expected a node number in \[0, 2\) of graph 1$"),
    (lambda: batched_maximal_cliques(E, O, int64(-2, 3)), ValueError, r"node_counts\[0\] is -2, expected 0 to"),
    (lambda: batched_maximal_cliques(E, O, int64(2, HUGE)), ValueError, r"node_counts\[1\] is 4611686018427387904,"),
    (lambda: batched_maximal_cliques(E, int64(0, 4, 3), N), ValueError,
     r"edge_offsets\[2\] is 3, expected at least edge_offsets\[1\], which is 4$"),
    (lambda: batched_maximal_cliques(E, int64(1, 1, 3), N), ValueError, r"edge_offsets\[0\] is 1, expected 0$"),
    (lambda: batched_maximal_cliques(E, int64(0, 1, HUGE), N), ValueError,
     r"edge_offsets\[2\] is 4611686018427387904, expected 3, the number of edges"),
    (lambda: batched_maximal_cliques(E, int64(-HUGE, 1, 3), N), ValueError, r"edge_offsets\[0\] is -46"),
    (lambda: batched_maximal_cliques(E, int64(0, 3), N), ValueError,
     r"edge_offsets has shape \[2\], expected \[G \+ 1\] with G=2 \(from node_counts\)"),
    (lambda: batched_maximal_cliques(E, O.double(), N), TypeError, r"edge_offsets has dtype torch.float64"),
    (lambda: batched_maximal_cliques(E, O, N.view(1, 2)), ValueError, r"node_counts has shape \[1, 2\], expected \[G\]"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("call, error, message", BAD, ids=[message for _, _, message in BAD])
def test_bad_input(call, error, message, backend):
    if backend == "cpp" and supy._extension.C is None:
        pytest.skip("needs supy._C")
    with supy.use_backend(backend), pytest.raises(error, match=message) as caught:
        call()
    assert str(caught.value).startswith(("supy.maximal_cliques: ", "supy.batched_maximal_cliques: "))


def test_operator_contract():
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.supy.maximal_cliques.default, (E, 3, -1), test_utils=tests)
    torch.library.opcheck(torch.ops.supy.batched_maximal_cliques.default, (E, O, N, -1), test_utils=tests)


def test_compiles_with_sizes_that_depend_on_data():
    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def count(edges, num_nodes):
        offsets, nodes = maximal_cliques(edges, num_nodes)
        return offsets.diff(), nodes + 1

    for n in (3, 12):
        edges = torch.tensor(gnp(n, 0.7, n))
        offsets, nodes = maximal_cliques(edges, n)
        assert all(map(torch.equal, count(edges, n), (offsets.diff(), nodes + 1)))


MEMORY = """
import resource, sys, torch, supy
from itertools import combinations
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small = torch.tensor([[0, 1]])
supy.ops.maximal_cliques(small, 70), supy.ops.maximal_cliques(small, 2)
kind, n = sys.argv[1], int(sys.argv[2])
if kind == "moon_moser":
    edges = torch.tensor([(a, b) for a, b in combinations(range(n), 2) if a // 3 != b // 3])
else:
    generator = torch.Generator().manual_seed(0)
    pairs = torch.combinations(torch.arange(n))
    edges = pairs[torch.rand(len(pairs), generator=generator) < float(sys.argv[3])]
copies = int(sys.argv[4]) if len(sys.argv) > 4 else 1
edge_offsets, node_counts = torch.arange(copies + 1) * len(edges), torch.full((copies,), n)
edges = edges.repeat(copies, 1)
before = peak()
found = supy.ops.batched_maximal_cliques(edges, edge_offsets, node_counts)
print(peak() - before - sum(x.nbytes for x in found) / 2**20)
"""


@native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss in kB")
@pytest.mark.parametrize(
    "graph",
    ["moon_moser 42", "gnp 60 0.9", "gnp 280 0.5", "gnp 60 0.8 40", "gnp 200 0.5 4"],  # one graph; 40 or 4 copies
)
def test_memory_is_the_result_and_16_MB(graph):
    run = subprocess.run([sys.executable, "-c", MEMORY, *graph.split()], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 16


@native
@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize("num_nodes", [60, 300])
def test_control_c_ends_a_search(num_nodes):
    code = f"""
import signal, torch, supy
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
pairs = torch.combinations(torch.arange({num_nodes}))
pairs = pairs[pairs[:, 0] // 2 != pairs[:, 1] // 2]  # 2 ** (n / 2) cliques
print(1, flush=True)
supy.ops.maximal_cliques(pairs, {num_nodes})
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "1\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert errors.rstrip().endswith("KeyboardInterrupt")
