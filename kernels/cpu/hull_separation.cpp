#include "hull_separation.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "parallel.h"
#include "simd.h"

#define SUPY_KERNEL "hull_separation.inl"
#include "multitarget.h"

namespace supy {
namespace hull {

constexpr int64_t line = 16, block = 32;
constexpr int64_t WIDE = 4 * line;  // a row that fills vectors by itself: all rows are not copied into blocks
constexpr double infinity = std::numeric_limits<double>::infinity();

int64_t padded(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

void block_products(const double* rows, int64_t blocks, int64_t n, const double* x, double* out) {
  SUPY_SELECT(block_products, rows, blocks, n, x, out);
}
void row_products(const double* rows, int64_t count, int64_t n, const double* x, double* out) {
  SUPY_SELECT(row_products, rows, count, n, x, out);
}
void project_out(const double* q, int64_t count, int64_t size, double* v, double* coefficients) {
  SUPY_SELECT(project_out, q, count, size, v, coefficients);
}
void rotate_pair(double* a, double* b, int64_t size, double c, double s) {
  SUPY_SELECT(rotate_pair, a, b, size, c, s);
}

// Rows in blocks of 32, so that a product with one vector fills vectors whatever n is.
class Blocks {
 public:
  explicit Blocks(int64_t n) : n_(n) {}
  int64_t count() const { return count_; }
  int64_t capacity() const { return padded(count_, block); }
  void clear() { count_ = 0, data_.clear(); }
  void add(const double* row) {
    if (count_ % block == 0) data_.resize(data_.size() + block * n_, 0.0);
    double* to = data_.data() + count_ / block * block * n_ + count_ % block;
    for (int64_t j = 0; j < n_; ++j) to[j * block] = row[j];
    ++count_;
  }
  void get(int64_t i, double* row) const {
    const double* from = data_.data() + i / block * block * n_ + i % block;
    for (int64_t j = 0; j < n_; ++j) row[j] = from[j * block];
  }
  // out has room for capacity() numbers
  void products(const double* x, double* out) const { block_products(data_.data(), capacity() / block, n_, x, out); }

 private:
  int64_t n_, count_ = 0;
  std::vector<double> data_;
};

// All rows.
class Rows {
 public:
  explicit Rows(const HullSeparationParams& p) : p_(p), blocks_(p.n) {
    for (int64_t i = 0; i < p.num_rows && p.n < WIDE; ++i) blocks_.add(p.rows + i * p.n);
  }
  int64_t count() const { return p_.num_rows; }
  int64_t capacity() const { return padded(count(), block); }
  void products(const double* x, double* out) const {
    p_.n < WIDE ? blocks_.products(x, out) : row_products(p_.rows, p_.num_rows, p_.n, x, out);
  }

 private:
  const HullSeparationParams& p_;
  Blocks blocks_;
};

// What all classes share.
struct Problem {
  explicit Problem(const HullSeparationParams& params)
      : p(params), rows(params), likely(params.n), norms(params.num_rows) {
    for (int64_t s = 0; s < p.num_start; ++s) likely.add(p.rows + p.start[s] * p.n);
    for (int64_t i = 0; i < p.num_rows; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < p.n; ++j) sum += p.rows[i * p.n + j] * p.rows[i * p.n + j];
      norms[i] = std::sqrt(sum);
    }
  }
  const HullSeparationParams& p;
  Rows rows;
  Blocks likely;  // those of start
  std::vector<double> norms;
};

// The least squares problem over the passive columns, as an orthonormal Q and a triangular R that follow every change.
class Factors {
 public:
  explicit Factors(int64_t m)
      : m_(m), size_(padded(m, line)), q_((m + 1) * size_), r_((m + 1) * (m + 1)), scratch_(size_), unused_(m + 1) {}

  int64_t count = 0;

  void clear() { count = 0; }

  // column [m]; the caller keeps count below m
  void add(const double* column) {
    double* q = q_.data() + count * size_;
    double* r = r_.data() + count * (m_ + 1);
    std::copy_n(column, m_, q);
    std::fill(q + m_, q + size_, 0.0);
    std::fill(r, r + m_ + 1, 0.0);
    for (int pass = 0; pass < 2; ++pass) project_out(q_.data(), count, size_, q, r);
    double sum = 0;
    for (int64_t j = 0; j < m_; ++j) sum += q[j] * q[j];
    r[count] = std::sqrt(sum);
    const double scale = sum > 0 ? 1 / r[count] : 0.0;
    for (int64_t j = 0; j < m_; ++j) q[j] *= scale;
    ++count;
  }

