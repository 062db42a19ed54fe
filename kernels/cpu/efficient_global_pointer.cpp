#include "efficient_global_pointer.h"

#include "efficient_global_pointer_work.h"
#include "simd.h"

#define SUPY_KERNEL "efficient_global_pointer.inl"
#include "multitarget.h"

namespace supy {
namespace {

constexpr int64_t tile = 64;

EfficientKernels select() { SUPY_SELECT(efficient_kernels); }
const EfficientKernels kernels = select();

template <class Work>
int64_t floats_of(const EfficientGlobalPointerParams& p) {
  int64_t floats = 0;
  Work(p, nullptr, floats);
  return floats;
}

template <class Work>
Work make(const EfficientGlobalPointerParams& p, const Scratch& memory) {
  int64_t floats = 0;
  return Work(p, memory.get(), floats);
}

// The spans of a sample by (head, start, end); the lists together are by (start, end, head).
template <class Iterator>
std::vector<FoundSpan> by_head(Iterator begin, Iterator end, int64_t heads) {
  std::vector<int64_t> place(heads + 1);
  for (auto list = begin; list != end; ++list)
    for (const FoundSpan& span : *list) ++place[span.head + 1];
  for (int64_t h = 0; h < heads; ++h) place[h + 1] += place[h];
  std::vector<FoundSpan> sorted(place[heads]);
  for (auto list = begin; list != end; ++list) {
    for (const FoundSpan& span : *list) sorted[place[span.head]++] = span;
    list->clear();
    list->shrink_to_fit();
  }
  return sorted;
}

// The cells of a sample's positive spans, in terms of its rows; one on a token without a row has a score of -inf and is no
// term of the loss.
std::vector<PositiveCell> cells_of(const EfficientWork& w, const Span* spans, int64_t first, int64_t last) {
  std::vector<PositiveCell> cells;
  for (int64_t i = first; i < last;) {
    const Span& span = spans[i];
    PositiveCell cell{w.row_of[span.start], w.row_of[span.end], i, i, 0};
    while (i < last && spans[i].start == span.start && spans[i].end == span.end) cell.last = ++i;
    if (cell.row >= 0 && cell.column >= 0) cells.push_back(cell);
  }
  return cells;
}

// The loss of sample b, with as many threads as there are tiles. A tile's height of rows, and of columns, belongs to one
// thread at a time and takes its sums in an order of its own, so the number of threads shows in no bit.
double sample_loss(const EfficientGlobalPointerParams& p, const EfficientGlobalPointerLoss& loss, EfficientWork& w,
                   const std::vector<float*>& tiles, int64_t b) {
  const auto before = [](const Span& span, int64_t batch) { return span.batch < batch; };
  const Span* end = loss.spans + loss.count;
  const int64_t first = std::lower_bound(loss.spans, end, b, before) - loss.spans;
  const int64_t last = std::lower_bound(loss.spans, end, b + 1, before) - loss.spans;
  const int threads = static_cast<int>(tiles.size());
  kernels.begin(p, w, b);
  std::vector<PositiveCell> cells = cells_of(w, loss.spans, first, last);
  w.cells = cells.data();
  w.num_cells = static_cast<int64_t>(cells.size());
  const int64_t blocks = (w.rows + tile - 1) / tile;
  parallel_for(blocks, threads, [&](int thread, int64_t i) { kernels.rows(p, w, i * tile, tiles[thread]); });
  const double total = kernels.sum(p, w, loss.spans, b);
  if (!loss.gradients) return total;
  kernels.weigh(p, w);
  for (int64_t round = 0; round < blocks; ++round)
    parallel_for(p.tril ? blocks - round : blocks, threads, [&](int thread, int64_t i) {
      kernels.tile_gradient(p, w, i * tile, (i + round) % blocks * tile, tiles[thread]);
    });
  kernels.finish(p, w, loss, b);
  return total;
}

}  // namespace

double efficient_global_pointer_loss_cpu(const EfficientGlobalPointerParams& p, const EfficientGlobalPointerLoss& loss) {
  const int64_t floats = floats_of<EfficientWork>(p);
  const int threads = threads_for(p.batch * p.tokens * p.tokens * (p.heads + p.size), 1 << 20);
  std::vector<double> totals(p.batch);
  if (p.batch >= threads) {
    std::vector<Scratch> memory;
    for (int i = 0; i < threads; ++i) memory.emplace_back(floats);
    parallel_for(p.batch, threads, [&](int thread, int64_t b) {
      EfficientWork w = make<EfficientWork>(p, memory[thread]);
      totals[b] = sample_loss(p, loss, w, {w.tiles}, b);
    });
  } else {
    const Scratch memory(floats), more(threads * 2 * tile * tile);
    EfficientWork w = make<EfficientWork>(p, memory);
    std::vector<float*> tiles;
    for (int i = 0; i < threads; ++i) tiles.push_back(more.get() + i * 2 * tile * tile);
    for (int64_t b = 0; b < p.batch; ++b) totals[b] = sample_loss(p, loss, w, tiles, b);
  }
  double total = 0;
  for (double value : totals) total += value;
  return p.batch == 0 ? 0 : total / static_cast<double>(p.batch);
}

void efficient_global_pointer_scores_cpu(const EfficientGlobalPointerParams& p, void* scores) {
  const int64_t floats = floats_of<EfficientScan>(p), blocks = (p.tokens + tile - 1) / tile;
  const int threads = threads_for(p.batch * p.tokens * p.tokens * p.heads, 1 << 16);
  std::vector<Scratch> memory;
  for (int i = 0; i < threads; ++i) memory.emplace_back(floats);
  parallel_for(p.batch * blocks, threads, [&](int thread, int64_t i) {
    EfficientScan w = make<EfficientScan>(p, memory[thread]);
    kernels.scan_begin(p, w, i / blocks);
    kernels.scores(p, w, i / blocks, i % blocks * tile, scores);
  });
}

SpanList efficient_global_pointer_spans_cpu(const EfficientGlobalPointerParams& p, float threshold) {
  const int64_t floats = floats_of<EfficientScan>(p), blocks = (p.tokens + tile - 1) / tile;
  const int threads = threads_for(p.batch * p.tokens * p.tokens * (p.size + 4), 1 << 18);
  // A task is a sample, or where there are fewer of them than threads, a tile's height of one.
  const int64_t tasks_a_sample = p.batch >= threads ? 1 : blocks, tasks = p.batch * tasks_a_sample;
  std::vector<std::vector<FoundSpan>> found(tasks);
  std::vector<Scratch> memory;
  std::vector<std::vector<FoundSpan>> buffers(threads, std::vector<FoundSpan>((p.heads + 15) / 16 * 16));
  for (int i = 0; i < threads; ++i) memory.emplace_back(floats);
  parallel_for(tasks, threads, [&](int thread, int64_t task) {
    EfficientScan w = make<EfficientScan>(p, memory[thread]);
    kernels.scan_begin(p, w, task / tasks_a_sample);
    const int64_t first = tasks_a_sample == 1 ? 0 : task % blocks, last = tasks_a_sample == 1 ? blocks : first + 1;
    for (int64_t i = first; i < last && i * tile < w.rows; ++i)
      kernels.search(p, w, i * tile, threshold, append, &found[task], buffers[thread].data());
  });
  std::vector<std::vector<FoundSpan>> samples(p.batch);
  parallel_for(p.batch, threads, [&](int, int64_t b) {
    const auto begin = found.begin() + b * tasks_a_sample;
    samples[b] = by_head(begin, begin + tasks_a_sample, p.heads);
  });
  return join(samples, 1, threads);
}

}  // namespace supy
