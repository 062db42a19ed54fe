// All maximal cliques of many undirected graphs: the contract between kernels/cpu and csrc.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace supy {

// Graph g has the nodes 0 ... node_counts[g] - 1 and the edges edge_offsets[g] : edge_offsets[g + 1]. Self-loops and
// repeated edges are allowed. Every value is checked before it is used.
struct CliqueParams {
  const int64_t* edges;         // [num_edges, 2]
  const int64_t* edge_offsets;  // [num_graphs + 1]
  const int64_t* node_counts;   // [num_graphs]
  int64_t num_edges;
  int64_t num_graphs;
  int64_t limit;          // the most cliques that one graph may have; negative: any number
  bool batched;           // which of the two operators the error messages name
  bool (*interrupted)();  // asked now and then by the calling thread: true ends the search; may be null
};

// Graph g has the cliques graph_offsets[g] : graph_offsets[g + 1], clique c the nodes
// nodes[offsets[c] : offsets[c + 1]], ascending; the cliques of a graph are in lexicographic order.
// The arrays come from malloc and belong to the caller.
struct CliqueLists {
  int64_t* graph_offsets;  // [num_graphs + 1]
  int64_t* offsets;        // [num_cliques + 1]
  int64_t* nodes;          // [num_nodes]
  int64_t num_cliques;
  int64_t num_nodes;
};

struct CliqueLimitExceeded : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct CliqueSearchInterrupted : std::exception {};

// Throws std::invalid_argument, CliqueLimitExceeded (both name the lowest graph concerned), CliqueSearchInterrupted or
// std::bad_alloc. Peak memory is the result, the adjacency lists of one graph a thread, and less than 16 MB.
CliqueLists maximal_cliques_cpu(const CliqueParams& params);

}  // namespace supy
