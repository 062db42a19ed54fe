#include "gau_attention.h"

#include <cstring>
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
  Samples(const GauAttentionParams& p, bool swish) : p_(p), swish_(swish) {}

  GauSample operator()(int64_t b) const {
    const int64_t T = p_.tokens;
    GauSample s{};
    s.tokens = T, s.length = p_.visible.lengths[b];
    s.key_size = p_.key_size, s.value_size = p_.value_size;
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
};

// The memory of one thread; `dim` is 0 without projections.
GauWork work(Pieces& pieces, const GauKernels& kernels, const GauAttentionParams& p, int64_t dim) {
  const int64_t block = std::max(kernels.forward_block, kernels.backward_block), S = p.key_size, E = p.value_size;
  const int64_t keys = std::max(kernels.keys, kernels.backward_block), deepest = dim > 0 ? 2 * E + S : 0;
  GauWork w{};
  w.left = pieces.take(kernels.left_floats(block, std::max({S, E, dim, deepest})));
  w.weights = pieces.take(kernels.left_floats(keys, keys));
  w.scores = pieces.take(block * keys);
  w.more = pieces.take(block * keys);
  w.sums = pieces.take(block * kernels.columns(std::max({S, E, dim, dim > 0 ? kernels.strip : 0})));
  w.dh = pieces.take(dim > 0 ? block * kernels.columns(deepest) : 0);
  w.peak = pieces.take(block);
  w.total = pieces.take(block);
  return w;
}

// Calls make(Pieces&) twice: to learn the size, and with memory, which it returns too.
template <class Make>
auto allocate(Make make) {
  Pieces size(nullptr);
  make(size);
  Scratch memory(size.used());
  Pieces pieces(memory.get());
  auto made = make(pieces);
  return std::make_pair(std::move(memory), std::move(made));
}

auto works(const GauKernels& kernels, const GauAttentionParams& p, int64_t dim, int threads) {
  return allocate([&](Pieces& pieces) {
    std::vector<GauWork> all;
    for (int i = 0; i < threads; ++i) all.push_back(work(pieces, kernels, p, dim));
    return all;
  });
}

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

// dq, dk and dv of a group, by tiles: in each round a tile's rows and its keys belong to one thread, and rounds follow a
// fixed order, so the number of threads shows in no bit.
void sum_tiles(const GauKernels& kernels, const std::vector<GauSample>& group, std::vector<GauWork>& works, int64_t tokens,
               int threads) {
  const int64_t block = kernels.backward_block, blocks = blocks_of(tokens, block);
  for_rows(group.size(), tokens, block, threads, [&](int, int64_t i, int64_t row) {
    const GauSample& s = group[i];
    const int64_t S = kernels.columns(s.key_size), E = kernels.columns(s.value_size);
    std::memset(s.sum_dq + row * S, 0, 4 * block * S);
    std::memset(s.sum_dk + row * S, 0, 4 * block * S);
    std::memset(s.sum_dv + row * E, 0, 4 * block * E);
  });
  for (int64_t round = 0; round < blocks; ++round)
    for_rows(group.size(), tokens, block, threads, [&](int thread, int64_t i, int64_t row) {
      kernels.tile_gradient(group[i], works[thread], row, (row / block + round) % blocks * block);
    });
}

int threads_of(const GauAttentionParams& p, int64_t dim) {
  return threads_for(p.batch * p.tokens * (p.key_size + p.value_size) * (p.tokens + 2 * dim), 1 << 20);
}

}  // namespace

void gau_attention_cpu(const GauAttentionParams& p) {
  const GauKernels kernels = select(p.type, matrix_unit());
  const int threads = threads_of(p, 0);
  const int64_t step = group_size(p.batch, p.tokens, kernels.forward_block, threads);
  const Samples sample(p, false);
  auto [memory, work] = works(kernels, p, 0, threads);
  for (int64_t b = 0; b < p.batch; b += step) {
    auto [panels, samples] = allocate([&](Pieces& pieces) {
      std::vector<GauSample> group;
      for (int64_t i = b; i < std::min(b + step, p.batch); ++i) take_forward(pieces, kernels, group.emplace_back(sample(i)));
      return group;
    });
    auto& group = samples;
    for_rows(group.size(), p.tokens, kernels.keys, threads,
             [&](int, int64_t i, int64_t key) { kernels.pack_keys(group[i], key / kernels.keys); });
    for_rows(group.size(), p.tokens, kernels.forward_block, threads,
             [&, &work = work](int thread, int64_t i, int64_t row) { kernels.attend(group[i], work[thread], row); });
  }
}

