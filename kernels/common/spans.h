// What the kernels of both GlobalPointers share: rows of tokens, spans, and memory for the work.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "parallel.h"

namespace supy {

enum class FloatType { f32, bf16 };

// A tensor [B, T, n] or [B, T, H, n] that is read row by row; steps are in elements.
struct TokenRows {
  const void* data;
  int64_t batch_step, token_step, head_step, step;
};

// Sizes B, T, H, D, and which cells (start, end) of a sample are visible: those of its first lengths[b] tokens, with
// `tril` those with start <= end.
struct SpanScores {
  int64_t batch, tokens, heads, size;
  const int64_t* lengths;  // [B]
  bool tril;
  float scale;
  FloatType type;  // of the inputs, and what scores are rounded to
};

struct Span {
  int64_t batch, head, start, end;
};

struct FoundSpan {
  int32_t head, start, end;
  float score;
};

// Takes spans that a search has found; the kernels of an instruction set may not touch the standard library themselves.
using FoundCallback = void (*)(void* context, const FoundSpan* found, int64_t count);

// Both arrays come from malloc and belong to the caller.
struct SpanList {
  Span* spans;
  float* scores;
  int64_t count;
};

// Uninitialised floats, aligned to cache lines.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : data_(static_cast<float*>(std::aligned_alloc(64, (4 * floats + 64) / 64 * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
};

// Hands out pieces of one block: first a run without memory to learn the size, then one with it.
class Pieces {
 public:
  explicit Pieces(float* base) : base_(base) {}
  float* take(int64_t floats) {
    float* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (floats + 15) / 16 * 16;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  float* base_;
  int64_t used_ = 0;
};

inline void append(void* list, const FoundSpan* spans, int64_t count) {
  auto* to = static_cast<std::vector<FoundSpan>*>(list);
  to->insert(to->end(), spans, spans + count);
}

// One list of spans from `parts` lists a sample.
inline SpanList join(const std::vector<std::vector<FoundSpan>>& lists, int64_t parts, int threads) {
  const int64_t count = static_cast<int64_t>(lists.size());
  std::vector<int64_t> first(count + 1);
  for (int64_t i = 0; i < count; ++i) first[i + 1] = first[i] + static_cast<int64_t>(lists[i].size());
  SpanList list{};
  list.count = first[count];
  list.spans = static_cast<Span*>(std::malloc(sizeof(Span) * std::max<int64_t>(list.count, 1)));
  list.scores = static_cast<float*>(std::malloc(sizeof(float) * std::max<int64_t>(list.count, 1)));
  if (list.spans == nullptr || list.scores == nullptr) {
    std::free(list.spans);
    std::free(list.scores);
    throw std::bad_alloc();
  }
  parallel_for(count, list.count < 1 << 14 ? 1 : threads, [&](int, int64_t i) {
    int64_t n = first[i];
    for (const FoundSpan& found : lists[i]) {
      list.spans[n] = {i / parts, found.head, found.start, found.end};
      list.scores[n++] = found.score;
    }
  });
  return list;
}

}  // namespace supy
