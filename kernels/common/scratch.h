// Memory for the work of a kernel.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace supy {

// Uninitialised floats, aligned to cache lines; a large block on large pages where the system has them, because a matrix
// product walks through more small pages than a processor remembers.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    const int64_t large = 1 << 21, bytes = 4 * floats + 64, align = bytes < 2 * large ? 64 : large;
    data_.reset(static_cast<float*>(std::aligned_alloc(align, bytes / align * align + align)));
    if (data_ == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (align == large) madvise(data_.get(), bytes / align * align, MADV_HUGEPAGE);
#endif
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

}  // namespace supy
