#include "maximal_cliques.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

#ifdef __linux__
#include <malloc.h>
#include <sys/mman.h>
#endif
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "bitset.h"
#include "maximal_cliques_graph.h"
#include "parallel.h"
#include "simd.h"

namespace supy {
namespace cliques {

// A growing array from malloc. realloc moves a large one by remapping its pages, so growing copies nothing, and what
// was not written yet takes no memory.
class Array {
 public:
  Array() = default;
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { std::free(data_); }

  uint64_t* begin() const { return data_; }
  void clear() { size = 0; }
  void push(uint64_t value) {
    if (size == capacity) reserve(size + 1);
    data_[size++] = value;
  }
  void resize(int64_t n) {
    reserve(n);
    size = n;
  }
  void reserve(int64_t least) {
    if (least > capacity) resize_to(std::max({least, capacity + capacity / 2, int64_t{64}}));
  }
  // Hands the memory over, cut to size.
  int64_t* release() {
    resize_to(std::max<int64_t>(size, 1));
    capacity = size = 0;
    return reinterpret_cast<int64_t*>(std::exchange(data_, nullptr));
  }

  int64_t size = 0, capacity = 0;

 private:
  void resize_to(int64_t n) {
    if (n > std::numeric_limits<int64_t>::max() / 8) throw std::bad_alloc();
    void* const moved = std::realloc(data_, n * 8);
    if (!moved) throw std::bad_alloc();
    data_ = static_cast<uint64_t*>(moved);
    capacity = n;
#ifdef __linux__
    // Large pages spare half the time of writing a large result. All of it must be advised, up to the pages' edges:
    // realloc cannot remap a range of two kinds.
    if (n >= 1 << 19) {
      constexpr uintptr_t page = 4096;
      const uintptr_t begin = reinterpret_cast<uintptr_t>(data_) & -page,
                      end = (reinterpret_cast<uintptr_t>(data_) + malloc_usable_size(data_) + page - 1) & -page;
      madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    }
#endif
  }

  uint64_t* data_ = nullptr;
};

// Cliques one after another; offsets[c] is where clique c begins.
struct Lists {
  Array offsets, nodes;
};

struct LimitReached {};

// One call of the search among at most 64 candidates.
struct WordCall {
  uint64_t clique, candidates, excluded;
};

// Asks every few milliseconds whether to stop. Only the calling thread may ask; it tells the others by `stop`.
class Poll {
 public:
  Poll(bool (*interrupted)(), std::atomic<bool>& stop) : interrupted_(interrupted), stop_(stop) {}

  void tick(int64_t work = 1) {
    if ((fuel_ -= work) < 0) ask();
  }

 private:
  void ask() {
    fuel_ = 1 << 18;
    if (interrupted_ && interrupted_()) stop_ = true;
    if (stop_) throw CliqueSearchInterrupted();
  }

  bool (*interrupted_)();
  std::atomic<bool>& stop_;
  int64_t fuel_ = 1 << 18;
};

}  // namespace cliques
}  // namespace supy

#define SUPY_KERNEL "maximal_cliques.inl"
#include "multitarget.h"