  void remove(int64_t gone) {
    const int64_t step = m_ + 1;
    for (int64_t c = gone; c + 1 < count; ++c) std::copy_n(r_.data() + (c + 1) * step, step, r_.data() + c * step);
    --count;
    for (int64_t c = gone; c < count; ++c) {  // column c now reaches one below the diagonal
      double* r = r_.data() + c * step;
      const double length = std::hypot(r[c], r[c + 1]);
      if (length == 0) continue;
      const double cosine = r[c] / length, sine = r[c + 1] / length;
      r[c] = length, r[c + 1] = 0;
      for (int64_t later = c + 1; later < count; ++later) {
        double* x = r_.data() + later * step + c;
        const double upper = x[0];
        x[0] = cosine * upper + sine * x[1];
        x[1] = cosine * x[1] - sine * upper;
      }
      rotate_pair(q_.data() + c * size_, q_.data() + (c + 1) * size_, size_, cosine, sine);
    }
  }

  // The multipliers that bring the columns nearest to (0, ..., 0, 1).
  void solve(double* values) const {
    for (int64_t i = 0; i < count; ++i) values[i] = q_[i * size_ + m_ - 1];
    for (int64_t c = count - 1; c >= 0; --c) {
      const double* r = r_.data() + c * (m_ + 1);
      values[c] = r[c] > 0 ? values[c] / r[c] : 0.0;
      for (int64_t i = 0; i < c; ++i) values[i] -= r[i] * values[c];
    }
  }

  // What they leave of it; projected twice, so that a short residual is orthogonal to the columns, too.
  double residual(double* out) {
    std::fill(scratch_.begin(), scratch_.end(), 0.0);
    scratch_[m_ - 1] = 1;
    for (int pass = 0; pass < 2; ++pass) project_out(q_.data(), count, size_, scratch_.data(), unused_.data());
    double sum = 0;
    for (int64_t j = 0; j < m_; ++j) sum += scratch_[j] * scratch_[j];
    std::copy_n(scratch_.data(), m_, out);
    return std::sqrt(sum);
  }

 private:
  int64_t m_, size_;
  std::vector<double> q_, r_, scratch_, unused_;  // q [count, size], r by columns
};

// One thread's memory for one class after the other.
class Search {
 public:
  explicit Search(const Problem& problem)
      : problem_(problem), p_(problem.p), n_(p_.n), m_(n_ + 1), columns_(m_), factors_(m_), known_(p_.num_rows, 0),
        gaps_(std::max(problem.rows.capacity(), problem.likely.capacity())), residual_(m_), column_(m_), u_(n_),
        best_(m_ + 1) {}

  void run(int64_t which) {
    const int64_t k = p_.classes[which];
    begin(k);
    const int64_t kind = decide(k);
    p_.kind[which] = kind;
    for (int64_t j = 0; j < n_; ++j) p_.directions[which * n_ + j] = -residual_[j];
    std::fill_n(p_.support + which * m_, m_, -1);
    std::fill_n(p_.multipliers + which * m_, m_, 0.0);
    if (kind == 2) write(p_.support + which * m_, p_.multipliers + which * m_);
    for (const int64_t i : ids_) known_[i] = 0;
  }

 private:
  struct Passive {
    int64_t column;  // of columns_, or below 0 a bound
    double value;
  };

  void begin(int64_t k) {
    columns_.clear(), ids_.clear(), lengths_.clear(), state_.clear(), passive_.clear(), factors_.clear();
    bound_state_.assign(2 * n_ - 1, 0);
    std::fill(residual_.begin(), residual_.end(), 0.0);
    residual_[n_] = 1;
    for (int64_t s = 0; s < std::min(p_.num_start, 4 * n_); ++s) take_up(k, p_.start[s]);
  }

