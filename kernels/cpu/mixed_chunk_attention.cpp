#include "mixed_chunk_attention.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "gau_attention_work.h"
#include "mixed_chunk_work.h"
#include "parallel.h"
#include "scratch.h"

#define SUPY_KERNEL "mixed_chunk_attention.inl"
#include "multitarget.h"

namespace supy {
namespace {

MixedKernels select(FloatType type, MatrixUnit unit) { SUPY_SELECT(mixed_kernels, type, unit); }

int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

constexpr int64_t MOST = 32;  // chunks in memory, if their samples are several

// Samples, or segments of one sample, are in memory together, chunk by chunk. Where the form is not causal the sums
// over all tokens come first. Each step is shared out among the threads by blocks of rows or columns; no sum is split among
// them, so that their number shows in no bit.
class Call {
 public:
  explicit Call(const MixedChunkParams& p)
      : p_(p), k_(select(p.type, matrix_unit())), gradients_(p.grad.data != nullptr), c_(std::min(p.chunk, p.tokens)),
        segments_(blocks_of(p.tokens, p.segment)), per_sample_(blocks_of(std::min(p.segment, p.tokens), c_)),
        samples_(std::clamp<int64_t>(std::min(p.segment / p.tokens, MOST / per_sample_), 1, p.batch)),
        slots_(samples_ * per_sample_),
        threads_(threads_for(p.batch * p.tokens * (p.key_size + p.value_size) * (c_ + 2 * p.dim), 1 << 19)),
        S_(p.key_size), E_(p.value_size), d_(p.dim), N_(p.dim > 0 ? 2 * E_ + S_ : 0) {
    z_.key_size = S_, z_.value_size = E_, z_.chunk = c_, z_.dim = d_, z_.causal = p.causal;
    z_.factor = 1.0f / (static_cast<float>(std::max<int64_t>(S_, 1)) * static_cast<float>(p.chunk));
    z_.scale = p.scale, z_.offset = p.offset;
    z_.turned = slots_ * k_.depth(c_);
    Pieces sizes(nullptr);
    take(sizes);
    memory_.emplace_back(sizes.used());
    Pieces pieces(memory_[0].get());
    take(pieces);
  }

  void run() {
    if (d_ > 0) pack_weights();
    for (int64_t b = 0; b < p_.batch; b += samples_) {
      first_sample_ = b, count_ = std::min(samples_, p_.batch - b);
      clear(M_);
      if (gradients_)
        backward();
      else
        forward();
    }
    for (int64_t i = 0; i < 4 * S_ && gradients_ && d_ > 0; ++i) {
      p_.dscale[i] = static_cast<float>(affine_[i]);
      p_.doffset[i] = static_cast<float>(affine_[4 * S_ + i]);
    }
  }

 private:
  // --- memory

  int64_t floats_for(int64_t numbers) const { return p_.type == FloatType::f32 ? numbers : (numbers + 1) / 2; }
  TokenMatrix scratch(Pieces& pieces, int64_t tokens, int64_t n) const {
    return {pieces.take(floats_for(tokens * n)), 0, n};
  }

  void take(Pieces& pieces) {
    const int64_t sums = (S_ + 32) * k_.columns(E_), tokens = slots_ * c_;
    const auto left = [&](int64_t rows, int64_t depth) { return slots_ * k_.left_floats(rows, depth); };
    const auto right = [&](int64_t rows, int64_t depth) { return slots_ * k_.right_floats(rows, depth); };
    const auto rounded = [&](int64_t n) { return k_.columns(n); };
    M_ = pieces.take(samples_ * sums);
    panels_ = {};
    if (d_ > 0) heads_ = scratch(pieces, 4 * tokens, S_);
    if (d_ > 0 && p_.kept < p_.tokens) {
      // Not causal, all of h has to be in memory.
      whole_ = !p_.causal;
      h_ = scratch(pieces, whole_ ? samples_ * p_.tokens : tokens, N_);
    }
    panels_.k_right = pieces.take(right(rounded(c_), S_));
    panels_.k_turned = pieces.take(left(S_, c_));
    const int64_t values = right(E_, S_) + right(E_, c_), known = gradients_ ? right(rounded(S_) + rounded(c_), E_) : 0;
    const int64_t dh_turned = left(N_, c_);
    // Used one after another: what rows read, and what w_in needs.
    const int64_t later = gradients_ && d_ > 0 ? dh_turned + right(d_, c_) : 0;
    panels_.values = z_.dh_turned = pieces.take(std::max(values + known, later));
    if (!gradients_) return take_work(pieces);
    panels_.known = panels_.values + values, z_.x_turned = z_.dh_turned + dh_turned;
    dM_ = pieces.take(samples_ * sums);
    panels_.q_turned = pieces.take(left(S_, c_));
    panels_.quad_k_turned = pieces.take(right(S_, c_));
    panels_.quad_q_turned = pieces.take(right(S_, c_));
    panels_.weights_turned = pieces.take(left(c_, c_) + left(c_, S_));
    panels_.slopes_turned = pieces.take(left(c_, c_));
    panels_.grads = pieces.take(values);
    panels_.dheads = pieces.take(4 * (tokens + 32) * rounded(S_));
    panels_.back = pieces.take(right(S_, E_));
    if (d_ == 0) {
      if (p_.causal) states_ = pieces.take(segments_ * samples_ * sums);
      return take_work(pieces);
    }
    z_.gated_turned = pieces.take(right(E_, c_));
    z_.grad_turned = pieces.take(left(d_, c_));
    panels_.dh = pieces.take(tokens * N_);
    panels_.affine = pieces.take(slots_ * blocks_of(c_, k_.block) * 8 * S_);
    g_ = scratch(pieces, p_.causal ? tokens : samples_ * p_.tokens, E_);
    take_work(pieces);
  }