namespace supy {
namespace {

using namespace cliques;

// The functions of maximal_cliques.inl for this processor.
void search_word(const WordCall& call, const uint64_t* rows, const uint64_t* outside, int64_t num_outside, Array& found,
                 int64_t most, Array& stack, Poll& poll) {
  SUPY_SELECT(search_word, call, rows, outside, num_outside, found, most, stack, poll);
}
template <class Report>
void search_wide(const uint64_t* rows, int64_t candidates, const uint64_t* outside, int64_t num_outside, Poll& poll,
                 Report&& report) {
  SUPY_SELECT(search_wide, rows, candidates, outside, num_outside, poll, report);
}
void sort_descending(uint64_t* begin, uint64_t* end) { SUPY_SELECT(sort_descending, begin, end); }
int64_t count_nodes(const uint64_t* begin, const uint64_t* end) { SUPY_SELECT(count_nodes, begin, end); }
void write_masks(uint64_t* begin, uint64_t* end, const std::vector<uint64_t>& prefix, const uint64_t* names,
                 uint64_t* nodes, int64_t first) {
  SUPY_SELECT(write_masks, begin, end, prefix.data(), prefix.size(), names, nodes, nodes + first);
}

// Appends the cliques of one graph after another to `out`, in lexicographic order.
//
// Up to 64 nodes, a graph is one word search. A larger one is split by the smallest node of the clique, v: its
// neighbours after v are candidates and those before v are outside, so the cliques of one v follow those of the last
// and are sorted among themselves. That keeps the order without holding more than one v's cliques, whose masks even
// lie where their offsets will. More than 64 candidates (a hub) are searched in degeneracy order, which makes the
// subproblems small; if those cliques outgrow their store, the hub's neighbourhood is split by the second node, and
// so on.
class Enumerator {
 public:
  Enumerator(Lists& out, Poll& poll, int64_t limit)
      : out_(out), poll_(poll), limit_(limit < 0 ? std::numeric_limits<int64_t>::max() : limit) {
    std::iota(identity_, identity_ + 64, 0);
  }

  // num_nodes <= 64; row i has the neighbours of i.
  void small_graph(const uint64_t* rows, int num_nodes) {
    begin_ = out_.offsets.size;
    if (num_nodes == 0) return;
    search(num_nodes, rows, nullptr, 0);
    write(begin_, identity_);
  }

  void large_graph(const Graph& graph) {
    begin_ = out_.offsets.size;
    split(graph, 0, 0);
  }

 private:
  static constexpr int64_t kStoreBytes = 6 << 20;
  static constexpr int kMostSplits = 64;  // a bound for the machine's stack; beyond it the store may grow

  int64_t room() const { return limit_ - (out_.offsets.size - begin_) - static_cast<int64_t>(starts_.size()); }

  // The maximal cliques of `graph` with a node >= `outside`, each after the nodes of prefix_. The nodes below `outside`
  // are excluded.
  void split(const Graph& graph, int outside, int depth) {
    std::vector<int> members;  // neighbours of v: the excluded ones, then the candidates, ascending
    for (int v = outside; v < graph.num_nodes; ++v) {
      poll_.tick();
      const Range later = graph.later(v), earlier = graph.earlier(v);
      const int *later_above = std::lower_bound(later.begin(), later.end(), v),
                *earlier_above = std::lower_bound(earlier.begin(), earlier.end(), v);
      members.assign(later.begin(), later_above);
      members.insert(members.end(), earlier.begin(), earlier_above);
      const int excluded = members.size();
      members.resize(later.size() + earlier.size());
      std::merge(later_above, later.end(), earlier_above, earlier.end(), members.begin() + excluded);
      const int candidates = members.size() - excluded;

      if (candidates > 64 && dominated(graph, members, excluded)) continue;
      prefix_.push_back(graph.names[v]);
      if (candidates == 0) {
        if (excluded == 0) write_prefix();
      } else if (candidates <= 64) {
        const int64_t first = out_.offsets.size;
        search(graph, members, excluded);
        for (int i = 0; i < candidates; ++i) names_[i] = graph.names[members[excluded + i]];
        write(first, names_);
      } else {
        const Graph inside(graph, members);
        if (collect(inside, excluded, depth < kMostSplits)) {
          write_store(inside);
        } else {
          split(inside, excluded, depth + 1);
        }
      }
      prefix_.pop_back();
    }
  }