  bool take_up(int64_t k, int64_t i) {
    if (i == k || known_[i]) return false;
    double sum = 0;
    for (int64_t j = 0; j < n_; ++j) {
      column_[j] = p_.rows[k * n_ + j] - p_.rows[i * n_ + j];
      sum += column_[j] * column_[j];
    }
    if (!(sum > 0)) return false;
    const double length = std::sqrt(sum);
    for (int64_t j = 0; j < n_; ++j) column_[j] /= length;
    column_[n_] = 1;
    columns_.add(column_.data());
    ids_.push_back(i), lengths_.push_back(length), state_.push_back(0);
    known_[i] = 1;
    return true;
  }

  // Bound b of [0, 2 n - 2]: x_j - lower_j s, then upper_j s - x_j, then s. False where there is none.
  bool bound(int64_t b, int64_t* j, double* of_x, double* of_s) const {
    if (b == 2 * n_ - 2) {
      *j = n_ - 1, *of_x = 0, *of_s = 1;
      return true;
    }
    const bool above = b >= n_ - 1;
    *j = above ? b - (n_ - 1) : b;
    const double limit = above ? p_.upper[*j] : p_.lower[*j];
    if (std::isinf(limit)) return false;
    const double length = std::hypot(1.0, limit);
    *of_x = (above ? -1 : 1) / length, *of_s = (above ? limit : -limit) / length;
    return true;
  }

  void read_column(int64_t c) {
    if (c >= 0) return columns_.get(c, column_.data());
    std::fill(column_.begin(), column_.end(), 0.0);
    int64_t j = 0;
    double of_x = 0, of_s = 0;
    bound(-1 - c, &j, &of_x, &of_s);
    column_[j] += of_x;
    column_[n_ - 1] += of_s;
  }

  char& state(int64_t c) { return c >= 0 ? state_[c] : bound_state_[-1 - c]; }  // 1 passive, 2 to be left alone for now

  // The column that most wants to enter, and by how much more than is left to it: a row may lack half of its margin, a
  // bound next to nothing, because inputs are cut to the bounds. With no column passive: the nearest row.
  std::pair<int64_t, double> most_violated(int64_t k) {
    violation_.resize(columns_.capacity());
    const double* x = residual_.data();
    if (passive_.empty()) {
      for (int64_t j = 0; j < n_; ++j) best_[j] = -p_.rows[k * n_ + j];
      best_[n_] = 1;
      x = best_.data();
    }
    columns_.products(x, violation_.data());
    int64_t worst = 0;
    double most = -infinity;
    for (int64_t c = 0; c < columns_.count(); ++c)
      if (violation_[c] > most && !state_[c]) worst = c, most = violation_[c];
    if (passive_.empty()) return {worst, most};
    most -= 0.5 * residual_[n_];
    int64_t j = 0;
    double of_x = 0, of_s = 0;
    for (int64_t b = 0; b < 2 * n_ - 1; ++b) {
      if (bound_state_[b] || !bound(b, &j, &of_x, &of_s)) continue;
      const double value = (j < n_ - 1 ? of_x * residual_[j] : 0.0) + of_s * residual_[n_ - 1] - 1e-3 * residual_[n_];
      if (value > most) worst = -1 - b, most = value;
    }
    return {worst, most};
  }

  // Adds the rows that violate the direction most, likely ones if some do; false if there are none, or none new.
  bool scan(int64_t k, bool* separated) {
    return scan(k, problem_.likely, p_.start, separated) || scan(k, problem_.rows, nullptr, separated);
  }

  template <class AnyRows>
  bool scan(int64_t k, const AnyRows& rows, const int64_t* ids, bool* separated) {
    const bool first = passive_.empty();
    for (int64_t j = 0; j < n_; ++j) u_[j] = first ? p_.rows[k * n_ + j] : -residual_[j];
    rows.products(u_.data(), gaps_.data());
    double own = 0, length = 0;
    for (int64_t j = 0; j < n_; ++j) own += p_.rows[k * n_ + j] * u_[j], length += u_[j] * u_[j];
    const double unit = (n_ + 3) * std::numeric_limits<double>::epsilon() * std::sqrt(length);
    missed_.clear();
    for (int64_t at = 0; at < rows.count(); ++at) {
      const int64_t i = ids ? ids[at] : at;
      const double gap = own - gaps_[at];
      if (i != k && (first || gap <= unit * (problem_.norms[i] + problem_.norms[k]))) missed_.push_back({gap, i});
    }
    *separated = missed_.empty();
    const int64_t take = std::min<int64_t>(static_cast<int64_t>(missed_.size()), n_ + 8);
    std::partial_sort(missed_.begin(), missed_.begin() + take, missed_.end());
    bool any = false;
    for (int64_t t = 0; t < take; ++t) any |= take_up(k, missed_[t].second);
    return any;
  }

