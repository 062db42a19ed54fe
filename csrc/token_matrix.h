// Reading and checking what gated attention takes: token matrices, and which keys each row sees.
#pragma once
#include <cmath>

#include "arguments.h"
#include "gau_attention.h"

namespace supy {

// x has this shape [B, T, n] and the dtype of `like`; its last axis is contiguous.
inline TokenMatrix token_matrix(const TensorView& x, const char* op, const char* name, const TensorView& like,
                                const std::vector<int64_t>& shape) {
  check_shape(x, op, name, shape);
  check_dtype(x, op, name, like.dtype());
  SUPY_CHECK(x.size(2) < 2 || x.stride(2) == 1, op, name << " has stride " << x.stride(2) << " in its last axis, expected 1");
  return {x.data<void>(), x.stride(0), x.stride(1)};
}

struct VisibleRows {
  std::vector<int64_t> lengths, first, last;
  std::vector<float> factor, share;

  VisibleKeys view() const { return {lengths.data(), first.data(), last.data(), factor.data(), share.data()}; }
};

// softmax_plus scales by log(max(l, 16)) / log 512, with l the keys that the row sees.
inline VisibleRows visible_rows(const char* op, int64_t B, int64_t T, const std::optional<TensorView>& lengths,
                                const std::optional<TensorView>& cu_seqlens, const std::string& kernel, bool causal,
                                double scale, std::optional<double> relu2_length) {
  SUPY_CHECK(kernel == "relu2" || kernel == "softmax" || kernel == "softmax_plus", op, "kernel is '" << kernel << "'");
  VisibleRows rows;
  rows.lengths = read_lengths(lengths, op, B, T);
  rows.first.assign(B * T, 0), rows.last.assign(B * T, 0);
  if (cu_seqlens) {
    const std::vector<int64_t> ends = integers(*cu_seqlens, op, "cu_seqlens");
    const auto count = static_cast<int64_t>(ends.size());
    SUPY_CHECK(B == 1 && !lengths, op, "cu_seqlens needs batch size 1 and no lengths");
    SUPY_CHECK(count > 0 && ends.front() == 0 && ends.back() == T && std::is_sorted(ends.begin(), ends.end()), op,
               "cu_seqlens must ascend from 0 to T=" << T << ", got " << to_string(ends.data(), std::min<int64_t>(count, 3))
                                                     << " to "
                                                     << to_string(ends.data() + std::max<int64_t>(count - 3, 0),
                                                                  std::min<int64_t>(count, 3)));
    for (int64_t n = 0; n + 1 < count; ++n)
      for (int64_t t = ends[n]; t < ends[n + 1]; ++t) rows.first[t] = ends[n], rows.last[t] = ends[n + 1];
  } else {
    for (int64_t b = 0; b < B; ++b) std::fill_n(rows.last.begin() + b * T, rows.lengths[b], rows.lengths[b]);
  }
  for (int64_t i = 0; i < B * T; ++i) {
    if (causal) rows.last[i] = std::min(rows.last[i], i % T + 1);
    const int64_t seen = rows.last[i] - rows.first[i];
    const double plus = kernel == "softmax_plus" ? std::log(std::max<int64_t>(seen, 16)) / std::log(512) : 1;
    rows.factor.push_back(static_cast<float>(scale * plus));
    rows.share.push_back(static_cast<float>(1 / relu2_length.value_or(std::max<int64_t>(seen, 1))));
  }
  return rows;
}

}  // namespace supy