  // As split, but in degeneracy order and into the store; false, and an empty store, when they do not fit into it.
  bool collect(const Graph& graph, int outside, bool bounded) {
    std::vector<int> members;
    bool fits = true;
    for (int v = outside; v < graph.num_nodes && fits; ++v) {
      const Range later = graph.later(v), earlier = graph.earlier(v);
      const int* const inner = std::lower_bound(later.begin(), later.end(), outside);
      members.assign(earlier.begin(), earlier.end());
      members.insert(members.end(), later.begin(), inner);
      const int excluded = members.size();
      members.insert(members.end(), inner, later.end());
      const int candidates = members.size() - excluded;
      if (candidates > 64 && dominated(graph, members, excluded)) continue;

      // A clique in the store: its nodes ascending, then -1.
      const auto store = [&](const uint64_t* set) {
        starts_.push_back(store_.size());
        store_.push_back(v);
        for (int64_t w = 0; w < bits::words(candidates); ++w) {
          bits::each(set[w], [&](int i) { store_.push_back(members[excluded + w * 64 + i]); });
        }
        const auto begin = store_.begin() + starts_.back();
        std::rotate(begin, begin + 1, std::lower_bound(begin + 1, store_.end(), v));
        store_.push_back(-1);
        const int64_t bytes = store_.size() * sizeof(store_[0]) + starts_.size() * sizeof(starts_[0]);
        return fits = !bounded || bytes <= kStoreBytes;
      };
      if (candidates == 0) {
        if (excluded == 0 && room() == 0) throw LimitReached();
        if (excluded == 0) store(nullptr);
      } else if (candidates <= 64) {
        const int64_t first = out_.offsets.size;
        search(graph, members, excluded);
        const int64_t last = std::exchange(out_.offsets.size, first);
        for (int64_t c = first; c < last && fits; ++c) {
          const uint64_t mask = out_.offsets.begin()[c];
          store(&mask);
        }
      } else {
        load(graph, members, excluded);
        search_wide(rows_.data() + excluded * bits::words(candidates), candidates, rows_.data(), excluded, poll_,
                    [&](const uint64_t* set) {
                      if (room() == 0) throw LimitReached();
                      return store(set);
                    });
      }
    }
    if (!fits) store_.clear(), starts_.clear();
    return fits;
  }

  // Appends masks to out_.offsets.
  void search(int candidates, const uint64_t* rows, const uint64_t* outside, int num_outside) {
    const WordCall all{0, bits::first_n(candidates), 0};
    search_word(all, rows, outside, num_outside, out_.offsets, room(), stack_, poll_);
  }
  // As above, for at most 64 candidates of a larger graph. Among many members, where every second node on a list is
  // another member, a row is gathered without branches, from the node's whole list; or, where that is the endless list
  // of a hub, by a look into the candidates' lists.
  void search(const Graph& graph, const std::vector<int>& members, int excluded) {
    const int candidates = members.size() - excluded;
    if (members.size() <= 24) {
      load(graph, members, excluded);
      return search(candidates, rows_.data() + excluded, rows_.data(), excluded);
    }
    const int* const candidate = &members[excluded];
    for (int i = 0; i < candidates; ++i) graph.mark[candidate[i]] = bits::bit(i);
    rows_.resize(members.size());
    bool dominated = false;
    for (size_t i = 0; i < members.size() && !dominated; ++i) {
      const int v = members[i];
      const Range later = graph.later(v), earlier = graph.earlier(v);
      uint64_t row = 0;
      for (const int u : later) row |= graph.mark[u];
      if (earlier.size() <= 8 * candidates) {
        for (const int u : earlier) row |= graph.mark[u];
      } else {
        for (int k = 0; k < candidates; ++k) {
          const Range list = graph.later(candidate[k]);
          if (std::binary_search(list.begin(), list.end(), v)) row |= bits::bit(k);
        }
      }
      rows_[i] = row;
      dominated = row == bits::first_n(candidates);  // no candidate sees itself, so v is excluded
    }
    for (int i = 0; i < candidates; ++i) graph.mark[candidate[i]] = 0;
    if (!dominated) search(candidates, rows_.data() + excluded, rows_.data(), excluded);
  }

  // Row i: the candidates, as bits, that members[i] sees. Edges are taken from their earlier end, where lists are
  // short: no node of a graph with M edges has more than sqrt(2 M) later neighbours.
  void load(const Graph& graph, const std::vector<int>& members, int excluded) {
    const int size = members.size();
    const int64_t words = bits::words(size - excluded);
    rows_.assign(size * words, 0);
    for (int i = 0; i < size; ++i) graph.mark[members[i]] = i + 1;
    for (int i = 0; i < size; ++i) {
      for (const int u : graph.later(members[i])) {
        const int j = static_cast<int>(graph.mark[u]) - 1;
        if (j >= excluded) bits::add(&rows_[i * words], j - excluded);
        if (i >= excluded && j >= 0) bits::add(&rows_[j * words], i - excluded);
      }
    }
    for (const int u : members) graph.mark[u] = 0;
  }

