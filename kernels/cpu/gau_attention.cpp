#include "gau_attention.h"

#include <atomic>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "gau_attention_work.h"
#include "parallel.h"
#include "scratch.h"

#define SUPY_KERNEL "gated_attention_unit.inl"
#include "multitarget.h"

namespace supy {
namespace {

GauKernels select(FloatType type, MatrixUnit unit) { SUPY_SELECT(gau_kernels, type, unit); }

int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

// Samples that are worked on together: several short ones, so that there is work for all threads; one long one, because its
// panels are large. It changes no bit.
int64_t group_size(int64_t batch, int64_t tokens, int64_t block, int threads) {
  return std::clamp<int64_t>(4 * threads / std::max<int64_t>(blocks_of(tokens, block), 1), 1, std::max<int64_t>(batch, 1));
}

TokenMatrix sample_of(TokenMatrix m, int64_t b, FloatType type) {
  if (m.data != nullptr) m.data = static_cast<char*>(m.data) + b * m.batch_step * (type == FloatType::f32 ? 4 : 2);
  return m;
}

class Samples {
 public:
  Samples(const GauAttentionParams& p, const GauKernels& kernels, bool swish)
      : p_(p), swish_(swish), rows_(kernels.forward_rows(p.tokens)) {}

  GauSample operator()(int64_t b) const {
    const int64_t T = p_.tokens;
    GauSample s{};
    s.tokens = T, s.length = p_.visible.lengths[b];
    s.rows = rows_, s.key_size = p_.key_size, s.value_size = p_.value_size;
    s.softmax = p_.softmax, s.swish = swish_;
    s.first = p_.visible.first + b * T, s.last = p_.visible.last + b * T;
    s.factor = p_.visible.factor + b * T, s.share = p_.visible.share + b * T;
    s.q = sample_of(p_.q, b, p_.type), s.k = sample_of(p_.k, b, p_.type);
    s.v = sample_of(p_.v, b, p_.type), s.u = sample_of(p_.u, b, p_.type);
    s.out = sample_of(p_.out, b, p_.type), s.attended = sample_of(p_.attended, b, p_.type);
    s.stats = p_.stats == nullptr ? nullptr : p_.stats + b * T;
    return s;
  }

 private:
  const GauAttentionParams& p_;
  bool swish_;
  int64_t rows_;
};

// The memory of one thread; `dim` is 0 without projections.
GauWork work(Pieces& pieces, const GauKernels& kernels, const GauAttentionParams& p, int64_t dim) {
  const int64_t rows = std::max(kernels.forward_block, kernels.row_block), block = std::max(rows, kernels.backward_block);
  const int64_t S = p.key_size, E = p.value_size;
  const int64_t keys = std::max(kernels.keys, kernels.backward_block), deepest = dim > 0 ? 2 * E + S : 0;
  GauWork w{};
  w.left = pieces.take(kernels.left_floats(rows, std::max({S, E, dim, deepest})));
  w.weights = pieces.take(kernels.left_floats(keys, keys));
  w.scores = pieces.take(block * keys);
  w.more = pieces.take(block * keys);
  w.sums = pieces.take(rows * kernels.columns(std::max({S, E, dim, dim > 0 ? kernels.wide : 0})));
  w.strip = pieces.take(kernels.strip);
  w.peak = pieces.take(rows);
  w.total = pieces.take(rows);
  return w;
}

// Memory for what make(Pieces&) takes.
template <class Make>
Scratch memory_for(Make make) {
  Pieces pieces(nullptr);
  make(pieces);
  return Scratch(pieces.used());
}

// A call's memory: for each thread, and for a group of samples, which the next group uses again.
template <class Sample>
struct Memory {
  Memory(const GauKernels& kernels, const GauAttentionParams& p, int64_t dim, int64_t block)
      : threads(threads_for(p.batch * p.tokens * (p.key_size + p.value_size) * (p.tokens + 2 * dim), 1 << 20)),
        step(group_size(p.batch, p.tokens, block, threads)),
        work_(memory_for([&](Pieces& pieces) {
          for (int i = 0; i < threads; ++i) work(pieces, kernels, p, dim);
        })) {
    Pieces pieces(work_.get());
    for (int i = 0; i < threads; ++i) works.push_back(work(pieces, kernels, p, dim));
  }