void gau_attention_backward_cpu(const GauAttentionParams& p, const GauAttentionGradient& g) {
  const GauKernels kernels = select(p.type, matrix_unit());
  const int threads = threads_of(p, 0);
  const int64_t block = kernels.backward_block, step = group_size(p.batch, p.tokens, block, threads), T = p.tokens;
  const Samples sample(p, false);
  auto [memory, made] = works(kernels, p, 0, threads);
  auto& work = made;
  for (int64_t b = 0; b < p.batch; b += step) {
    auto [panels, samples] = allocate([&](Pieces& pieces) {
      std::vector<GauSample> group;
      for (int64_t i = b; i < std::min(b + step, p.batch); ++i) {
        GauSample& s = group.emplace_back(sample(i));
        s.grad = sample_of(g.grad, i, p.type), s.attended = sample_of(g.attended, i, p.type);
        s.dq = sample_of(g.dq, i, p.type), s.dk = sample_of(g.dk, i, p.type);
        s.dv = sample_of(g.dv, i, p.type), s.du = sample_of(g.du, i, p.type);
        s.stats = g.stats == nullptr ? nullptr : const_cast<float*>(g.stats) + i * T;
        take_backward(pieces, kernels, s);
        s.g_left = pieces.take(kernels.left_floats(T + block, p.value_size));
        s.g_turned = pieces.take(kernels.right_floats(p.value_size, T));
        s.sum_dv = pieces.take(blocks_of(T, block) * block * kernels.columns(p.value_size));
      }
      return group;
    });
    auto& group = samples;
    for_rows(group.size(), T, block, threads,
             [&](int thread, int64_t i, int64_t row) { kernels.prepare(group[i], work[thread], row); });
    sum_tiles(kernels, group, work, T, threads);
    for_rows(group.size(), T, block, threads, [&](int, int64_t i, int64_t row) { kernels.finish(group[i], row); });
  }
}

namespace {

int64_t floats_for(int64_t numbers, FloatType type) { return type == FloatType::f32 ? numbers : (numbers + 1) / 2; }

// A weight [rows, columns] as the right side of a product, by all threads.
void pack_weight(const GauKernels& kernels, const void* data, int64_t rows, int64_t columns, bool turned, float* panel,
                 int threads) {
  parallel_for(blocks_of(turned ? columns : rows, kernels.strip), threads,
               [&](int, int64_t i) { kernels.pack_weight(data, rows, columns, turned, i * kernels.strip, panel); });
}

// The parts of h and the projections of sample b. q and k are written into memory of the group.
void take_unit(Pieces& pieces, const GatedAttentionUnitParams& p, int64_t b, GauSample& s, GauUnit& l) {
  const FloatType type = p.attention.type;
  const int64_t E = s.value_size, S = s.key_size, N = 2 * E + S, bytes = type == FloatType::f32 ? 4 : 2;
  l.dim = p.dim;
  l.x = sample_of(p.x, b, type), l.y = sample_of(p.y, b, type), l.h = sample_of(p.h, b, type);
  if (p.h.data == nullptr) l.h = {pieces.take(floats_for(s.tokens * N, type)), 0, N};
  l.scale = p.scale, l.offset = p.offset, l.cosine = p.cosine, l.sine = p.sine;
  s.u = l.h, s.v = l.h;
  if (l.h.data != nullptr) s.v.data = static_cast<char*>(l.h.data) + E * bytes;
  s.q = {pieces.take(floats_for(s.tokens * S, type)), 0, S};
  s.k = {pieces.take(floats_for(s.tokens * S, type)), 0, S};
}

using Group = std::vector<std::pair<GauSample, GauUnit>>;

}  // namespace

void gated_attention_unit_cpu(const GatedAttentionUnitParams& p) {
  const GauAttentionParams& a = p.attention;
  const GauKernels kernels = select(a.type, matrix_unit());
  const int threads = threads_of(a, p.dim);
  const int64_t step = group_size(a.batch, a.tokens, kernels.forward_block, threads), E = a.value_size, S = a.key_size;
  const Samples sample(a, true);
  auto [memory, made] = works(kernels, a, p.dim, threads);
  auto& work = made;
  const char* z = static_cast<const char*>(p.w_in) + 2 * E * p.dim * (a.type == FloatType::f32 ? 4 : 2);
  const Scratch uv_right(kernels.right_floats(2 * E, p.dim)), z_right(kernels.right_floats(S, p.dim)),
      out_right(kernels.right_floats(p.dim, E));
  pack_weight(kernels, p.w_in, 2 * E, p.dim, false, uv_right.get(), threads);
  pack_weight(kernels, z, S, p.dim, false, z_right.get(), threads);
  pack_weight(kernels, p.w_out, p.dim, E, false, out_right.get(), threads);
  for (int64_t b = 0; b < a.batch; b += step) {
    auto [panels, samples] = allocate([&](Pieces& pieces) {
      Group group;
      for (int64_t i = b; i < std::min(b + step, a.batch); ++i) {
        auto& [s, l] = group.emplace_back(sample(i), GauUnit{});
        take_unit(pieces, p, i, s, l);
        take_forward(pieces, kernels, s);
        l.uv_right = uv_right.get(), l.z_right = z_right.get(), l.out_right = out_right.get();
      }
      return group;
    });
    auto& group = samples;
    for_rows(group.size(), a.tokens, kernels.forward_block, threads, [&](int thread, int64_t i, int64_t row) {
      kernels.project(group[i].first, group[i].second, work[thread], row);
    });
    for_rows(group.size(), a.tokens, kernels.keys, threads,
             [&](int, int64_t i, int64_t key) { kernels.pack_keys(group[i].first, key / kernels.keys); });
    for_rows(group.size(), a.tokens, kernels.forward_block, threads, [&](int thread, int64_t i, int64_t row) {
      kernels.attend_unit(group[i].first, group[i].second, work[thread], row);
    });
  }
}

