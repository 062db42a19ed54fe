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
#include "scratch.h"
#include "simd.h"

namespace supy {

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

inline void append(void* list, const FoundSpan* spans, int64_t count) {
  auto* to = static_cast<std::vector<FoundSpan>*>(list);
  to->insert(to->end(), spans, spans + count);
}

// One list of spans by (batch, head, start, end) from several lists a sample, which in turn are by (start, end) for each
// head. Lists are emptied on the way.
inline SpanList join(std::vector<std::vector<FoundSpan>>& lists, const SpanScores& p, int threads) {
  const int64_t parts = p.batch == 0 ? 0 : static_cast<int64_t>(lists.size()) / p.batch;
  std::vector<int64_t> place(p.batch * p.heads + 1);  // of each head's next span
  parallel_for(p.batch, threads, [&](int, int64_t b) {
    for (int64_t i = b * parts; i < (b + 1) * parts; ++i)
      for (const FoundSpan& found : lists[i]) ++place[b * p.heads + found.head + 1];
  });
  for (int64_t h = 0; h < p.batch * p.heads; ++h) place[h + 1] += place[h];
  SpanList list{};
  list.count = place[p.batch * p.heads];
  list.spans = static_cast<Span*>(std::malloc(sizeof(Span) * std::max<int64_t>(list.count, 1)));
  list.scores = static_cast<float*>(std::malloc(sizeof(float) * std::max<int64_t>(list.count, 1)));
  if (list.spans == nullptr || list.scores == nullptr) {
    std::free(list.spans);
    std::free(list.scores);
    throw std::bad_alloc();
  }
  parallel_for(p.batch, list.count < 1 << 14 ? 1 : threads, [&](int, int64_t b) {
    for (int64_t i = b * parts; i < (b + 1) * parts; ++i) {
      for (const FoundSpan& found : lists[i]) {
        const int64_t n = place[b * p.heads + found.head]++;
        list.spans[n] = {b, found.head, found.start, found.end};
        list.scores[n] = found.score;
      }
      std::vector<FoundSpan>().swap(lists[i]);
    }
  });
  return list;
}

}  // namespace supy