  // For every group: make(Pieces&, b, Sample&) for each of its samples b, then body(group).
  template <class Make, class Body>
  void for_groups(int64_t batch, Make make, Body body) {
    const Scratch panels = memory_for([&](Pieces& pieces) {
      for (int64_t b = 0; b < std::min(step, batch); ++b) {
        Sample sample{};
        make(pieces, b, sample);
      }
    });
    for (int64_t first = 0; first < batch; first += step) {
      Pieces pieces(panels.get());
      std::vector<Sample> group(std::min(step, batch - first));
      for (size_t i = 0; i < group.size(); ++i) make(pieces, first + static_cast<int64_t>(i), group[i]);
      body(group);
    }
  }

  int threads;
  int64_t step;
  std::vector<GauWork> works;

 private:
  Scratch work_;
};

// body(thread, sample of the group, first row) for every block of rows of a group.
template <class Body>
void for_rows(int64_t group, int64_t tokens, int64_t block, int threads, Body body) {
  const int64_t blocks = blocks_of(tokens, block);
  parallel_for(group * blocks, threads, [&](int thread, int64_t i) { body(thread, i / blocks, i % blocks * block); });
}

void take_forward(Pieces& pieces, const GauKernels& kernels, GauSample& s) {
  const int64_t keys = std::min(kernels.keys, s.tokens);
  s.k_right = pieces.take(kernels.right_floats(s.tokens, s.key_size));
  s.v_turned = pieces.take(blocks_of(s.tokens, kernels.keys) * kernels.right_floats(s.value_size, keys));
}

void take_backward(Pieces& pieces, const GauKernels& kernels, GauSample& s) {
  const int64_t T = s.tokens, S = s.key_size, E = s.value_size;
  const int64_t rows = blocks_of(T, kernels.backward_block) * kernels.backward_block;
  s.q_left = pieces.take(kernels.left_floats(rows, S));
  s.k_right = pieces.take(kernels.right_floats(rows, S));
  s.q_turned = pieces.take(kernels.right_floats(S, T));
  s.k_turned = pieces.take(kernels.right_floats(S, T));
  s.v_right = pieces.take(kernels.right_floats(rows, E));
  s.delta = pieces.take(T);
  s.sum_dq = pieces.take(rows * kernels.columns(S));
  s.sum_dk = pieces.take(rows * kernels.columns(S));
}

// dq, dk and dv of a group, by tiles, in rounds in which each of a sample's rows and keys belong to one tile. A tile waits
// for those of the round before it with its rows or its keys, so the number of threads shows in no bit; tiles are handed
// out in order, so what a tile waits for is being worked on.
void sum_tiles(const GauKernels& kernels, const std::vector<GauSample>& group, std::vector<GauWork>& works, int64_t tokens,
               int threads) {
  const int64_t block = kernels.backward_block, blocks = blocks_of(tokens, block);
  const int64_t samples = static_cast<int64_t>(group.size()), round_size = samples * blocks;
  for_rows(samples, tokens, block, threads, [&](int, int64_t i, int64_t row) {
    const GauSample& s = group[i];
    const int64_t S = kernels.columns(s.key_size), E = kernels.columns(s.value_size);
    std::memset(s.sum_dq + row * S, 0, 4 * block * S);
    std::memset(s.sum_dk + row * S, 0, 4 * block * S);
    std::memset(s.sum_dv + row * E, 0, 4 * block * E);
  });
  std::vector<std::atomic<int64_t>> rows_done(round_size), keys_done(round_size);  // rounds
  parallel_for(round_size * blocks, threads, [&](int thread, int64_t task) {
    const int64_t round = task / round_size, i = task % round_size / blocks, row = task % blocks, key = (row + round) % blocks;
    std::atomic<int64_t>&of_rows = rows_done[i * blocks + row], &of_keys = keys_done[i * blocks + key];
    while (of_rows.load(std::memory_order_acquire) < round || of_keys.load(std::memory_order_acquire) < round)
      std::this_thread::yield();
    kernels.tile_gradient(group[i], works[thread], row * block, key * block);
    of_rows.store(round + 1, std::memory_order_release);
    of_keys.store(round + 1, std::memory_order_release);
  });
}

}  // namespace

void gau_attention_cpu(const GauAttentionParams& p) {
  const GauKernels kernels = select(p.type, matrix_unit());
  const Samples sample(p, kernels, false);
  Memory<GauSample> memory(kernels, p, 0, kernels.forward_block);
  const auto make = [&](Pieces& pieces, int64_t b, GauSample& s) {
    s = sample(b);
    take_forward(pieces, kernels, s);
  };
  memory.for_groups(p.batch, make, [&](const std::vector<GauSample>& group) {
    for_rows(group.size(), p.tokens, kernels.packed, memory.threads,
             [&](int, int64_t i, int64_t key) { kernels.pack_keys(group[i], key); });
    for_rows(group.size(), p.tokens, group[0].rows, memory.threads,
             [&](int thread, int64_t i, int64_t row) { kernels.attend(group[i], memory.works[thread], row); });
  });
}

void gau_attention_backward_cpu(const GauAttentionParams& p, const GauAttentionGradient& g) {
  const GauKernels kernels = select(p.type, matrix_unit());
  const int64_t block = kernels.backward_block, rows = kernels.row_block, T = p.tokens;
  const Samples sample(p, kernels, false);
  Memory<GauSample> memory(kernels, p, 0, block);
  const auto make = [&](Pieces& pieces, int64_t b, GauSample& s) {
    s = sample(b);
    s.grad = sample_of(g.grad, b, p.type), s.attended = sample_of(g.attended, b, p.type);
    s.dq = sample_of(g.dq, b, p.type), s.dk = sample_of(g.dk, b, p.type);
    s.dv = sample_of(g.dv, b, p.type), s.du = sample_of(g.du, b, p.type);
    s.stats = g.stats == nullptr ? nullptr : const_cast<float*>(g.stats) + b * T;
    take_backward(pieces, kernels, s);
    s.g_left = pieces.take(kernels.left_floats(T + block, p.value_size));
    s.g_turned = pieces.take(kernels.right_floats(p.value_size, T));
    s.sum_dv = pieces.take(blocks_of(T, block) * block * kernels.columns(p.value_size));
  };
  memory.for_groups(p.batch, make, [&](const std::vector<GauSample>& group) {
    for_rows(group.size(), T, rows, memory.threads,
             [&](int thread, int64_t i, int64_t row) { kernels.prepare(group[i], memory.works[thread], row); });
    sum_tiles(kernels, group, memory.works, T, memory.threads);
    for_rows(group.size(), T, rows, memory.threads, [&](int, int64_t i, int64_t row) { kernels.finish(group[i], row); });
  });
}

namespace {

int64_t floats_for(int64_t numbers, FloatType type) { return type == FloatType::f32 ? numbers : (numbers + 1) / 2; }

// A weight [rows, columns] as the right side of a product, by all threads.
void pack_weight(const GauKernels& kernels, const void* data, int64_t rows, int64_t columns, bool turned, float* panel,
                 int threads) {
  parallel_for(blocks_of(turned ? columns : rows, kernels.wide), threads,
               [&](int, int64_t i) { kernels.pack_weight(data, rows, columns, turned, i * kernels.wide, panel); });
}

// A sample and its projections.
struct UnitSample {
  GauSample s;
  GauUnit l;
};

// q and k, and h where it is not kept, are written into memory of the group.
void take_unit(Pieces& pieces, const GatedAttentionUnitParams& p, int64_t b, GauSample& s, GauUnit& l) {
  const FloatType type = p.attention.type;
  const int64_t E = s.value_size, S = s.key_size, N = 2 * E + S, bytes = type == FloatType::f32 ? 4 : 2;
  l.dim = p.dim;
  l.x = sample_of(p.x, b, type), l.y = sample_of(p.y, b, type), l.h = sample_of(p.h, b, type);
  if (p.h.data == nullptr) l.h = {pieces.take(floats_for(s.tokens * N, type)), 0, N};
  l.gamma = p.gamma, l.beta = p.beta, l.cosine = p.cosine, l.sine = p.sine;
  s.u = l.h, s.v = l.h;
  if (l.h.data != nullptr) s.v.data = static_cast<char*>(l.h.data) + E * bytes;
  s.q = {pieces.take(floats_for(s.tokens * S, type)), 0, S};
  s.k = {pieces.take(floats_for(s.tokens * S, type)), 0, S};
}

}  // namespace

void gated_attention_unit_cpu(const GatedAttentionUnitParams& p) {
  const GauAttentionParams& a = p.attention;
  const GauKernels kernels = select(a.type, matrix_unit());
  const int64_t E = a.value_size, S = a.key_size;
  const Samples sample(a, kernels, true);
  Memory<UnitSample> memory(kernels, a, p.dim, kernels.forward_block);
  const int threads = memory.threads;
  const char* z = static_cast<const char*>(p.w_in) + 2 * E * p.dim * (a.type == FloatType::f32 ? 4 : 2);
  const Scratch uv_right(kernels.right_floats(2 * E, p.dim)), z_right(kernels.right_floats(S, p.dim)),
      out_right(kernels.right_floats(p.dim, E));
  pack_weight(kernels, p.w_in, 2 * E, p.dim, false, uv_right.get(), threads);
  pack_weight(kernels, z, S, p.dim, false, z_right.get(), threads);
  pack_weight(kernels, p.w_out, p.dim, E, false, out_right.get(), threads);
  const auto make = [&](Pieces& pieces, int64_t b, UnitSample& unit) {
    auto& [s, l] = unit;
    s = sample(b);
    take_unit(pieces, p, b, s, l);
    take_forward(pieces, kernels, s);
    l.uv_right = uv_right.get(), l.z_right = z_right.get(), l.out_right = out_right.get();
  };
  memory.for_groups(a.batch, make, [&](const std::vector<UnitSample>& group) {
    const int64_t rows = group[0].s.rows;
    for_rows(group.size(), a.tokens, rows, threads, [&](int thread, int64_t i, int64_t row) {
      kernels.project(group[i].s, group[i].l, memory.works[thread], row);
    });
    for_rows(group.size(), a.tokens, kernels.packed, threads,
             [&](int, int64_t i, int64_t key) { kernels.pack_keys(group[i].s, key); });
    for_rows(group.size(), a.tokens, rows, threads, [&](int thread, int64_t i, int64_t row) {
      kernels.attend_unit(group[i].s, group[i].l, memory.works[thread], row);
    });
  });
}

void gated_attention_unit_backward_cpu(const GatedAttentionUnitParams& p, const GatedAttentionUnitGradient& g) {
  const GauAttentionParams& a = p.attention;
  const GauKernels kernels = select(a.type, matrix_unit());
  const int64_t T = a.tokens, E = a.value_size, S = a.key_size, N = 2 * E + S, d = p.dim;
  const int64_t block = kernels.backward_block, rows = kernels.row_block;
  const int64_t weight_rows = 96;  // of the gradient of a weight, in one task
  const Samples sample(a, kernels, true);
  Memory<UnitSample> memory(kernels, a, d, block);
  const int threads = memory.threads;
  const int64_t in_floats = (N + weight_rows) * kernels.columns(d), out_floats = (d + weight_rows) * kernels.columns(E);
  const Scratch in_turned(kernels.right_floats(d, N)), out_turned(kernels.right_floats(E, d)), sum_w_in(in_floats),
      sum_w_out(out_floats);
  std::memset(sum_w_in.get(), 0, 4 * in_floats);
  std::memset(sum_w_out.get(), 0, 4 * out_floats);
  std::vector<double> affine(4 * S);
  pack_weight(kernels, p.w_in, N, d, true, in_turned.get(), threads);
  pack_weight(kernels, p.w_out, d, E, true, out_turned.get(), threads);
  const auto make = [&](Pieces& pieces, int64_t b, UnitSample& unit) {
    auto& [s, l] = unit;
    s = sample(b);
    take_unit(pieces, p, b, s, l);
    take_backward(pieces, kernels, s);
    s.du = {pieces.take(floats_for(T * E, a.type)), 0, E};
    l.grad = sample_of(g.grad, b, a.type), l.dx = sample_of(g.dx, b, a.type);
    l.in_turned = in_turned.get(), l.out_turned = out_turned.get();
    l.sum_w_in = sum_w_in.get(), l.sum_w_out = sum_w_out.get();
    l.sum_affine = pieces.take(blocks_of(T, rows) * 4 * S);
    // One after another in time: what w_out needs, then dv; what the tiles need, then what w_in needs.
    const int64_t sum_dv = blocks_of(T, block) * block * kernels.columns(E), gated = kernels.right_floats(E, T);
    s.sum_dv = l.gated_turned = pieces.take(std::max(sum_dv, gated));
    l.grad_turned = l.x_turned = pieces.take(std::max(kernels.left_floats(d + weight_rows, T), kernels.right_floats(d, T)));
    const int64_t left = kernels.left_floats(T + block, E), turned = kernels.right_floats(E, T);
    s.g_left = l.dh_turned = pieces.take(std::max(left + turned, kernels.left_floats(N + weight_rows, T)));
    s.g_turned = s.g_left == nullptr ? nullptr : s.g_left + left;
  };
  memory.for_groups(a.batch, make, [&](const std::vector<UnitSample>& group) {
    std::vector<GauSample> attention;
    for (const auto& [s, l] : group) attention.push_back(s);
    for_rows(group.size(), T, rows, threads, [&](int thread, int64_t i, int64_t row) {
      kernels.prepare_unit(group[i].s, group[i].l, memory.works[thread], row);
    });
    parallel_for(blocks_of(d, weight_rows), threads, [&](int, int64_t i) {
      for (const auto& [s, l] : group) kernels.sum_w_out(s, l, i * weight_rows, weight_rows);
    });
    sum_tiles(kernels, attention, memory.works, T, threads);
    for_rows(group.size(), T, rows, threads, [&](int thread, int64_t i, int64_t row) {
      kernels.finish_unit(group[i].s, group[i].l, memory.works[thread], row);
    });
    parallel_for(blocks_of(N, weight_rows), threads, [&](int, int64_t i) {
      for (const auto& [s, l] : group) kernels.sum_w_in(s, l, i * weight_rows, weight_rows);
    });
    for (const auto& [s, l] : group)
      for (int64_t i = 0; i < blocks_of(T, rows) * 4 * S; ++i) affine[i % (4 * S)] += l.sum_affine[i];
  });
  kernels.round(sum_w_in.get(), kernels.columns(d), N, d, g.dw_in);
  kernels.round(sum_w_out.get(), kernels.columns(E), d, E, g.dw_out);
  for (int64_t i = 0; i < 2 * S; ++i) {
    g.dgamma[i] = static_cast<float>(affine[i]);
    g.dbeta[i] = static_cast<float>(affine[2 * S + i]);
  }
}

}  // namespace supy
