// The searches and the writing of masks, compiled once for every instruction set.
//
// Both searches are Bron-Kerbosch with the pivot of Tomita, Tanaka and Takahashi (2006): a call holds a clique, the
// candidates that could each extend it, and the excluded nodes that could too but whose cliques were reported before.
// Only candidates that are not neighbours of the pivot need a branch of their own; the pivot, candidate or excluded, is
// the node with the most neighbours among the candidates. A row holds a node's neighbours among the candidates of the
// whole search. Nodes that are excluded from the start ("outside") have a row too, but no number.

using namespace cliques;

// At most 64 candidates: every set is one word, and so is a clique.
class WordSearch {
 public:
  WordSearch(const uint64_t* rows, Array& found, int64_t most, Array& stack, Poll& poll)
      : rows_(rows), found_(found), stop_(found.size), end_(most < INT64_MAX - stop_ ? stop_ + most : INT64_MAX),
        stack_(stack), poll_(poll) {}

  void run(const WordCall& call, const uint64_t* outside, int64_t num_outside) {
    stack_.size = 0;
    stack_.reserve(num_outside * 65);  // a call has no more outside nodes than its caller
    for (int64_t i = 0; i < num_outside; ++i) {
      if (outside[i]) stack_.push(outside[i]);  // one that sees no candidate excludes nothing
    }
    expand(call.clique, call.candidates, call.excluded, stack_.begin(), stack_.size);
  }

 private:
  void expand(uint64_t clique, uint64_t candidates, uint64_t excluded, uint64_t* outside, int64_t num_outside) {
    poll_.tick();
    const int total = bits::count(candidates);
    uint64_t pivot = 0, pivot_outside = 0, universal = 0;
    int best = -1, best_outside = -1;
    for (int64_t i = 0; i < num_outside; ++i) {
      const int common = bits::count(outside[i] & candidates);
      if (common == total) return;  // extends whatever could be found
      if (common > best_outside) best_outside = common, pivot_outside = outside[i];
    }
    for (uint64_t rest = excluded; rest;) {
      const int u = bits::first(rest);
      rest ^= bits::bit(u);
      const int common = bits::count(rows_[u] & candidates);
      if (common == total) return;
      if (common > best_outside) best_outside = common, pivot_outside = rows_[u];
    }
    bits::each(candidates, [&](int u) {
      const int common = bits::count(rows_[u] & candidates);
      if (common == total - 1) {
        universal |= bits::bit(u);
      } else if (common > best) {
        best = common, pivot = rows_[u];
      }
    });
    if (universal) {  // candidates that see all the others are in every clique
      clique |= universal;
      candidates ^= universal;
      if (!candidates) return emit(clique);
      bits::each(universal, [&](int u) { excluded &= rows_[u]; });
      int64_t kept = 0;
      for (int64_t i = 0; i < num_outside; ++i) {
        outside[kept] = outside[i];
        kept += !(universal & ~outside[i]);
      }
      num_outside = kept;
    } else if (best_outside > best) {
      pivot = pivot_outside;
    }

    uint64_t* const inner = outside + num_outside;
    bits::each(candidates & ~pivot, [&](int v) {
      const uint64_t row = rows_[v], next = candidates & row;
      if (next) {
        int64_t num_inner = 0;
        for (int64_t i = 0; i < num_outside; ++i) {
          inner[num_inner] = outside[i];
          num_inner += (outside[i] & bits::bit(v)) && (outside[i] & next);
        }
        expand(clique | bits::bit(v), next, excluded & row, inner, num_inner);
      } else {
        uint64_t extends = excluded & row;
        for (int64_t i = 0; i < num_outside; ++i) extends |= outside[i] & bits::bit(v);
        if (!extends) emit(clique | bits::bit(v));
      }
      candidates ^= bits::bit(v);
      excluded |= bits::bit(v);
    });
  }

  void emit(uint64_t clique) {
    if (found_.size == stop_) {
      if (found_.size == end_) throw LimitReached();
      found_.reserve(found_.size + 1);
      stop_ = found_.capacity < end_ ? found_.capacity : end_;
    }
    found_.begin()[found_.size++] = clique;
  }

  const uint64_t* const rows_;
  Array& found_;
  int64_t stop_, end_;  // emit looks for room at stop_ (the first clique does), and gives up at end_
  Array& stack_;
  Poll& poll_;
};

