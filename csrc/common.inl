// Shared by the kernels of one level; included inside that level's namespace after its vectors.

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t a, int64_t step) { return (a + step - 1) / step * step; }

// A whole vector, or the first `n` lanes and zeros, or zeros alone.
template <class T>
INLINE Vec load_upto(const T* p, int64_t n) {
  return n >= kWidth ? load(p) : n > 0 ? load_first(p, n) : zero();
}
template <class T>
INLINE void store_upto(T* p, Vec a, int64_t n) {
  if (n >= kWidth) {
    store(p, a);
  } else if (n > 0) {
    store_first(p, a, n);
  }
}

// base + Σ_j row[j] col[j], of which `n` lanes exist. High ranks are summed by eights: one chain would lose to eager.
INLINE Vec factor(Vec base, const float* row, const float* col, int64_t cols, int64_t rank, int64_t n) {
  for (int64_t start = 0; start < rank; start += 8) {
    Vec part = start == 0 ? base : zero();
    for (int64_t j = start; j < least(start + 8, rank); ++j) part = fma(splat(row[j]), load_upto(col + j * cols, n), part);
    base = start == 0 ? part : add(base, part);
  }
  return base;
}

// total += value with the rounding error carried along: the sums over many rows must not lose to eager's pairwise ones.
INLINE void add_compensated(float* total, float* error, Vec value) {
  const Vec before = load(total);
  const Vec corrected = sub(value, load(error));
  const Vec after = add(before, corrected);
  store(error, sub(sub(after, before), corrected));
  store(total, after);
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// body(Count<n>) for 1 <= n <= N.
template <int N, class Body>
INLINE void with_count(int64_t n, Body& body) {
  if constexpr (N > 1) {
    if (n < N) return with_count<N - 1>(n, body);
  }
  body(Count<N>());
}

template <class Body>
void parallel(int64_t count, Body& body) {
  parallel_slots(
      count,
      [](void* context, int64_t slot, int64_t begin, int64_t end) {
        (*static_cast<Body*>(context))(slot, begin, end);
      },
      &body);
}

// body(m, row, n) for the rows [start, start + count) of all that the runs hold: n rows from the m-th on lie from `row` on.
template <class Body>
INLINE void for_runs(const Run* runs, int64_t start, int64_t count, Body body) {
  for (int64_t before = 0; before < start + count; before += runs->count, ++runs) {
    const int64_t m = most(start, before), end = least(start + count, before + runs->count);
    if (m < end) body(m, runs->first + m - before, end - m);
  }
}

// out [count, cols] = the fp32 values of a matrix's rows in runs.
template <class T>
void widen_rows(const Matrix& from, const Run* runs, int64_t count, int64_t cols, float* out) {
  auto body = [&](int64_t, int64_t begin, int64_t end) {
    for_runs(runs, begin, end - begin, [&](int64_t m, int64_t first, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        const T* row = static_cast<const T*>(from.data) + (first + i) * from.stride;
        for (int64_t k = 0; k < cols; k += kWidth) {
          store_upto(out + (m + i) * cols + k, load_upto(row + k, cols - k), cols - k);
        }
      }
    });
  };
  if (count * cols < 1 << 16) return body(0, 0, count);
  parallel(count, body);
}

// A matrix as fp32: itself, or its rows widened into scratch, one run after the other.
class Widened {
 public:
  Widened(const Matrix& from, Type type, int64_t count, int64_t cols) : Widened(from, type, nullptr, count, cols) {}
  Widened(const Matrix& from, Type type, const Run* runs, int64_t count, int64_t cols)
      : copied_(type == Type::bf16 && from.data != nullptr),
        buffer_(copied_ ? count * cols * sizeof(float) : 0),
        data(static_cast<const float*>(from.data)),
        stride(from.stride) {
    if (!copied_) return;
    float* out = static_cast<float*>(buffer_.data());
    const Run all{0, count};
    widen_rows<bf16>(from, runs == nullptr ? &all : runs, count, cols, out);
    data = out;
    stride = cols;
  }

  // The m-th row of all runs, which lies at `row` of the matrix.
  const float* at(int64_t m, int64_t row) const { return data + (copied_ ? m : row) * stride; }

 private:
  bool copied_;
  Buffer buffer_;

 public:
  const float* data;
  int64_t stride;
};

// ∂s_r summed by slot in double, then written in slot order. partial [slots, rows, rank].
inline void finish_grad_row(const double* partial, int64_t slots, int64_t count, float* grad_row) {
  for (int64_t i = 0; i < count; ++i) {
    double total = 0;
    for (int64_t s = 0; s < slots; ++s) total += partial[s * count + i];
    grad_row[i] = static_cast<float>(total);
  }
}

// How far ahead of an element of `rows` rows of W, read side by side, to fetch: the rows after them, or further along long
// rows. A model's W comes from memory rather than from a cache.
template <class W>
INLINE int64_t rows_ahead(const Weight& weight, int64_t rows) {
  constexpr int64_t kInCache = 24576, kAlong = 1024;  // bytes
  return rows * weight.cols * static_cast<int64_t>(sizeof(W)) <= kInCache ? rows * weight.stride
                                                                           : kAlong / static_cast<int64_t>(sizeof(W));
}

// Rows of W that stay in the L1 cache, beside some of x, while the rows of x go by: 4 or 8.
template <class W>
INLINE int64_t cache_rows(const Weight& weight) {
  constexpr int64_t kInCache = 16384;  // bytes
  return 8 * weight.cols * static_cast<int64_t>(sizeof(W)) <= kInCache ? 8 : 4;
}