  int64_t decide(int64_t k) {
    for (int64_t round = 0; round < 40 * (n_ + 10); ++round) {
      const auto [worst, most] = most_violated(k);
      if (most == -infinity || (!passive_.empty() && most <= 0)) {
        bool separated;
        if (!scan(k, &separated)) return separated ? 1 : 0;
        continue;
      }
      if (factors_.count == m_) return 0;
      read_column(worst);
      factors_.add(column_.data());
      passive_.push_back({worst, 0.0});
      state(worst) = 1;
      descend();
      if (state(worst) == 1) {  // it stayed: those that were left alone may be tried again
        for (char& s : state_) s = s == 2 ? 0 : s;
        for (char& s : bound_state_) s = s == 2 ? 0 : s;
      } else {
        state(worst) = 2;
      }
      if (factors_.residual(residual_.data()) < 1e-13) return 2;
    }
    return 0;
  }

  // Moves to the nearest point of the passive columns, dropping those whose multiplier would become negative.
  void descend() {
    for (;;) {
      factors_.solve(best_.data());
      double step = 1;
      for (size_t i = 0; i < passive_.size(); ++i)
        if (best_[i] <= 0) step = std::min(step, passive_[i].value / std::max(passive_[i].value - best_[i], 1e-300));
      double least = infinity;
      bool all = true;
      for (size_t i = 0; i < passive_.size(); ++i) {
        const bool falls = best_[i] <= 0;
        passive_[i].value = falls || step < 1 ? passive_[i].value + step * (best_[i] - passive_[i].value) : best_[i];
        if (falls) all = false, least = std::min(least, passive_[i].value);
      }
      if (all) return;
      for (int64_t i = static_cast<int64_t>(passive_.size()) - 1; i >= 0; --i) {
        if (passive_[i].value > 1e-15 && !(best_[i] <= 0 && passive_[i].value == least)) continue;
        state(passive_[i].column) = 0;
        factors_.remove(i);
        passive_.erase(passive_.begin() + i);
        best_.erase(best_.begin() + i);
      }
      best_.resize(m_ + 1);
    }
  }

  // The multipliers of the differences, from a fresh factorisation where that keeps them positive.
  void write(int64_t* support, double* multipliers) {
    factors_.clear();
    for (const Passive& one : passive_) {
      read_column(one.column);
      factors_.add(column_.data());
    }
    factors_.solve(best_.data());
    bool positive = true;
    for (size_t i = 0; i < passive_.size(); ++i) positive &= best_[i] > 0;
    double total = 0;
    int64_t count = 0;
    for (size_t i = 0; i < passive_.size(); ++i) {
      const int64_t c = passive_[i].column;
      if (c < 0) continue;
      support[count] = ids_[c];
      multipliers[count] = (positive ? best_[i] : passive_[i].value) / lengths_[c];
      total += multipliers[count++];
    }
    for (int64_t i = 0; i < count; ++i) multipliers[i] /= total;
  }

  const Problem& problem_;
  const HullSeparationParams& p_;
  const int64_t n_, m_;
  Blocks columns_;                // [.., n + 1]: the working set's differences of length one, and 1
  Factors factors_;
  std::vector<char> known_;       // [K]: whether a row is in the working set
  std::vector<int64_t> ids_;      // which row each column is
  std::vector<double> lengths_;
  std::vector<char> state_, bound_state_;
  std::vector<Passive> passive_;
  std::vector<double> gaps_, residual_, column_, u_, best_, violation_;
  std::vector<std::pair<double, int64_t>> missed_;
};

}  // namespace hull

void hull_separation_cpu(const HullSeparationParams& params) {
  if (params.num_classes == 0) return;
  const hull::Problem problem(params);
  const int threads = threads_for(params.num_classes, 1);
  std::vector<std::unique_ptr<hull::Search>> searches(threads);
  parallel_for(params.num_classes, threads, [&](int thread, int64_t i) {
    if (!searches[thread]) searches[thread] = std::make_unique<hull::Search>(problem);
    searches[thread]->run(i);
  });
}

}  // namespace supy