// Appends a mask to `found` for every maximal clique, in no useful order; LimitReached if there are more than `most`.
void search_word(const WordCall& call, const uint64_t* rows, const uint64_t* outside, int64_t num_outside, Array& found,
                 int64_t most, Array& stack, Poll& poll) {
  WordSearch(rows, found, most, stack, poll).run(call, outside, num_outside);
}

// Sorts distinct masks in place, descending: by bytes (the American flag sort of McIlroy, Bostic and McIlroy, 1993), and
// a few masks by counting for each how many are greater, which has no branches.
void sort_descending(uint64_t* begin, uint64_t* end, int shift = 56) {
  const int64_t size = end - begin;
  int64_t sorted = 1;
  while (sorted < size && begin[sorted - 1] > begin[sorted]) ++sorted;
  if (sorted >= size) return;
  constexpr int64_t kFew = 48;
  if (size <= kFew) {
    uint64_t copy[kFew];
    __builtin_memcpy(copy, begin, size * sizeof(uint64_t));
    for (int64_t i = 0; i < size; ++i) {
      int64_t greater = 0;
      for (int64_t k = 0; k < size; ++k) greater += copy[k] > copy[i];
      begin[greater] = copy[i];
    }
    return;
  }
  const auto digit = [shift](uint64_t mask) { return ~mask >> shift & 255; };
  uint64_t *first[256], *last[256], count[256] = {};
  for (const uint64_t* m = begin; m < end; ++m) ++count[digit(*m)];
  for (int d = 0; d < 256; ++d) {
    first[d] = d ? last[d - 1] : begin;
    last[d] = first[d] + count[d];
  }
  for (uint64_t d = 0; d < 256; ++d) {
    while (first[d] < last[d]) {
      uint64_t mask = *first[d];
      for (uint64_t to; (to = digit(mask)) != d;) {
        const uint64_t other = *first[to];
        *first[to]++ = mask;
        mask = other;
      }
      *first[d]++ = mask;
    }
    if (count[d] > 1) sort_descending(last[d] - count[d], last[d], shift - 8);
  }
}

int64_t count_nodes(const uint64_t* begin, const uint64_t* end) {
  int64_t total = 0;
  for (const uint64_t* m = begin; m < end; ++m) total += bits::count(*m);
  return total;
}

// Turns masks into cliques: a mask gives way to the offset of its clique from `base`; prefix and named nodes go to
// `next` and on.
void write_masks(uint64_t* begin, uint64_t* end, const uint64_t* prefix, int64_t prefix_size, const uint64_t* names,
                 const uint64_t* base, uint64_t* next) {
  for (uint64_t* m = begin; m < end; ++m) {
    uint64_t mask = *m;
    *m = next - base;
    for (int64_t i = 0; i < prefix_size; ++i) *next++ = prefix[i];
#if SUPY_LANES == 16
    if (end - m > 8) {  // a store reaches at most seven nodes too far, into cliques that are written later
      mask = bits::reversed(mask);
      for (int i = 0; mask; i += 8, mask >>= 8) {
        const __mmask8 lanes = mask & 255;
        _mm512_storeu_si512(next, _mm512_maskz_compress_epi64(lanes, _mm512_loadu_si512(names + i)));
        next += bits::count(lanes);
      }
      continue;
    }
#endif
    bits::each(mask, [&](int i) { *next++ = names[i]; });
  }
}

// Any number of candidates: a set is an array of words, and a call is a frame on the heap, because a clique can be
// deeper than the machine's stack.
class WideSearch {
 public:
  WideSearch(const uint64_t* rows, int64_t num_candidates, const uint64_t* outside, int64_t num_outside, Poll& poll)
      : rows_(rows), outside_rows_(outside), words_(bits::words(num_candidates)), poll_(poll) {
    for (int64_t i = 0; i < num_outside; ++i) outside_.push(i);
    clique_.resize(words_);
    enter(0, 0);
    for (int64_t w = 0; w < words_; ++w) clique_.begin()[w] = candidates()[w] = excluded()[w] = 0;
    for (int64_t i = 0; i < num_candidates; ++i) bits::add(candidates(), i);
    choose_branches();
  }