void gated_attention_unit_backward_cpu(const GatedAttentionUnitParams& p, const GatedAttentionUnitGradient& g) {
  const GauAttentionParams& a = p.attention;
  const GauKernels kernels = select(a.type, matrix_unit());
  const int threads = threads_of(a, p.dim);
  const int64_t T = a.tokens, E = a.value_size, S = a.key_size, N = 2 * E + S, d = p.dim, block = kernels.backward_block;
  const int64_t step = group_size(a.batch, T, block, threads), weight_rows = 96;
  const Samples sample(a, true);
  auto [memory, made] = works(kernels, a, d, threads);
  auto& work = made;
  const int64_t in_floats = (N + weight_rows) * kernels.columns(d), out_floats = (d + weight_rows) * kernels.columns(E);
  const Scratch in_turned(kernels.right_floats(d, N)), out_turned(kernels.right_floats(E, d)), sum_w_in(in_floats),
      sum_w_out(out_floats);
  std::memset(sum_w_in.get(), 0, 4 * in_floats);
  std::memset(sum_w_out.get(), 0, 4 * out_floats);
  std::vector<double> affine(4 * S);
  pack_weight(kernels, p.w_in, N, d, true, in_turned.get(), threads);
  pack_weight(kernels, p.w_out, d, E, true, out_turned.get(), threads);
  for (int64_t b = 0; b < a.batch; b += step) {
    auto [panels, samples] = allocate([&](Pieces& pieces) {
      Group group;
      for (int64_t i = b; i < std::min(b + step, a.batch); ++i) {
        auto& [s, l] = group.emplace_back(sample(i), GauUnit{});
        take_unit(pieces, p, i, s, l);
        take_backward(pieces, kernels, s);
        s.du = {pieces.take(floats_for(T * E, a.type)), 0, E};
        l.grad = sample_of(g.grad, i, a.type), l.dx = sample_of(g.dx, i, a.type);
        l.in_turned = in_turned.get(), l.out_turned = out_turned.get();
        l.sum_w_in = sum_w_in.get(), l.sum_w_out = sum_w_out.get();
        l.sum_affine = pieces.take(blocks_of(T, block) * 4 * S);
        // One piece after another in time: what w_out needs, then dv; what the tiles need, then what w_in needs.
        const int64_t sum_dv = blocks_of(T, block) * block * kernels.columns(E), gated = kernels.right_floats(E, T);
        s.sum_dv = l.gated_turned = pieces.take(std::max(sum_dv, gated));
        l.grad_turned = l.x_turned = pieces.take(std::max(kernels.left_floats(d, T), kernels.right_floats(d, T)));
        const int64_t left = kernels.left_floats(T + block, E), turned = kernels.right_floats(E, T);
        s.g_left = l.dh_turned = pieces.take(std::max(left + turned, kernels.left_floats(N + weight_rows, T)));
        s.g_turned = s.g_left == nullptr ? nullptr : s.g_left + left;
      }
      return group;
    });
    auto& group = samples;
    std::vector<GauSample> attention;
    for (const auto& [s, l] : group) attention.push_back(s);
    for_rows(group.size(), T, block, threads, [&](int thread, int64_t i, int64_t row) {
      kernels.prepare_unit(group[i].first, group[i].second, work[thread], row);
    });
    parallel_for(blocks_of(d, weight_rows), threads, [&](int, int64_t i) {
      for (const auto& [s, l] : group) kernels.sum_w_out(s, l, i * weight_rows, weight_rows);
    });
    sum_tiles(kernels, attention, work, T, threads);
    for_rows(group.size(), T, block, threads, [&](int thread, int64_t i, int64_t row) {
      kernels.finish_unit(group[i].first, group[i].second, work[thread], row);
    });
    parallel_for(blocks_of(N, weight_rows), threads, [&](int, int64_t i) {
      for (const auto& [s, l] : group) kernels.sum_w_in(s, l, i * weight_rows, weight_rows);
    });
    for (const auto& [s, l] : group)
      for (int64_t i = 0; i < blocks_of(T, block) * 4 * S; ++i) affine[i % (4 * S)] += l.sum_affine[i];
  }
  kernels.round(sum_w_in.get(), kernels.columns(d), N, d, g.dw_in);
  kernels.round(sum_w_out.get(), kernels.columns(E), d, E, g.dw_out);
  for (int64_t i = 0; i < 2 * S; ++i) {
    g.dscale[i] = static_cast<float>(affine[i]);
    g.doffset[i] = static_cast<float>(affine[2 * S + i]);
  }
}

}  // namespace supy
