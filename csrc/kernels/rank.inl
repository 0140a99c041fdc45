// Ranks above one: the factor s_r s_c of a block of W, and the scale gradients of a block of G ⊙ W, as small matrix products
// on tiles of registers, like the products of x and g around them.

// total += Σ_s a[s] ⊗ b[s]: element i of a[s] lies at a[i * a_row + s * a_step], b[s] is NV vectors at b + s * b_step. With
// kShare above 1 that many elements from there on are for as many neighbouring lanes.
template <int kShare = 1, int MR, int NV>
INLINE void multiply_broadcast(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
                               int64_t steps, Vec (&total)[MR][NV]) {
  for (int64_t s = 0; s < steps; ++s, a += a_step, b += b_step) {
    Vec b_s[NV];
    UNROLL for (int v = 0; v < NV; ++v) b_s[v] = load(b + v * kWidth);
    UNROLL for (int i = 0; i < MR; ++i) {
      const Vec a_i = splat_some<kShare>(a + i * a_row);
      UNROLL for (int v = 0; v < NV; ++v) total[i][v] = fma(a_i, b_s[v], total[i][v]);
    }
  }
}

template <int MR, int NV>
INLINE void clear(Vec (&total)[MR][NV]) {
  UNROLL for (int i = 0; i < MR; ++i) {
    UNROLL for (int v = 0; v < NV; ++v) total[i][v] = zero();
  }
}

// The same from zero. Up to three rows are summed in four chains, of every fourth step: one would lose to eager, whose products
// of so few rows have several.
template <int MR, int NV>
INLINE void multiply_few(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t steps,
                         Vec (&total)[MR][NV]) {
  constexpr int kChains = MR <= 3 ? 4 : 1;
  clear(total);
  for (int c = 0; c < kChains; ++c) {
    Vec chain[MR][NV];
    clear(chain);
    multiply_broadcast(a + c * a_step, a_row, kChains * a_step, b + c * b_step, kChains * b_step,
                       (steps + kChains - 1 - c) / kChains, chain);
    UNROLL for (int i = 0; i < MR; ++i) {
      UNROLL for (int v = 0; v < NV; ++v) total[i][v] = c == 0 ? chain[i][v] : add(total[i][v], chain[i][v]);
    }
  }
}

constexpr int64_t kLaneRows = kTileRows / 2;

// NV vectors of lanes of ∂s_r: out [rows <= kLaneRows, lanes] += h [rows, cols] · across [cols / kShare, lanes]. In two sums,
// of every other column: one would lose to eager, which sums few columns in a tree.
template <int kShare, int NV>
SHARED void reduce_lanes(const float* h, int64_t cols, int64_t rows, const float* across, int64_t lanes, float* out) {
  const int64_t steps = cols / kShare / 2;
  auto tile = [&](auto height) __attribute__((always_inline)) {
    constexpr int MR = decltype(height)::value;
    Vec first[MR][NV], second[MR][NV];
    clear(first);
    clear(second);
    multiply_broadcast<kShare>(h, cols, 2 * kShare, across, 2 * lanes, steps, first);
    multiply_broadcast<kShare>(h + kShare, cols, 2 * kShare, across + lanes, 2 * lanes, steps, second);
    UNROLL for (int i = 0; i < MR; ++i) {
      UNROLL for (int v = 0; v < NV; ++v) {
        float* at = out + i * lanes + v * kWidth;
        store(at, add(load(at), add(first[i][v], second[i][v])));
      }
    }
  };
  with_count<kLaneRows>(rows, tile);
}

// The order of columns in a panel: as they are. pairs.inl has another one.
struct InOrder {
  // Two vectors from p, of whose elements `left` exist; the others are zero.
  template <class T>
  static INLINE void load_two(const T* p, int64_t left, Vec& a, Vec& b) {
    a = load_upto(p, left);
    b = load_upto(p + kWidth, left - kWidth);
  }
};

// s_c in panels of NV vectors of columns, zero-padded, in the order `Order`; and each panel transposed, if asked for. Tiles
// with lanes along the columns have kRows broadcasts.
template <int kRows, int NV, class Order>
class ScalePanels {
 public:
  static constexpr int64_t kCols = NV * kWidth;

  ScalePanels(const Weight& weight, bool transposed)
      : rank(weight.rank),
        share(weight.rank <= kWidth / 4 ? 4 : weight.rank <= kWidth / 2 ? 2 : 1),
        lanes(round_up(weight.rank, kWidth)),
        panels_((weight.cols + kCols - 1) / kCols),
        size_(weight.groups * panels_ * kCols),
        buffer_(size_ * (rank + (transposed ? lanes : 0)) * sizeof(float)),
        data_(static_cast<float*>(buffer_.data())) {
    const float* from = static_cast<const float*>(weight.col);
    for (int64_t group = 0; group < weight.groups; ++group) {
      for (int64_t panel = 0; panel < panels_; ++panel) {
        const int64_t k = panel * kCols;
        float* out = data_ + (group * panels_ + panel) * rank * kCols;
        for (int64_t j = 0; j < rank; ++j) {
          for (int64_t at = 0; at < kCols; at += 2 * kWidth) {
            Vec a, b;
            Order::load_two(from + (group * rank + j) * weight.cols + k + at, weight.cols - k - at, a, b);
            store(out + j * kCols + at, a);
            store(out + j * kCols + at + kWidth, b);
          }
        }
        if (!transposed) continue;
        float* across = data_ + size_ * rank + (group * panels_ + panel) * kCols * lanes;
        for (int64_t c = 0; c < kCols; c += share, across += lanes) {
          for (int64_t j = 0; j < lanes; ++j) across[j] = j < rank * share ? out[j / share * kCols + c + j % share] : 0;
        }
      }
    }
  }