  template <class Report>
  void run(Report&& report) {
    while (true) {
      const int64_t v = take_branch();
      if (v >= 0) {
        bits::add(clique_.begin(), v);
        if (descend(v)) continue;
        if (is_maximal_with(v) && !report(clique_.begin())) return;
        bits::remove(clique_.begin(), v);
      } else if (depth_ > 1) {
        bits::remove(clique_.begin(), call()[0]);
        outside_.size = call()[1];
        --depth_;
      } else {
        return;
      }
    }
  }

 private:
  // A call: the node it added to the clique, where its list of outside nodes begins (it ends where the next call's
  // begins), then the sets of its candidates, of its excluded nodes and of the branches that it has not taken.
  uint64_t* call() { return calls_.begin() + (depth_ - 1) * (2 + 3 * words_); }
  uint64_t* candidates() { return call() + 2; }
  uint64_t* excluded() { return call() + 2 + words_; }
  uint64_t* branches() { return call() + 2 + 2 * words_; }
  void enter(uint64_t node, uint64_t first_outside) {
    calls_.resize(++depth_ * (2 + 3 * words_));
    call()[0] = node;
    call()[1] = first_outside;
  }

  const uint64_t* row(int64_t v) const { return rows_ + v * words_; }
  const uint64_t* outside_row(int64_t i) const { return outside_rows_ + outside_.begin()[i] * words_; }

  void choose_branches() {
    poll_.tick(words_);
    const uint64_t *p = candidates(), *x = excluded(), *pivot = nullptr;
    int64_t best = -1, total = 0;
    const auto consider = [&](const uint64_t* r) {
      int64_t common = 0;
      for (int64_t w = 0; w < words_; ++w) common += bits::count(r[w] & p[w]);
      if (common > best) best = common, pivot = r;
    };
    for (int64_t w = 0; w < words_; ++w) total += bits::count(p[w]);
    for (int64_t i = call()[1]; i < outside_.size && best < total; ++i) consider(outside_row(i));
    for (int64_t w = 0; w < words_ && best < total - 1; ++w) {
      bits::each(p[w] | x[w], [&](int i) { consider(row(w * 64 + i)); });
    }
    for (int64_t w = 0; w < words_; ++w) branches()[w] = p[w] & ~pivot[w];
  }

  // The next branch, moved from the candidates to the excluded; -1: none is left.
  int64_t take_branch() {
    for (int64_t w = 0; w < words_; ++w) {
      if (!branches()[w]) continue;
      const int64_t v = w * 64 + bits::first(branches()[w]);
      bits::remove(branches(), v);
      bits::remove(candidates(), v);
      bits::add(excluded(), v);
      return v;
    }
    return -1;
  }

  // Enters a call for the candidates that v sees; false: there are none.
  bool descend(int64_t v) {
    const uint64_t* const r = row(v);
    uint64_t any = 0;
    for (int64_t w = 0; w < words_; ++w) any |= candidates()[w] & r[w];
    if (!any) return false;
    const int64_t begin = call()[1], end = outside_.size;
    enter(v, end);
    const uint64_t* const outer = candidates() - (2 + 3 * words_);
    for (int64_t w = 0; w < words_; ++w) {
      candidates()[w] = outer[w] & r[w];
      excluded()[w] = outer[words_ + w] & r[w];
    }
    for (int64_t i = begin; i < end; ++i) {
      const uint64_t* const x = outside_row(i);
      uint64_t common = 0;
      for (int64_t w = 0; w < words_; ++w) common |= x[w] & candidates()[w];
      if (common && bits::has(x, v)) outside_.push(outside_.begin()[i]);
    }
    choose_branches();
    return true;
  }

  bool is_maximal_with(int64_t v) {
    uint64_t extends = 0;
    for (int64_t w = 0; w < words_; ++w) extends |= excluded()[w] & row(v)[w];
    for (int64_t i = call()[1]; i < outside_.size; ++i) extends |= bits::has(outside_row(i), v);
    return !extends;
  }

  const uint64_t *const rows_, *const outside_rows_;
  const int64_t words_;
  Poll& poll_;
  int64_t depth_ = 0;
  Array calls_, outside_, clique_;
};

// report(set) for every maximal clique, in no useful order, until it returns false.
template <class Report>
void search_wide(const uint64_t* rows, int64_t candidates, const uint64_t* outside, int64_t num_outside, Poll& poll,
                 Report&& report) {
  WideSearch(rows, candidates, outside, num_outside, poll).run(report);
}