  void take_work(Pieces& pieces) {
    const int64_t wide = k_.columns(std::max({E_, d_, d_ > 0 ? k_.strip : 0}));
    works_.resize(threads_);
    for (MixedWork& w : works_) {
      w.left = pieces.take(k_.left_floats(k_.block, std::max({S_, E_, d_, gradients_ ? N_ : 0})) +
                           k_.left_floats(k_.block, S_) + k_.left_floats(k_.block, c_));
      w.scores = pieces.take(k_.block * (c_ + 64));
      w.wide = pieces.take(k_.block * (k_.columns(S_) + c_ + 64));
      w.heads = pieces.take(k_.block * k_.columns(S_));
      w.sums = pieces.take(k_.block * wide);
      w.more = gradients_ ? pieces.take(k_.block * wide) : nullptr;
    }
  }

  float* pack_weight(const void* data, int64_t rows, int64_t columns, bool turned) {
    memory_.emplace_back(turned ? k_.right_floats(columns, rows) : k_.right_floats(rows, columns));
    float* panel = memory_.back().get();
    parallel_for(blocks_of(turned ? columns : rows, k_.strip), threads_,
                 [&](int, int64_t i) { k_.pack_weight(data, rows, columns, turned, i * k_.strip, panel); });
    return panel;
  }

  void pack_weights() {
    if (!gradients_ || p_.kept < p_.tokens) z_.in_right = pack_weight(p_.w_in, N_, d_, false);
    if (!gradients_) z_.out_right = pack_weight(p_.w_out, d_, E_, false);
    if (!gradients_) return;
    z_.in_turned = pack_weight(p_.w_in, N_, d_, true);
    z_.out_turned = pack_weight(p_.w_out, d_, E_, true);
    std::memset(p_.dw_in, 0, 4 * blocks_of(N_, 32) * 32 * k_.columns(d_));
    std::memset(p_.dw_out, 0, 4 * blocks_of(d_, 32) * 32 * k_.columns(E_));
    affine_.assign(8 * S_, 0);
  }

  // --- sums: [S, E], of each sample in memory

  int64_t sum_floats() const { return (S_ + 32) * k_.columns(E_); }
  void clear(float* sums) { std::memset(sums, 0, 4 * samples_ * sum_floats()); }
  void copy_sums(int64_t segment, bool write) {
    if (states_ != nullptr) {
      float* state = states_ + segment * samples_ * sum_floats();
      return static_cast<void>(std::memcpy(write ? state : M_, write ? M_ : state, 4 * samples_ * sum_floats()));
    }
    for (int64_t b = 0; b < count_ && p_.sums != nullptr; ++b)
      for (int64_t s = 0; s < S_; ++s) {
        float* own = M_ + b * sum_floats() + s * k_.columns(E_);
        float* state = p_.sums + ((segment * p_.batch + first_sample_ + b) * S_ + s) * E_;
        std::memcpy(write ? state : own, write ? own : state, 4 * E_);
      }
  }

  // --- chunks

  // `to` of this sample and token.
  TokenMatrix at(TokenMatrix m, int64_t sample, int64_t token, int64_t column = 0) const {
    if (m.data == nullptr) return m;
    const int64_t numbers = sample * m.batch_step + token * m.token_step + column;
    m.data = static_cast<char*>(m.data) + numbers * (p_.type == FloatType::f32 ? 4 : 2);
    return m;
  }

