// Shared by the kernels of one level; included inside that level's namespace after its vectors.

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t a, int64_t step) { return (a + step - 1) / step * step; }

// Single numbers: widened, and rounded to nearest even with NaN kept; without branches, which would keep loops from vectors.
INLINE float value(float a) { return a; }
INLINE double value(double a) { return a; }
INLINE float value(bf16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float out;
  __builtin_memcpy(&out, &bits, sizeof out);
  return out;
}
INLINE uint32_t select(bool condition, uint32_t a, uint32_t b) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (a & mask) | (b & ~mask);
}

INLINE float value(half a) {
  const uint32_t sign = static_cast<uint32_t>(a.bits & 0x8000) << 16, magnitude = a.bits & 0x7fff;
  // Shifted into place the exponent is 112 too small; the product repairs normal and subnormal numbers alike.
  const uint32_t bits = magnitude << 13;
  float out;
  __builtin_memcpy(&out, &bits, sizeof out);
  out *= 0x1p112f;
  uint32_t out_bits;
  __builtin_memcpy(&out_bits, &out, sizeof out_bits);
  out_bits = select(magnitude >= 0x7c00, 0x7f800000u | bits, out_bits) | sign;
  __builtin_memcpy(&out, &out_bits, sizeof out);
  return out;
}

INLINE void assign(float& out, float a) { out = a; }
INLINE void assign(double& out, double a) { out = a; }
INLINE void assign(bf16& out, float a) {
  uint32_t bits;
  __builtin_memcpy(&bits, &a, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = static_cast<uint16_t>(a != a ? 0x7fc0 : rounded);
}
INLINE void assign(half& out, float a) {
  uint32_t bits;
  __builtin_memcpy(&bits, &a, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  float shifted;  // adding 2^-1 leaves a subnormal's 10 bits, rounded, at the bottom of the sum
  __builtin_memcpy(&shifted, &magnitude, sizeof shifted);
  shifted += 0.5f;
  uint32_t subnormal;
  __builtin_memcpy(&subnormal, &shifted, sizeof subnormal);
  uint32_t out_bits = select(magnitude < 0x38800000u, subnormal - 0x3f000000u, normal);
  out_bits = select(magnitude >= 0x47800000u, 0x7c00u, out_bits);
  out_bits = select(magnitude > 0x7f800000u, 0x7e00u, out_bits);
  out.bits = static_cast<uint16_t>(sign | out_bits);
}

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

// The same at the element `at` of a matrix of float32 or bfloat16.
INLINE void store_upto(Type type, void* p, int64_t at, Vec a, int64_t n) {
  type == Type::f32 ? store_upto(static_cast<float*>(p) + at, a, n) : store_upto(static_cast<bf16*>(p) + at, a, n);
}

// b + f of the row n of W, and of a vector of rows of which `left` exist; zeros without either.
INLINE float bias_at(const Bias& bias, int64_t n) {
  return (bias.shared == nullptr ? 0 : bias.shared[n]) + (bias.own == nullptr ? 0 : bias.own[n]);
}
INLINE Vec load_bias(const Bias& bias, int64_t n, int64_t left) {
  const Vec shared = bias.shared == nullptr ? zero() : load_upto(bias.shared + n, left);
  return bias.own == nullptr ? shared : add(shared, load_upto(bias.own + n, left));
}

// visit(w): the element at row n and column k of a weight of float32 or bfloat16, and what follows it.
template <class Visit>
INLINE void with_weight(const Weight& weight, int64_t n, int64_t k, Visit visit) {
  const int64_t at = n * weight.stride + k;
  weight.type == Type::f32 ? visit(static_cast<const float*>(weight.data) + at)
                           : visit(static_cast<const bf16*>(weight.data) + at);
}

// base + Σ_j row[j] col[j], of which `n` lanes exist and `first` is col[0]. Ranks above one are summed before the base is
// added, which every partial sum would be rounded beside, and by eights: one chain would lose to eager.
INLINE Vec factor(Vec base, const float* row, const float* col, int64_t cols, int64_t rank, Vec first, int64_t n) {
  if (rank == 1) return fma(splat(row[0]), first, base);
  Vec total = mul(splat(row[0]), first);
  for (int64_t start = 1; start < rank; start += 8) {
    Vec part = start == 1 ? total : zero();
    for (int64_t j = start; j < least(start + 8, rank); ++j) part = fma(splat(row[j]), load_upto(col + j * cols, n), part);
    total = start == 1 ? part : add(total, part);
  }
  return add(base, total);
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

// visit(W(), Count<0 or 1>()) with the type of the weight, float32 or bfloat16, and whether its rank is one.
template <class Visit>
INLINE void with_form(const Weight& weight, Visit visit) {
  const auto with_rank = [&](auto w) __attribute__((always_inline)) {
    weight.rank == 1 ? visit(w, Count<1>()) : visit(w, Count<0>());
  };
  weight.type == Type::f32 ? with_rank(float()) : with_rank(bf16());
}

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

// ∂s_r from the sums of every slot, added in their order: partial [slots, rows, rank].
template <class P, class A>
void finish_grad_row(const P* partial, int64_t slots, int64_t count, A* grad_row) {
  for (int64_t i = 0; i < count; ++i) {
    P total = 0;
    for (int64_t s = 0; s < slots; ++s) total += partial[s * count + i];
    grad_row[i] = static_cast<A>(total);
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