  // Whether an excluded node sees every candidate, so that nothing here is maximal.
  static bool dominated(const Graph& graph, const std::vector<int>& members, int excluded) {
    const auto candidates = members.begin() + excluded;
    return std::any_of(members.begin(), candidates, [&](int x) {
      return std::all_of(candidates, members.end(), [&](int u) { return graph.adjacent(x, u); });
    });
  }

  void write_prefix() {
    if (room() == 0) throw LimitReached();
    out_.offsets.push(out_.nodes.size);
    for (const uint64_t node : prefix_) out_.nodes.push(node);
  }

  // The masks from `first` on become sorted cliques, in place.
  void write(int64_t first, const uint64_t* names) {
    uint64_t *const begin = out_.offsets.begin() + first, *const end = out_.offsets.begin() + out_.offsets.size;
    sort_descending(begin, end);
    const int64_t size = out_.nodes.size;
    out_.nodes.resize(size + count_nodes(begin, end) + (end - begin) * prefix_.size());
    write_masks(begin, end, prefix_, names, out_.nodes.begin(), size);
  }

  void write_store(const Graph& graph) {
    std::sort(starts_.begin(), starts_.end(), [&](int64_t a, int64_t b) {
      const int *p = &store_[a], *q = &store_[b];
      while (*p == *q) ++p, ++q;  // ends: of two maximal cliques, neither holds the other
      return *p < *q;
    });
    for (const int64_t start : std::exchange(starts_, {})) {
      out_.offsets.push(out_.nodes.size);
      for (const uint64_t node : prefix_) out_.nodes.push(node);
      for (const int* p = &store_[start]; *p >= 0; ++p) out_.nodes.push(graph.names[*p]);
    }
    store_.clear();
  }