  // Those of a segment, sample by sample.
  void enter(int64_t segment) {
    segment_ = segment;
    chunks_.clear();
    const int64_t start = segment * p_.segment, stop = std::min(start + p_.segment, p_.tokens);
    for (int64_t i = 0; i < count_; ++i)
      for (int64_t t = start; t < stop; t += c_) chunks_.push_back(chunk(i, t));
    per_sample_ = static_cast<int64_t>(chunks_.size()) / count_;
  }

  MixedChunk chunk(int64_t sample, int64_t t) const {
    const int64_t b = first_sample_ + sample, slot = static_cast<int64_t>(chunks_.size());
    const auto of_slot = [&](float* panel, int64_t n) { return panel == nullptr ? nullptr : panel + slot * n; };
    MixedChunk m = panels_;
    m.tokens = std::min(c_, p_.tokens - t), m.rows = std::clamp<int64_t>(p_.lengths[b] - t, 0, m.tokens);
    m.word = slot * k_.depth(c_);
    m.weight = p_.weights[b * p_.weight_batch_step + t / p_.chunk * p_.weight_chunk_step];
    m.out = at(p_.out, b, t), m.x = at(p_.x, b, t), m.dx = at(p_.dx, b, t), m.grad = at(p_.grad, b, t);
    m.v = at(p_.v, b, t), m.u = at(p_.u, b, t), m.dv = at(p_.dv, b, t), m.du = at(p_.du, b, t);
    m.g = m.grad;
    for (int i = 0; i < 4; ++i) {
      m.heads[i] = d_ > 0 ? at(heads_, 0, (slot * 4 + i) * c_) : at(p_.heads[i], b, t);
      m.dheads_out[i] = at(p_.dheads[i], b, t);
    }
    if (d_ > 0) {
      const int64_t inside = sample * p_.tokens + t;  // where a sample is in memory as a whole
      m.h = t < p_.kept ? at(p_.h, b, t) : at(h_, 0, whole_ ? inside : slot * c_);
      m.u = m.h, m.v = at(m.h, 0, 0, E_);
      m.g = at(g_, 0, p_.causal ? slot * c_ : inside);
      m.cosine = p_.cosine + t * (S_ / 2), m.sine = p_.sine + t * (S_ / 2);
    }
    const int64_t values = k_.right_floats(E_, S_) + k_.right_floats(E_, c_);
    m.k_right = of_slot(m.k_right, k_.right_floats(k_.columns(c_), S_));
    m.k_turned = of_slot(m.k_turned, k_.left_floats(S_, c_));
    m.values = of_slot(m.values, values);
    m.known = of_slot(m.known, k_.right_floats(k_.columns(S_) + k_.columns(c_), E_));
    m.q_turned = of_slot(m.q_turned, k_.left_floats(S_, c_));
    m.quad_k_turned = of_slot(m.quad_k_turned, k_.right_floats(S_, c_));
    m.quad_q_turned = of_slot(m.quad_q_turned, k_.right_floats(S_, c_));
    m.weights_turned = of_slot(m.weights_turned, k_.left_floats(c_, c_) + k_.left_floats(c_, S_));
    m.slopes_turned = of_slot(m.slopes_turned, k_.left_floats(c_, c_));
    m.grads = of_slot(m.grads, values);
    m.back = of_slot(m.back, k_.right_floats(S_, E_));
    m.dheads = of_slot(m.dheads, 4 * c_ * k_.columns(S_));
    m.dh = of_slot(m.dh, c_ * N_);
    m.affine = of_slot(m.affine, blocks_of(c_, k_.block) * 8 * S_);
    return m;
  }

  // --- steps

  using Step = void (*)(const MixedCall&, const MixedChunk&, MixedWork&, int64_t);

  // For every block of rows of every chunk; a null step is left out.
  void rows(std::initializer_list<Step> steps) {
    const int64_t blocks = blocks_of(c_, k_.block), n = static_cast<int64_t>(chunks_.size());
    parallel_for(n * blocks, threads_, [&](int thread, int64_t i) {
      const MixedChunk& m = chunks_[i / blocks];
      const int64_t row = i % blocks * k_.block;
      for (const Step step : steps)
        if (step != nullptr && row < m.tokens) step(z_, m, works_[thread], row);
    });
  }

  // M, chunk by chunk: what a chunk reads, then what it adds; `rest`: also the last one of a sample.
  void scan(bool read, bool add, bool rest) {
    columns(false, [&](const MixedChunk& m, int64_t b, int64_t e, bool last) {
      k_.scan(z_, m, {M_ + b * sum_floats(), m.k_turned, m.values, m.known, false}, e, read, add && (rest || !last));
    });
  }
  // dM, backwards.
  void scan_back(bool read, bool add) {
    columns(true, [&](const MixedChunk& m, int64_t b, int64_t e, bool) {
      k_.scan(z_, m, {dM_ + b * sum_floats(), m.q_turned, m.grads, m.back, true}, e, read, add);
    });
  }
  template <class Body>
  void columns(bool reverse, const Body& body) {
    const int64_t blocks = blocks_of(E_, k_.columns_at_once);
    parallel_for(count_ * blocks, threads_, [&](int, int64_t i) {
      for (int64_t j = 0; j < per_sample_; ++j) {
        const int64_t g = reverse ? per_sample_ - 1 - j : j;
        body(chunks_[i / blocks * per_sample_ + g], i / blocks, i % blocks * k_.columns_at_once, j + 1 == per_sample_);
      }
    });
  }

