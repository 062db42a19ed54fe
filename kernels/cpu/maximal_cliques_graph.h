// The graphs that are searched: reading their edges, and adjacency lists for those of more than 64 nodes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "maximal_cliques.h"

namespace supy::cliques {

[[noreturn]] inline void bad_argument(const CliqueParams& p, const std::string& message) {
  throw std::invalid_argument((p.batched ? "supy.batched_maximal_cliques: " : "supy.maximal_cliques: ") + message);
}

[[noreturn]] inline void bad_node(const CliqueParams& p, int64_t g, int64_t e) {
  const int64_t n = p.node_counts[g];
  const int end = p.edges[2 * e] >= 0 && p.edges[2 * e] < n;
  bad_argument(p, "edges[" + std::to_string(e) + ", " + std::to_string(end) + "] is " +
                      std::to_string(p.edges[2 * e + end]) + ", expected a node number in [0, " + std::to_string(n) +
                      ")" + (p.batched ? " of graph " + std::to_string(g) : ""));
}

// The ends of edge e, which belongs to graph g.
inline std::pair<int, int> edge(const CliqueParams& p, int64_t g, int64_t e) {
  const uint64_t a = p.edges[2 * e], b = p.edges[2 * e + 1], n = p.node_counts[g];
  if (a >= n || b >= n) bad_node(p, g, e);
  return {static_cast<int>(a), static_cast<int>(b)};
}

struct Range {
  const int *first, *last;
  const int* begin() const { return first; }
  const int* end() const { return last; }
  int64_t size() const { return last - first; }
};

// Adjacency lists without self-loops and duplicates. A list has two halves, each ascending: the neighbours that come
// later in a degeneracy order, then the earlier ones.
class Graph {
 public:
  // Graph g of a batch.
  Graph(const CliqueParams& p, int64_t g) : num_nodes(p.node_counts[g]), mark(num_nodes), names(num_nodes) {
    std::iota(names.begin(), names.end(), 0);
    build([&](auto&& visit) {
      for (int64_t e = p.edge_offsets[g]; e < p.edge_offsets[g + 1]; ++e) {
        const auto [a, b] = edge(p, g, e);
        if (a != b) visit(a, b);
      }
    });
  }

  // What `members`, which become the nodes 0, 1, ..., induce in `graph`.
  Graph(const Graph& graph, const std::vector<int>& members) : num_nodes(members.size()), mark(num_nodes) {
    for (int i = 0; i < num_nodes; ++i) graph.mark[members[i]] = i + 1;
    for (const int u : members) names.push_back(graph.names[u]);
    build([&](auto&& visit) {
      for (int i = 0; i < num_nodes; ++i) {
        for (const int u : graph.later(members[i])) {
          if (graph.mark[u]) visit(i, static_cast<int>(graph.mark[u]) - 1);
        }
      }
    });
    for (const int u : members) graph.mark[u] = 0;
  }

  Range later(int v) const { return {&lists_[starts_[v]], &lists_[middles_[v]]}; }
  Range earlier(int v) const { return {&lists_[middles_[v]], &lists_[starts_[v + 1]]}; }
  bool adjacent(int u, int v) const {
    const Range a = later(u), b = later(v);
    return std::binary_search(a.begin(), a.end(), v) || std::binary_search(b.begin(), b.end(), u);
  }

  int num_nodes;
  mutable std::vector<uint64_t> mark;  // all zero between uses
  std::vector<int> names;         // the nodes' numbers in the whole graph

 private:
  // each_edge(visit) calls visit(a, b), a != b, for every edge; it is called twice.
  template <class EachEdge>
  void build(EachEdge&& each_edge) {
    starts_.assign(num_nodes + 1, 0);
    each_edge([&](int a, int b) { ++starts_[a], ++starts_[b]; });
    std::partial_sum(starts_.begin(), starts_.end(), starts_.begin());
    lists_.resize(starts_.back() + 1);  // one more, so that the address of an empty last list exists
    each_edge([&](int a, int b) { lists_[--starts_[a]] = b, lists_[--starts_[b]] = a; });
    remove_duplicates();
    const std::vector<int> rank = degeneracy_ranks();
    middles_.resize(num_nodes);
    for (int v = 0; v < num_nodes; ++v) {
      const auto is_later = [&](int u) { return rank[u] > rank[v]; };
      middles_[v] = starts_[v] + std::count_if(&lists_[starts_[v]], &lists_[starts_[v + 1]], is_later);
    }
    // Taking the nodes in ascending order appends to every half in ascending order.
    std::vector<int> halves(lists_.size());
    std::vector<int64_t> next_later(starts_), next_earlier(middles_);
    for (int v = 0; v < num_nodes; ++v) {
      for (int64_t i = starts_[v]; i < starts_[v + 1]; ++i) {
        const int u = lists_[i];
        halves[(rank[v] > rank[u] ? next_later : next_earlier)[u]++] = v;
      }
    }
    lists_.swap(halves);
  }

  void remove_duplicates() {
    std::vector<int> seen(num_nodes, -1);
    int64_t kept = 0;
    for (int v = 0; v < num_nodes; ++v) {
      const int64_t begin = std::exchange(starts_[v], kept);
      for (int64_t i = begin; i < starts_[v + 1]; ++i) {
        const int u = lists_[i];
        if (std::exchange(seen[u], v) != v) lists_[kept++] = u;
      }
    }
    starts_[num_nodes] = kept;
  }

  // The order in which the node of lowest remaining degree leaves the graph (Matula and Beck 1983; this array form is
  // Batagelj and Zaversnik's). `order` is kept sorted by remaining degree; first[d] is where degree d begins.
  std::vector<int> degeneracy_ranks() const {
    std::vector<int> degree(num_nodes), rank(num_nodes), order(num_nodes), first(num_nodes + 1);
    for (int v = 0; v < num_nodes; ++v) ++first[(degree[v] = starts_[v + 1] - starts_[v]) + 1 - (num_nodes == 0)];
    std::partial_sum(first.begin(), first.end(), first.begin());
    {
      std::vector<int> next(first);
      for (int v = 0; v < num_nodes; ++v) order[rank[v] = next[degree[v]]++] = v;
    }
    for (int i = 0; i < num_nodes; ++i) {
      const int v = order[i];
      for (int64_t k = starts_[v]; k < starts_[v + 1]; ++k) {
        const int u = lists_[k];
        if (degree[u] <= degree[v]) continue;
        const int to = first[degree[u]]++, other = order[to];  // swap u with the first of its degree, then step past it
        std::swap(order[rank[u]], order[to]);
        std::swap(rank[u], rank[other]);
        --degree[u];
      }
    }
    return rank;
  }

  std::vector<int64_t> starts_, middles_;
  std::vector<int> lists_;
};

}  // namespace supy::cliques