  Lists& out_;
  Poll& poll_;
  const int64_t limit_;
  Array stack_;               // of the word search
  int64_t begin_ = 0;         // where the graph's cliques begin in `out_`
  std::vector<uint64_t> prefix_;  // of every clique of the subgraph being split
  uint64_t names_[64], identity_[64];
  std::vector<uint64_t> rows_;
  std::vector<int> store_;
  std::vector<int64_t> starts_;
};

// Fills row i with the neighbours of i in graph g, which has at most 64 nodes.
void read_rows(const CliqueParams& p, int64_t g, uint64_t* rows) {
  const int n = p.node_counts[g];
  std::fill_n(rows, n, 0);
  for (int64_t e = p.edge_offsets[g]; e < p.edge_offsets[g + 1]; ++e) {
    const auto [a, b] = edge(p, g, e);
    rows[a] |= bits::bit(b);
    rows[b] |= bits::bit(a);
  }
  for (int i = 0; i < n; ++i) rows[i] &= ~bits::bit(i);
}

[[noreturn]] void limit_exceeded(const CliqueParams& p, int64_t g) {
  throw CliqueLimitExceeded((p.batched ? "supy.batched_maximal_cliques: graph " + std::to_string(g)
                                       : std::string("supy.maximal_cliques: the graph")) +
                            " has more than limit=" + std::to_string(p.limit) + " maximal cliques");
}

// The cliques of graphs [begin, end), one after another, and how many each graph has.
void enumerate(const CliqueParams& p, int64_t begin, int64_t end, Lists& out, Poll& poll, int64_t* counts) {
  Enumerator cliques(out, poll, p.limit);
  for (int64_t g = begin; g < end; ++g) {
    const int64_t before = out.offsets.size, n = p.node_counts[g], m = p.edge_offsets[g + 1] - p.edge_offsets[g];
    poll.tick();
    try {
      if (n <= 64) {
        uint64_t rows[64];
        read_rows(p, g, rows);
        cliques.small_graph(rows, n);
      } else if (p.limit >= 0 && n - 2 * m > p.limit) {  // so many nodes have no edge, and need no memory to say so
        limit_exceeded(p, g);
      } else {
        cliques.large_graph(Graph(p, g));
      }
    } catch (const LimitReached&) {
      limit_exceeded(p, g);
    }
    counts[g] = out.offsets.size - before;
  }
}

// The cliques of the only graph, of at most 64 nodes, on several threads: a task for each of the two smallest nodes of
// a clique, so that the cliques of one task follow those of the last. As ever, masks become offsets in place.
void enumerate_one(const CliqueParams& p, int threads, Lists& out, std::atomic<bool>& stop) {
  uint64_t rows[64], names[64];
  read_rows(p, 0, rows);
  std::iota(names, names + 64, 0);
  struct Task {
    WordCall call;
    int thread = 0;
    int64_t begin = 0, count = 0, nodes = 0;  // where its masks are among its thread's, how many, of how many nodes
  };
  std::vector<Task> tasks;
  for (int v = 0; v < p.node_counts[0]; ++v) {
    if (!rows[v]) tasks.push_back({{0, bits::bit(v), 0}});
    bits::each(rows[v] & ~bits::first_n(v + 1), [&](int u) {
      const uint64_t common = rows[v] & rows[u], candidates = common & ~bits::first_n(u + 1);
      if (!common) {
        tasks.push_back({{bits::bit(v), bits::bit(u), 0}});
      } else if (candidates) {
        tasks.push_back({{bits::bit(v) | bits::bit(u), candidates, common & ~candidates}});
      }
    });
  }

  constexpr int64_t kWorthThreads = 1 << 13;
  const int64_t num_tasks = tasks.size(), most = p.limit < 0 ? std::numeric_limits<int64_t>::max() : p.limit;
  std::vector<Array> found(threads), stacks(threads);
  std::vector<Poll> polls;
  for (int t = 0; t < threads; ++t) polls.emplace_back(t == 0 ? p.interrupted : nullptr, stop);
  try {
    const auto run = [&](int thread, int64_t i) {
      Task& task = tasks[i];
      Array& masks = found[thread];
      task.thread = thread;
      task.begin = masks.size;
      search_word(task.call, rows, nullptr, 0, masks, most - masks.size, stacks[thread], polls[thread]);
      uint64_t *const begin = masks.begin() + task.begin, *const end = masks.begin() + masks.size;
      sort_descending(begin, end);
      task.count = end - begin;
      task.nodes = count_nodes(begin, end);
    };
    // Waiting for other threads can take longer than a small search, and its size shows only as it goes.
    int64_t alone = 0;
    while (alone < num_tasks && found[0].size < kWorthThreads) run(0, alone++);
    if (alone == num_tasks) threads = 1;
    parallel_for(num_tasks - alone, threads, [&](int thread, int64_t i) { run(thread, alone + i); });
  } catch (const LimitReached&) {
    limit_exceeded(p, 0);
  }

  // From here on, where a task's cliques and nodes begin in the result.
  std::vector<int64_t> first_clique{0}, first_node{0};
  for (const Task& task : tasks) {
    first_clique.push_back(first_clique.back() + task.count);
    first_node.push_back(first_node.back() + task.nodes);
  }
  if (first_clique.back() > most) limit_exceeded(p, 0);
  out.offsets.reserve(first_clique.back() + 1);
  out.offsets.size = first_clique.back();
  uint64_t* const offsets = out.offsets.begin();
  for (int64_t i = 0; i < num_tasks; ++i) {
    std::copy_n(found[tasks[i].thread].begin() + tasks[i].begin, tasks[i].count, offsets + first_clique[i]);
  }
  found.clear();  // before the nodes take memory
  out.nodes.resize(first_node.back());
  parallel_for(num_tasks, threads, [&](int, int64_t i) {
    write_masks(offsets + first_clique[i], offsets + first_clique[i + 1], {}, names, out.nodes.begin(), first_node[i]);
  });
}

void check(const CliqueParams& p) {
  const auto at = [](const char* name, int64_t i, int64_t value) {
    return std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(value) + ", expected ";
  };
  for (int64_t g = 0; g < p.num_graphs; ++g) {
    const int64_t n = p.node_counts[g], begin = p.edge_offsets[g], end = p.edge_offsets[g + 1];
    if (n < 0 || n > std::numeric_limits<int>::max()) {
      bad_argument(p, (p.batched ? at("node_counts", g, n) : "num_nodes is " + std::to_string(n) + ", expected ") +
                          "0 to 2147483647");
    }
    if (begin > end) {
      bad_argument(p, at("edge_offsets", g + 1, end) + "at least edge_offsets[" + std::to_string(g) + "], which is " +
                          std::to_string(begin));
    }
  }
  if (p.edge_offsets[0] != 0) bad_argument(p, at("edge_offsets", 0, p.edge_offsets[0]) + "0");
  const int64_t last = p.edge_offsets[p.num_graphs];
  if (last != p.num_edges) {
    bad_argument(p, at("edge_offsets", p.num_graphs, last) + std::to_string(p.num_edges) + ", the number of edges");
  }
}

// Appends `from` + shift to `to`, which has the room, giving memory back as it goes.
void move_to(uint64_t* to, Array& from, uint64_t shift) {
  constexpr int64_t kStep = 1 << 17;  // 1 MB
  for (int64_t i = 0; i < from.size; i += kStep) {
    const int64_t n = std::min(kStep, from.size - i);
    for (int64_t k = 0; k < n; ++k) to[i + k] = from.begin()[i + k] + shift;
#ifdef __linux__
    const uintptr_t page = 4096, low = (reinterpret_cast<uintptr_t>(from.begin() + i) + page - 1) & ~(page - 1),
                    high = reinterpret_cast<uintptr_t>(from.begin() + i + n) & ~(page - 1);
    if (from.size > kStep && high > low) madvise(reinterpret_cast<void*>(low), high - low, MADV_DONTNEED);
#endif
  }
}

}  // namespace

CliqueLists maximal_cliques_cpu(const CliqueParams& p) {
  check(p);
  // A guess at the nanoseconds: cliques multiply with the mean degree. Below a millisecond, threads do not pay.
  const double nodes = std::accumulate(p.node_counts, p.node_counts + p.num_graphs, 1.0);
  const double work = p.num_edges * std::exp2(std::min(0.75 * p.num_edges / nodes, 30.0));
  const int threads = threads_for(static_cast<int64_t>(work), 1000000);
  const bool split_one = p.num_graphs == 1 && p.node_counts[0] > 32 && p.node_counts[0] <= 64;
  const int parts = split_one ? 1 : std::clamp<int64_t>(p.num_graphs, 1, threads);
  std::vector<Lists> lists(parts);
  std::atomic<bool> stop{false};
  Array graph_offsets;
  graph_offsets.resize(p.num_graphs + 1);
  int64_t* const counts = reinterpret_cast<int64_t*>(graph_offsets.begin()) + 1;
  counts[-1] = 0;
  if (split_one) {
    enumerate_one(p, threads_for(INT64_MAX, 1), lists[0], stop);
    counts[0] = lists[0].offsets.size;
  } else {
    parallel_for(parts, parts, [&](int thread, int64_t part) {
      Poll poll(thread == 0 ? p.interrupted : nullptr, stop);
      enumerate(p, p.num_graphs * part / parts, p.num_graphs * (part + 1) / parts, lists[part], poll, counts);
    });
  }
  std::partial_sum(counts, counts + p.num_graphs, counts);

  // The arrays of the first part become the result; the others follow.
  std::vector<int64_t> cliques{0}, members{0};
  for (const Lists& part : lists) {
    cliques.push_back(cliques.back() + part.offsets.size);
    members.push_back(members.back() + part.nodes.size);
  }
  Array &offsets = lists[0].offsets, &all = lists[0].nodes;
  offsets.reserve(cliques.back() + 1);
  all.reserve(members.back());
  for (int t = 1; t < parts; ++t) {
    move_to(offsets.begin() + cliques[t], lists[t].offsets, members[t]);
    move_to(all.begin() + members[t], lists[t].nodes, 0);
  }
  offsets.size = cliques.back();
  all.size = members.back();
  offsets.push(all.size);
  return {graph_offsets.release(), offsets.release(), all.release(), cliques.back(), members.back()};
}

}  // namespace supy
