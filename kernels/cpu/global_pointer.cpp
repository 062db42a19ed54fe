#include "global_pointer.h"

#include "global_pointer_work.h"
#include "simd.h"

#define SUPY_KERNEL "global_pointer.inl"
#include "multitarget.h"

namespace supy {
namespace {

PointerKernels select() { SUPY_SELECT(pointer_kernels); }
const PointerKernels kernels = select();

int threads_of(const GlobalPointerParams& p) {
  return threads_for(p.batch * p.heads * p.tokens * p.tokens * (p.size + 1), 1 << 19);
}

// body(work, b, h) for every head of every sample, where work has it selected; then end(work, b, first, count) for each
// group of heads.
template <class Body, class End>
void each_head(const GlobalPointerParams& p, Body&& body, End&& end) {
  int64_t floats = 0;
  const int64_t group = PointerWork(p, nullptr, floats).group, groups = (p.heads + group - 1) / group;
  const int threads = threads_of(p);
  std::vector<Scratch> memory;
  for (int i = 0; i < threads; ++i) memory.emplace_back(floats);
  parallel_for(p.batch * groups, threads, [&](int thread, int64_t i) {
    PointerWork w(p, memory[thread].get(), floats);
    const int64_t b = i / groups, first = i % groups * group, count = std::min(group, p.heads - first);
    kernels.begin(p, w, b, first, count);
    for (int64_t g = 0; g < count; ++g) {
      kernels.select(w, g);
      body(w, b, first + g);
    }
    end(w, b, first, count);
  });
}

void nothing(const PointerWork&, int64_t, int64_t, int64_t) {}

}  // namespace

double global_pointer_loss_cpu(const GlobalPointerParams& p, const GlobalPointerLoss& loss) {
  std::vector<double> totals(p.batch * p.heads);
  std::vector<float> at(loss.count);
  const auto one_head = [&](PointerWork& w, int64_t b, int64_t h) {
    const auto before = [&](const Span& span, int64_t head) { return span.batch * p.heads + span.head < head; };
    const int64_t head = b * p.heads + h;
    const Span* end = loss.spans + loss.count;
    const Span* first = std::lower_bound(loss.spans, end, head, before);
    const Span* last = std::lower_bound(first, end, head + 1, before);
    totals[head] = kernels.loss(p, w, loss.gradients, first, last - first, at.data() + (first - loss.spans));
  };
  each_head(p, one_head, [&](const PointerWork& w, int64_t b, int64_t first, int64_t count) {
    if (loss.gradients) kernels.write(p, w, loss, b, first, count);
  });
  double total = 0;
  for (double value : totals) total += value;
  return p.batch == 0 ? 0 : total / static_cast<double>(p.batch);
}

void global_pointer_scores_cpu(const GlobalPointerParams& p, void* scores) {
  each_head(p, [&](PointerWork& w, int64_t b, int64_t h) { kernels.scores(p, w, b, h, scores); }, nothing);
}

SpanList global_pointer_spans_cpu(const GlobalPointerParams& p, float threshold) {
  std::vector<std::vector<FoundSpan>> found(p.batch * p.heads);
  const auto one_head = [&](PointerWork& w, int64_t b, int64_t h) {
    FoundSpan buffer[64];
    for (int64_t i0 = 0; i0 < w.rows; i0 += 64)
      kernels.search(p, w, h, i0, threshold, append, &found[b * p.heads + h], buffer);
  };
  each_head(p, one_head, nothing);
  return join(found, p.heads, threads_of(p));
}

}  // namespace supy
