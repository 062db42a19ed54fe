// The memory in which some heads of one sample are computed.
#pragma once

#include "global_pointer.h"

namespace supy {

struct PointerWork {
  PointerWork(const GlobalPointerParams& p, float* base, int64_t& used) {
    columns = (p.tokens + 63) / 64 * 64;
    size = (p.size + 15) / 16 * 16;
    // Four such arrays stay in the second-level cache.
    group = std::clamp<int64_t>((1 << 16) / std::max<int64_t>(columns * size, 1), 1, std::max<int64_t>(p.heads, 1));
    Pieces pieces(base);
    for (float** piece : {&group_q, &group_k, &group_dq, &group_dk}) *piece = pieces.take(group * columns * size);
    k_turned = pieces.take(columns * size);
    closed = pieces.take(columns);
    strip = pieces.take(64 * columns);
    used = pieces.used();
  }

  int64_t rows, columns, size;                         // tokens of the sample; T and D, padded
  int64_t group;                                       // heads at once
  float *group_q, *group_k, *group_dq, *group_dk;      // [group][columns][size]; q is scaled
  float *q, *k, *dq, *dk;                              // of the selected head
  float* k_turned;                                     // [tiles][size][64]
  float* closed;                                       // 0, or -inf beyond the sample
  float* strip;                                        // a tile, or the scores of a tile's height of rows: [64][columns]
};

// What cpu/global_pointer.inl defines, for one instruction set.
struct PointerKernels {
  void (*begin)(const GlobalPointerParams&, PointerWork&, int64_t b, int64_t first, int64_t count);
  void (*select)(PointerWork&, int64_t g);
  // Returns the loss of the head; `at` has room for the scores of its positives, spans[0, count).
  double (*loss)(const GlobalPointerParams&, PointerWork&, bool gradients, const Span* spans, int64_t count, float* at);
  void (*write)(const GlobalPointerParams&, const PointerWork&, const GlobalPointerLoss&, int64_t b, int64_t first,
                int64_t count);
  void (*scores)(const GlobalPointerParams&, const PointerWork&, int64_t b, int64_t h, void* scores);
  void (*search)(const GlobalPointerParams&, const PointerWork&, int64_t h, int64_t i0, float threshold,
                 FoundCallback found, void* context, FoundSpan* buffer);
};

}  // namespace supy
