// The passes around the library's matrix product, for every dtype: W' into scratch, and G reduced where it lies.
// Plain loops over short arrays, left to the compiler to vectorise; vectors where bfloat16 and float32 are at stake.

constexpr int64_t kStrip = 256;  // columns handled at once

// visit(T()) for an element type beside sums in A, float or double.
template <class A, class Visit>
INLINE void with_type(Type type, Visit visit) {
  if constexpr (sizeof(A) == sizeof(double)) {
    visit(double());
  } else {
    type == Type::f32 ? visit(float()) : type == Type::bf16 ? visit(bf16()) : visit(half());
  }
}

// strip [count] *= the elements of a matrix from the one at `at` on.
template <class A>
INLINE void multiply_strip(Type type, const void* from, int64_t at, int64_t count, A* strip) {
  with_type<A>(type, [&](auto element) {
    const auto* p = static_cast<const decltype(element)*>(from) + at;
    for (int64_t i = 0; i < count; ++i) strip[i] *= value(p[i]);
  });
}

// A: the accumulation type. out [rows, cols] = W' of `type`.
template <class A>
void merge_matrix(const Weight& weight, Type type, void* out) {
  const int64_t cols = weight.cols, rank = weight.rank;
  auto body = [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const A* row = static_cast<const A*>(weight.row) + n * rank;
      const A* col = static_cast<const A*>(weight.col) + n / weight.group_rows() * rank * cols;
      for (int64_t k = 0; k < cols; k += kStrip) {
        const int64_t some = least(kStrip, cols - k);
        A f[kStrip];
        // As in `factor`: ranks above one are summed before the base is added.
        const A base = static_cast<A>(weight.base);
        for (int64_t i = 0; i < some; ++i) f[i] = rank == 1 ? base + row[0] * col[k + i] : row[0] * col[k + i];
        for (int64_t j = 1; j < rank; ++j) {
          const A scale = row[j];
          const A* col_j = col + j * cols + k;
          for (int64_t i = 0; i < some; ++i) f[i] += scale * col_j[i];
        }
        for (int64_t i = 0; rank > 1 && i < some; ++i) f[i] += base;
        multiply_strip(weight.type, weight.data, n * weight.stride + k, some, f);
        with_type<A>(type, [&](auto element) {
          auto* to = static_cast<decltype(element)*>(out) + n * cols + k;
          for (int64_t i = 0; i < some; ++i) assign(to[i], f[i]);
        });
      }
    }
  };
  parallel(weight.rows, body);
}

// float32 and bfloat16 alone.
void merge_vectors(const Weight& weight, Type type, void* out) {
  const int64_t cols = weight.cols, rank = weight.rank;
  const Vec base = splat(static_cast<float>(weight.base));
  auto body = [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const float* row = static_cast<const float*>(weight.row) + n * rank;
      const float* col = static_cast<const float*>(weight.col) + n / weight.group_rows() * rank * cols;
      with_weight(weight, n, 0, [&](const auto* w) __attribute__((always_inline)) {
        for (int64_t k = 0; k < cols; k += kWidth) {
          const Vec f = factor(base, row, col + k, cols, rank, load_upto(col + k, cols - k), cols - k);
          store_upto(type, out, n * cols + k, mul(load_upto(w + k, cols - k), f), cols - k);
        }
      });
    }
  };
  parallel(weight.rows, body);
}

void merge(const Weight& weight, Type type, void* out) {
  if (type == Type::f64) return merge_matrix<double>(weight, type, out);
  if (type == Type::f16 || weight.type == Type::f16) return merge_matrix<float>(weight, type, out);
  merge_vectors(weight, type, out);
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

template <class A>
void reduce_matrix(const Weight& weight, Type type, const void* product, A* grad_row, A* grad_col) {
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
            const A* row = static_cast<const A*>(weight.row) + n * rank;
            A h[kStrip];
            with_type<A>(type, [&](auto element) {
              const auto* g = static_cast<const decltype(element)*>(product) + n * cols + k;
              for (int64_t i = 0; i < some; ++i) h[i] = value(g[i]);
            });
            multiply_strip(weight.type, weight.data, n * weight.stride + k, some, h);
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
  if (grad_row != nullptr) finish_grad_row(row_sums, slots, size, grad_row);
}

void reduce(const Weight& weight, Type type, const void* product, void* grad_row, void* grad_col) {
  if (type == Type::f64) {
    return reduce_matrix(weight, type, product, static_cast<double*>(grad_row), static_cast<double*>(grad_col));
  }
  reduce_matrix(weight, type, product, static_cast<float*>(grad_row), static_cast<float*>(grad_col));
}

template <class A>
void sum_rows_of(Type type, const Matrix& from, int64_t count, int64_t cols, A* out) {
  constexpr int64_t kRun = 4;  // rows summed in A before they go to double: eager sums rows by fours too
  auto body = [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t k = begin * kStrip; k < least(end * kStrip, cols); k += kStrip) {
      const int64_t some = least(kStrip, cols - k);
      double totals[kStrip] = {};
      for (int64_t start = 0; start < count; start += kRun) {
        A run[kStrip] = {};
        for (int64_t m = start; m < least(start + kRun, count); ++m) {
          with_type<A>(type, [&](auto element) {
            const auto* row = static_cast<const decltype(element)*>(from.data) + m * from.stride + k;
            for (int64_t i = 0; i < some; ++i) run[i] += value(row[i]);
          });
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
  type == Type::f64 ? sum_rows_of(type, from, count, cols, static_cast<double*>(out))
                    : sum_rows_of(type, from, count, cols, static_cast<float*>(out));
}