  // s_c of a group from the panel of column k on: [panels, rank, kCols].
  const float* at(int64_t group, int64_t k) const { return data_ + (group * panels_ + k / kCols) * rank * kCols; }
  // One panel transposed: [kCols / share, lanes], of each rank as many columns side by side.
  const float* transposed(int64_t group, int64_t k) const {
    return data_ + size_ * rank + (group * panels_ + k / kCols) * kCols * lanes;
  }

  // put(i, f) for the rows n + i of W, i < rows: f [NV] = base + s_r s_c of the panel of column k.
  template <class Put>
  INLINE void factors(const Weight& weight, int64_t n, int64_t rows, int64_t k, Put put) const {
    constexpr int64_t kMost = kRows < 8 ? kRows : 8;
    const int64_t group_rows = weight.group_rows();
    const Vec base = splat(static_cast<float>(weight.base));
    for (int64_t start = 0; start < rows;) {
      const int64_t group = (n + start) / group_rows, until = (group + 1) * group_rows - n;
      const int64_t some = least(least(rows, until) - start, kMost);
      auto tile = [&](auto height) __attribute__((always_inline)) {
        constexpr int MR = decltype(height)::value;
        Vec total[MR][NV];
        clear(total);
        const float* row = static_cast<const float*>(weight.row) + (n + start) * rank;
        multiply_broadcast(row, rank, 1, at(group, k), kCols, rank, total);
        UNROLL for (int i = 0; i < MR; ++i) {
          UNROLL for (int v = 0; v < NV; ++v) total[i][v] = add(base, total[i][v]);
          put(start + i, total[i]);
        }
      };
      with_count<kMost>(some, tile);
      start += some;
    }
  }

  // The same in out [rows, kCols].
  SHARED void factors_to(const Weight& weight, int64_t n, int64_t rows, int64_t k, float* out) const {
    factors(weight, n, rows, k, [out](int64_t i, const Vec (&f)[NV]) __attribute__((always_inline)) {
      UNROLL for (int v = 0; v < NV; ++v) store(out + i * kCols + v * kWidth, f[v]);
    });
  }

  // Adds what the block h [rows, kCols] of G ⊙ W gives, the rows n.. of W (of one group) and the panel of column k: to
  // the panel's ∂s_c in col_sums [rank, kCols], if compensated with the rounding errors in `error`, and to ∂s_r in row_sums
  // [N, lanes].
  template <bool kCompensated>
  SHARED void reduce(const Weight& weight, int64_t n, int64_t rows, int64_t k, const float* h, float* col_sums, float* error,
                     float* row_sums) const {
    const int64_t tiles = (rank + kRows - 1) / kRows;  // of nearly equal height
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t j = rank * t / tiles, after = rank * (t + 1) / tiles;
      auto tile = [&](auto height) __attribute__((always_inline)) {
        constexpr int MR = decltype(height)::value;
        Vec total[MR][NV];
        multiply_few(static_cast<const float*>(weight.row) + n * rank + j, 1, rank, h, kCols, rows, total);
        UNROLL for (int i = 0; i < MR; ++i) {
          UNROLL for (int v = 0; v < NV; ++v) {
            const int64_t at = (j + i) * kCols + v * kWidth;
            if (kCompensated) {
              add_compensated(col_sums + at, error + at, total[i][v]);
            } else {
              store(col_sums + at, add(load(col_sums + at), total[i][v]));
            }
          }
        }
      };
      with_count<kRows>(after - j, tile);
    }
    const float* across = transposed(n / weight.group_rows(), k);
    for (int64_t i = 0; i < rows; i += kLaneRows) {
      const int64_t some = least(kLaneRows, rows - i);
      float* out = row_sums + (n + i) * lanes;
      int64_t j = 0;
      if (share == 4) reduce_lanes<4, 1>(h + i * kCols, kCols, some, across, lanes, out), j = lanes;
      if (share == 2) reduce_lanes<2, 1>(h + i * kCols, kCols, some, across, lanes, out), j = lanes;
      for (; j + kWidth < lanes; j += 2 * kWidth) {
        reduce_lanes<1, 2>(h + i * kCols, kCols, some, across + j, lanes, out + j);
      }
      if (j < lanes) reduce_lanes<1, 1>(h + i * kCols, kCols, some, across + j, lanes, out + j);
    }
  }

  // ∂s_r [N, rank] from row_sums [slots, N, lanes].
  void finish(const float* row_sums, int64_t slots, int64_t rows, float* grad_row) const {
    for (int64_t i = 0; i < rows; ++i, row_sums += lanes) {
      for (int64_t j = 0; j < rank; ++j) {
        double total = 0;
        for (int64_t s = 0; s < slots; ++s) {
          const float* from = row_sums + s * rows * lanes;
          for (int64_t lane = j * share; lane < (j + 1) * share; ++lane) total += from[lane];
        }
        grad_row[i * rank + j] = static_cast<float>(total);
      }
    }
  }

  const int64_t rank;
  const int64_t share;  // neighbouring lanes of ∂s_r that belong to one rank: 1, 2 or 4
  const int64_t lanes;  // of ∂s_r: whole vectors

 private:
  int64_t panels_, size_;
  Buffer buffer_;
  float* data_;
};
