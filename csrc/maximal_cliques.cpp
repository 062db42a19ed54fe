#include "maximal_cliques.h"

#include "tensor.h"

namespace supy {
namespace {

// Searches without Python's lock, which is taken back now and then to see whether Ctrl-C was pressed.
CliqueLists search(CliqueParams p) {
  p.interrupted = [] {
    py::gil_scoped_acquire lock;
    return PyErr_CheckSignals() != 0;
  };
  try {
    py::gil_scoped_release without_lock;
    return maximal_cliques_cpu(p);
  } catch (const CliqueLimitExceeded& error) {
    const py::object type = py::module_::import("supy.reference.maximal_cliques").attr("CliqueLimitError");
    PyErr_SetString(type.ptr(), error.what());
  } catch (const CliqueSearchInterrupted&) {
    // the handler of the signal has raised
  }
  throw py::error_already_set();
}

const int64_t* int64_array(const TensorView& x, const char* op, const char* name) {
  check_dtype(x, op, name, DType::i64);
  SUPY_CHECK(!x.is_cuda() && x.is_contiguous(), op, name << " must be a contiguous tensor in CPU memory");
  return x.data<int64_t>();
}

py::tuple batched_maximal_cliques(const TensorView& edges, const TensorView& edge_offsets,
                                  const TensorView& node_counts, int64_t limit) {
  const char* op = "batched_maximal_cliques";
  CliqueParams p{};
  p.edges = int64_array(edges, op, "edges");
  p.edge_offsets = int64_array(edge_offsets, op, "edge_offsets");
  p.node_counts = int64_array(node_counts, op, "node_counts");
  SUPY_CHECK(edges.dim() == 2 && edges.size(1) == 2, op, "edges has shape " << edges.shape() << ", expected [M, 2]");
  SUPY_CHECK(node_counts.dim() == 1, op, "node_counts has shape " << node_counts.shape() << ", expected [G]");
  p.num_edges = edges.size(0);
  p.num_graphs = node_counts.size(0);
  SUPY_CHECK(edge_offsets.dim() == 1 && edge_offsets.size(0) == p.num_graphs + 1, op,
             "edge_offsets has shape " << edge_offsets.shape() << ", expected [G + 1] with G=" << p.num_graphs
                                       << " (from node_counts)");
  p.limit = limit;
  p.batched = true;
  const CliqueLists found = search(p);
  return py::make_tuple(tensor_from_malloc(found.graph_offsets, p.num_graphs + 1),
                        tensor_from_malloc(found.offsets, found.num_cliques + 1),
                        tensor_from_malloc(found.nodes, found.num_nodes));
}

py::tuple maximal_cliques(const TensorView& edges, int64_t num_nodes, int64_t limit) {
  const char* op = "maximal_cliques";
  CliqueParams p{};
  p.edges = int64_array(edges, op, "edges");
  SUPY_CHECK(edges.dim() == 2 && edges.size(1) == 2, op, "edges has shape " << edges.shape() << ", expected [M, 2]");
  p.num_edges = edges.size(0);
  const int64_t edge_offsets[] = {0, p.num_edges};
  p.edge_offsets = edge_offsets;
  p.node_counts = &num_nodes;
  p.num_graphs = 1;
  p.limit = limit;
  const CliqueLists found = search(p);
  std::free(found.graph_offsets);
  return py::make_tuple(tensor_from_malloc(found.offsets, found.num_cliques + 1),
                        tensor_from_malloc(found.nodes, found.num_nodes));
}

}  // namespace

SUPY_BINDINGS(maximal_cliques, module) {
  module.def("maximal_cliques", &maximal_cliques);
  module.def("batched_maximal_cliques", &batched_maximal_cliques);
}

}  // namespace supy
