// The passes around the library's matrix product, for every dtype: W' into scratch, and G reduced where it lies.
// Plain loops over short arrays, left to the compiler to vectorise; vectors where bfloat16 and float32 are at stake.

INLINE float value(float a) { return a; }
INLINE double value(double a) { return a; }
INLINE float value(bf16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float out;
  __builtin_memcpy(&out, &bits, sizeof out);
  return out;
}
INLINE float value(half a) {
  const uint32_t sign = static_cast<uint32_t>(a.bits & 0x8000) << 16, magnitude = a.bits & 0x7fff;
  // Shifted into place the exponent is 112 too small; the product repairs normal and subnormal numbers alike.
  const uint32_t bits = magnitude << 13, infinite = 0x7f800000u | bits;
  float out, special;
  __builtin_memcpy(&out, &bits, sizeof out);
  out *= 0x1p112f;
  __builtin_memcpy(&special, &infinite, sizeof special);
  out = magnitude >= 0x7c00 ? special : out;
  return sign != 0 ? -out : out;
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
  uint32_t out_bits = magnitude < 0x38800000u ? subnormal - 0x3f000000u : normal;
  out_bits = magnitude >= 0x47800000u ? 0x7c00u : out_bits;
  out_bits = magnitude > 0x7f800000u ? 0x7e00u : out_bits;
  out.bits = static_cast<uint16_t>(sign | out_bits);
}

constexpr int64_t kStrip = 256;  // columns handled at once

// A: the accumulation type. out [rows, cols] = W'.
template <class A, class W, class T>
void merge_matrix(const Weight& weight, T* out) {
  const int64_t cols = weight.cols, rank = weight.rank;
  auto body = [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const W* w = static_cast<const W*>(weight.data) + n * weight.stride;
      const A* row = static_cast<const A*>(weight.row) + n * rank;
      const A* col = static_cast<const A*>(weight.col) + n / weight.group_rows() * rank * cols;
      for (int64_t k = 0; k < cols; k += kStrip) {
        const int64_t some = least(kStrip, cols - k);
        A f[kStrip];
        for (int64_t i = 0; i < some; ++i) f[i] = static_cast<A>(weight.base);
        for (int64_t j = 0; j < rank; ++j) {
          const A scale = row[j];
          const A* col_j = col + j * cols + k;
          for (int64_t i = 0; i < some; ++i) f[i] += scale * col_j[i];
        }
        for (int64_t i = 0; i < some; ++i) assign(out[n * cols + k + i], value(w[k + i]) * f[i]);
      }
    }
  };
  parallel(weight.rows, body);
}

template <class W, class T>
void merge_vectors(const Weight& weight, T* out) {
  const int64_t cols = weight.cols, rank = weight.rank;
  const Vec base = splat(static_cast<float>(weight.base));
  auto body = [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const W* w = static_cast<const W*>(weight.data) + n * weight.stride;
      const float* row = static_cast<const float*>(weight.row) + n * rank;
      const float* col = static_cast<const float*>(weight.col) + n / weight.group_rows() * rank * cols;
      for (int64_t k = 0; k < cols; k += kWidth) {
        const Vec f = factor(base, row, col + k, cols, rank, cols - k);
        store_upto(out + n * cols + k, mul(load_upto(w + k, cols - k), f), cols - k);
      }
    }
  };
  parallel(weight.rows, body);
}

// Lane sums first, in A; their totals in double.
template <class A>
INLINE double dot(const A* a, const A* b, int64_t size) {
  A lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    for (int64_t q = 0; q < 16; ++q) lanes[q] += a[i + q] * b[i + q];
  }
  for (; i < size; ++i) lanes[i % 16] += a[i] * b[i];
  double total = 0;
  for (int64_t q = 0; q < 16; ++q) total += lanes[q];
  return total;
}

