#include "mixed_chunk_attention.h"

#include <algorithm>

#include "parallel.h"
#include "scratch.h"

#define SUPY_KERNEL "mixed_chunk_attention.inl"
#include "multitarget.h"

namespace supy {
namespace {

int64_t run(const MixedChunkParams& p, int64_t sample, int threads, float* memory) {
  SUPY_SELECT(mixed_chunk_sample, p, sample, threads, memory);
}

// A sample a thread, or where there are fewer of them than threads, all threads for one sample after another.
struct Threads {
  explicit Threads(const MixedChunkParams& p) {
    const int64_t work = p.batch * p.tokens * (p.key_size + p.value_size) * std::min(p.chunk, p.tokens);
    const int threads = threads_for(work, 1 << 18);
    samples = p.batch >= threads ? threads : 1;
    within = samples == 1 ? threads : 1;
  }
  int samples, within;
};

}  // namespace

int64_t mixed_chunk_attention_floats(const MixedChunkParams& p) {
  const Threads threads(p);
  return p.batch == 0 || p.tokens == 0 ? 0 : threads.samples * run(p, 0, threads.within, nullptr);
}

void mixed_chunk_attention_cpu(const MixedChunkParams& p, float* memory) {
  if (p.batch == 0 || p.tokens == 0) return;
  const Threads threads(p);
  const int64_t floats = run(p, 0, threads.within, nullptr);
  parallel_for(p.batch, threads.samples,
               [&](int thread, int64_t b) { run(p, b, threads.within, memory + thread * floats); });
}

}  // namespace supy
