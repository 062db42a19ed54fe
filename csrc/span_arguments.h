// Reading and checking what both GlobalPointers take.
#pragma once
#include "arguments.h"
#include "spans.h"

namespace supy {

// x has the shape [B, T, sizes...] and the dtype of q, in CPU memory.
inline TokenRows token_rows(const TensorView& x, const char* op, const char* name, const TensorView& q,
                            const std::vector<int64_t>& shape) {
  check_shape(x, op, name, shape);
  check_dtype(x, op, name, q.dtype());
  const int64_t heads = x.dim() == 4 ? x.stride(2) : 0;
  return {x.data<void>(), x.stride(0), x.stride(1), heads, x.stride(x.dim() - 1)};
}

// The distinct rows of an int64 tensor [N, 4], sorted by `before`. Raises at the first row that names no visible cell.
template <class Before>
std::vector<Span> read_spans(const TensorView& spans, const char* op, const SpanScores& p, Before before) {
  check_dtype(spans, op, "spans", DType::i64);
  SUPY_CHECK(spans.dim() == 2 && spans.size(1) == 4 && !spans.is_cuda(), op,
             "spans has shape " << spans.shape() << ", expected [N, 4] in CPU memory");
  std::vector<Span> result(spans.size(0));
  const int64_t limits[] = {p.batch, p.heads, p.tokens, p.tokens};
  for (int64_t n = 0; n < spans.size(0); ++n) {
    int64_t row[4];
    bool inside = true;
    for (int i = 0; i < 4; ++i) {
      row[i] = spans.data<int64_t>()[n * spans.stride(0) + i * spans.stride(1)];
      inside = inside && row[i] >= 0 && row[i] < limits[i];
    }
    const char* named = "spans[";
    SUPY_CHECK(inside, op, named << n << "] is " << to_string(row, 4) << ", expected batch < " << p.batch << ", head < "
                                 << p.heads << ", start and end < " << p.tokens);
    SUPY_CHECK(row[2] < p.lengths[row[0]] && row[3] < p.lengths[row[0]], op,
               named << n << "] is " << to_string(row, 4) << ", expected start and end below the sample's length");
    SUPY_CHECK(!p.tril || row[2] <= row[3], op,
               named << n << "] is " << to_string(row, 4) << ", expected start <= end, because of tril=True");
    result[n] = {row[0], row[1], row[2], row[3]};
  }
  std::sort(result.begin(), result.end(), before);
  const auto same = [&](const Span& a, const Span& b) { return !before(a, b) && !before(b, a); };
  result.erase(std::unique(result.begin(), result.end(), same), result.end());
  return result;
}

// Contiguous float32 in CPU memory, of the shape of `like`.
inline float* gradient_of(const TensorView& x, const char* op, const char* name, const TensorView& like) {
  check_dtype(x, op, name, DType::f32);
  SUPY_CHECK(x.same_shape(like) && x.is_contiguous() && !x.is_cuda(), op,
             name << " must be contiguous in CPU memory, of shape " << like.shape());
  return x.data<float>();
}

inline void check_scores(const TensorView& out, const char* op, const SpanScores& p, const TensorView& q) {
  check_dtype(out, op, "out", q.dtype());
  SUPY_CHECK(out.is_contiguous() && !out.is_cuda() && out.numel() == p.batch * p.heads * p.tokens * p.tokens, op,
             "out has shape " << out.shape() << ", expected contiguous [B, H, T, T] in CPU memory");
}

inline py::tuple to_python(const SpanList& list) {
  const auto scores = tensor_from_malloc(list.scores, list.count);
  return py::make_tuple(tensor_from_malloc(reinterpret_cast<int64_t*>(list.spans), 4 * list.count), scores);
}

}  // namespace supy