template <class A, class W, class T>
void reduce_matrix(const Weight& weight, const T* product, A* grad_row, A* grad_col) {
  const int64_t rows = weight.rows, cols = weight.cols, rank = weight.rank, group_rows = weight.group_rows();
  const int64_t strips = (cols + kStrip - 1) / kStrip, slots = worker_count(strips), size = rows * rank;
  constexpr int64_t kRun = 16;  // rows summed in A before they go to double
  const Buffer partial(slots * size * sizeof(double));
  double* row_sums = static_cast<double*>(partial.data());
  __builtin_memset(row_sums, 0, slots * size * sizeof(double));
  auto body = [&](int64_t slot, int64_t begin, int64_t end) {
    double* row_sum = row_sums + slot * size;
    const Buffer totals_buffer(rank * kStrip * sizeof(double)), runs_buffer(rank * kStrip * sizeof(A));
    double* totals = static_cast<double*>(totals_buffer.data());
    A* runs = static_cast<A*>(runs_buffer.data());
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t k = strip * kStrip, some = least(kStrip, cols - k);
      for (int64_t group = 0; group < weight.groups; ++group) {
        __builtin_memset(totals, 0, rank * kStrip * sizeof(double));
        const A* col = static_cast<const A*>(weight.col) + group * rank * cols + k;
        const int64_t last = (group + 1) * group_rows;
        for (int64_t start = group * group_rows; start < last; start += kRun) {
          __builtin_memset(runs, 0, rank * kStrip * sizeof(A));
          for (int64_t n = start; n < least(start + kRun, last); ++n) {
            const W* w = static_cast<const W*>(weight.data) + n * weight.stride + k;
            const T* g = product + n * cols + k;
            const A* row = static_cast<const A*>(weight.row) + n * rank;
            A h[kStrip];
            for (int64_t i = 0; i < some; ++i) h[i] = value(g[i]) * value(w[i]);
            for (int64_t j = 0; j < rank; ++j) {
              row_sum[n * rank + j] += dot(h, col + j * cols, some);
              const A scale = row[j];
              A* run = runs + j * kStrip;
              for (int64_t i = 0; i < some; ++i) run[i] += scale * h[i];
            }
          }
          for (int64_t i = 0; i < rank * kStrip; ++i) totals[i] += runs[i];
        }
        for (int64_t j = 0; grad_col != nullptr && j < rank; ++j) {
          A* out = grad_col + (group * rank + j) * cols + k;
          for (int64_t i = 0; i < some; ++i) out[i] = static_cast<A>(totals[j * kStrip + i]);
        }
      }
    }
  };
  parallel(strips, body);
  for (int64_t i = 0; grad_row != nullptr && i < size; ++i) {
    double total = 0;
    for (int64_t s = 0; s < slots; ++s) total += row_sums[s * size + i];
    grad_row[i] = static_cast<A>(total);
  }
}

// Calls visit(A, W, T) with values whose types are those of the accumulation, the weight and the activations.
template <class Visit>
void with_types(Type weight, Type type, Visit visit) {
  if (type == Type::f64) return visit(double(), double(), double());
  if (type == Type::f32) return visit(float(), float(), float());
  const auto with_weight = [&](auto t) {
    if (weight == Type::f32) return visit(float(), float(), t);
    if (weight == Type::bf16) return visit(float(), bf16(), t);
    return visit(float(), half(), t);
  };
  type == Type::bf16 ? with_weight(bf16()) : with_weight(half());
}

void merge(const Weight& weight, Type type, void* out) {
  if (type == Type::f32) return merge_vectors<float>(weight, static_cast<float*>(out));
  if (type == Type::bf16 && weight.type == Type::bf16) return merge_vectors<bf16>(weight, static_cast<bf16*>(out));
  if (type == Type::bf16 && weight.type == Type::f32) return merge_vectors<float>(weight, static_cast<bf16*>(out));
  with_types(weight.type, type, [&](auto a, auto w, auto t) {
    merge_matrix<decltype(a), decltype(w), decltype(t)>(weight, static_cast<decltype(t)*>(out));
  });
}

void reduce(const Weight& weight, Type type, const void* product, void* grad_row, void* grad_col) {
  with_types(weight.type, type, [&](auto a, auto w, auto t) {
    using A = decltype(a);
    using T = decltype(t);
    reduce_matrix<A, decltype(w), T>(weight, static_cast<const T*>(product), static_cast<A*>(grad_row),
                                     static_cast<A*>(grad_col));
  });
}

template <class A, class T>
void sum_rows_of(const Matrix& from, int64_t count, int64_t cols, A* out) {
  constexpr int64_t kRun = 8;  // rows summed in A before they go to double
  auto body = [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t k = begin * kStrip; k < least(end * kStrip, cols); k += kStrip) {
      const int64_t some = least(kStrip, cols - k);
      double totals[kStrip] = {};
      for (int64_t start = 0; start < count; start += kRun) {
        A run[kStrip] = {};
        for (int64_t m = start; m < least(start + kRun, count); ++m) {
          const T* row = static_cast<const T*>(from.data) + m * from.stride + k;
          for (int64_t i = 0; i < some; ++i) run[i] += value(row[i]);
        }
        for (int64_t i = 0; i < kStrip; ++i) totals[i] += run[i];
      }
      for (int64_t i = 0; i < some; ++i) out[k + i] = static_cast<A>(totals[i]);
    }
  };
  const int64_t strips = (cols + kStrip - 1) / kStrip;
  if (count * cols < 1 << 16) return body(0, 0, strips);
  parallel(strips, body);
}

void sum_rows(Type type, const Matrix& from, int64_t count, int64_t cols, void* out) {
  with_types(Type::f32, type, [&](auto a, auto, auto t) {
    sum_rows_of<decltype(a), decltype(t)>(from, count, cols, static_cast<decltype(a)*>(out));
  });
}