  // The gradients of both weights: sums over all tokens in memory, in one piece where chunks are full.
  void add_products() {
    const int64_t at_once = 96, full = k_.depth(c_), of_out = blocks_of(d_, at_once);
    parallel_for(of_out + blocks_of(N_, at_once), threads_, [&](int, int64_t i) {
      const bool out = i < of_out;
      const int64_t row = (out ? i : i - of_out) * at_once, count = std::min(at_once, (out ? d_ : N_) - row);
      int64_t first = 0;
      for (size_t g = 0; g < chunks_.size(); ++g) {
        const int64_t words = k_.depth(chunks_[g].rows), last = chunks_[g].word + words;
        if (words == full && g + 1 < chunks_.size()) continue;
        const MixedWords depth{z_.turned, first, last};
        if (last > first && out) k_.add_product(row, count, E_, depth, z_.grad_turned, z_.gated_turned, p_.dw_out);
        if (last > first && !out) k_.add_product(row, count, d_, depth, z_.dh_turned, z_.x_turned, p_.dw_in);
        first = chunks_[g].word + full;
      }
    });
  }

  Step project() const { return d_ > 0 && (!gradients_ || segment_ * p_.segment >= p_.kept) ? k_.project : nullptr; }
  Step project_grad() const { return d_ > 0 ? k_.project_grad : nullptr; }

  void forward() {
    for (int64_t s = 0; s < segments_ && !p_.causal; ++s) {
      enter(s);
      rows({project(), k_.pack});
      scan(false, true, true);
    }
    for (int64_t s = 0; s < segments_; ++s) {
      if (p_.causal) copy_sums(s, true);
      enter(s);
      if (p_.causal)
        rows({project(), k_.pack});
      else if (segments_ > 1)
        rows({k_.pack});
      scan(true, p_.causal, s + 1 < segments_);
      rows({k_.attend});
    }
  }

  void backward() {
    clear(dM_);
    const bool first_pass = !p_.causal || d_ == 0;  // for M, and for dM where all rows see all keys
    for (int64_t s = 0; s < segments_ && first_pass; ++s) {
      if (p_.causal) copy_sums(s, true);
      enter(s);
      if (p_.causal)
        rows({k_.pack});
      else
        rows({k_.pack, project_grad(), k_.pack_grad});
      scan(false, true, true);
      if (!p_.causal) scan_back(false, true);
    }
    for (int64_t s = segments_ - 1; s >= 0; --s) {
      if (p_.causal) copy_sums(s, false);
      enter(s);
      if (p_.causal)
        rows({project(), k_.pack, project_grad()});
      else if (segments_ > 1)
        rows({k_.pack});
      scan(true, p_.causal, false);
      rows({k_.row_gradients});
      scan_back(true, p_.causal);
      rows({k_.key_gradients});
      if (d_ == 0) continue;
      add_products();
      for (const MixedChunk& m : chunks_)
        for (int64_t i = 0; i < blocks_of(m.tokens, k_.block) * 8 * S_; ++i) affine_[i % (8 * S_)] += m.affine[i];
    }
  }

  const MixedChunkParams& p_;
  const MixedKernels k_;
  const bool gradients_;
  const int64_t c_, segments_;     // tokens of a chunk
  int64_t per_sample_;             // chunks in memory now
  const int64_t samples_, slots_;  // samples and chunks that there is memory for
  const int threads_;
  const int64_t S_, E_, d_, N_;
  MixedCall z_{};
  MixedChunk panels_{};  // of the first slot
  TokenMatrix heads_{}, h_{}, g_{};
  bool whole_ = false;
  float *M_ = nullptr, *dM_ = nullptr, *states_ = nullptr;
  std::vector<MixedWork> works_;
  std::vector<double> affine_;
  std::vector<Scratch> memory_;
  int64_t first_sample_ = 0, count_ = 0, segment_ = 0;  // samples in memory now
  std::vector<MixedChunk> chunks_;
};

}  // namespace

void mixed_chunk_attention_cpu(const MixedChunkParams& p) {
  if (p.batch > 0 && p.tokens > 0) Call(p).run();
}

}  // namespace supy
