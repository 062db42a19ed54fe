// The memory in which one head of one sample is computed.
#pragma once

#include "global_pointer.h"

namespace supy {

struct PointerWork {
  PointerWork(const GlobalPointerParams& p, float* base, int64_t& used) {
    columns = (p.tokens + 63) / 64 * 64;
    size = (p.size + 15) / 16 * 16;
    Pieces pieces(base);
    for (float** piece : {&q, &k, &k_turned, &dq, &dk}) *piece = pieces.take(columns * size);
    closed = pieces.take(columns);
    strip = pieces.take(64 * columns);
    used = pieces.used();
  }

  int64_t rows, columns, size;   // tokens of the sample; T and D, padded
  float *q, *k, *k_turned;       // q is scaled; k_turned is [tiles][size][64]
  float *dq, *dk;                // of the sum of e^(s - top)
  float* closed;                 // 0, or -inf beyond the sample
  float* strip;                  // a tile, or the scores of a tile's height of rows: [64][columns]
};

// What cpu/global_pointer.inl defines, for one instruction set.
struct PointerKernels {
  void (*begin)(const GlobalPointerParams&, PointerWork&, int64_t b, int64_t h);
  // Returns the loss of the head; `at` has room for the scores of its positives, spans[0, count).
  double (*loss)(const GlobalPointerParams&, PointerWork&, const GlobalPointerLoss&, const Span* spans, int64_t count,
                 float* at, int64_t b, int64_t h);
  void (*scores)(const GlobalPointerParams&, const PointerWork&, int64_t b, int64_t h, void* scores);
  void (*search)(const GlobalPointerParams&, const PointerWork&, int64_t h, int64_t i0, float threshold,
                 FoundCallback found, void* context, FoundSpan* buffer);
};

}  // namespace supy
