// bfloat16 where the processor multiplies pairs: three matrix products on tiles that stay in registers. W' is made a
// panel at a time where it is multiplied, rounded once, and a tile of G = gᵀx is multiplied by W and summed in registers.
//
// A tile is kPairRows broadcasts by kPairPanel lanes: 24 accumulators, and 10 loads for 24 products. Sums are plain fp32
// chains: what they lose is far below one rounding to bfloat16. Few rows of x take pairs_dots.inl; the backward is in
// pairs_backward.inl.

constexpr int kPairRows = 6;
constexpr int kPairVectors = 4;
constexpr int64_t kPairPanel = kPairVectors * kWidth;
constexpr int64_t kPairDepth = 1024;  // contracted elements of a panel of W': 128 KiB, in the L2 cache
constexpr int64_t kPairChunk = 1024;  // most rows of x contracted into G before its sums are taken
constexpr int64_t kPairGroup = 6;     // most panels of such a chunk of x that share one reading of g
constexpr int64_t kPairHeldX = 3072;  // rows of all of them together: 384 KiB, in the L2 cache

// total += a · b. a: MR rows of pairs; b: [steps, kPairPanel].
template <int MR, bool kPacked>
INLINE void multiply_tile(const bf16* a, int64_t a_stride, const uint32_t* b, int64_t steps,
                          Vec (&total)[MR][kPairVectors]) {
  for (int64_t s = 0; s < steps; ++s, b += kPairPanel) {
    Pairs b_s[kPairVectors];
    UNROLL for (int j = 0; j < kPairVectors; ++j) b_s[j] = load_pairs(b + j * kWidth);
    // The tile after this one: from L3 the processor alone fetches it too late beside the stream of panels.
    if (kPacked) __builtin_prefetch(a + 2 * (s + steps) * kPairRows, 0, 2);
    UNROLL for (int i = 0; i < MR; ++i) {
      const Pairs a_i = splat_pair(kPacked ? a + 2 * (s * kPairRows + i) : a + i * a_stride + 2 * s);
      UNROLL for (int j = 0; j < kPairVectors; ++j) total[i][j] = multiply_pairs(a_i, b_s[j], total[i][j]);
    }
  }
}

// Rows whose pairs may be read: a copy where their number of columns is odd, one run after the other.
class PairedRows {
 public:
  PairedRows(const Matrix& from, const Run* runs, int64_t count, int64_t cols)
      : copied_(cols % 2 != 0),
        buffer_(copied_ ? count * (cols + 1) * sizeof(bf16) : 0),
        data(static_cast<const bf16*>(from.data)),
        stride(from.stride) {
    if (!copied_) return;
    bf16* out = static_cast<bf16*>(buffer_.data());
    for_runs(runs, 0, count, [&](int64_t, int64_t first, int64_t n) {
      for (int64_t row = first; row < first + n; ++row, out += cols + 1) {
        __builtin_memcpy(out, data + row * stride, cols * sizeof(bf16));
        out[cols].bits = 0;
      }
    });
    data = static_cast<const bf16*>(buffer_.data());
    stride = cols + 1;
  }

  // The m-th row of all runs, which lies at `row` of the matrix.
  const bf16* at(int64_t m, int64_t row) const { return data + (copied_ ? m : row) * stride; }

 private:
  bool copied_;
  Buffer buffer_;

 public:
  const bf16* data;
  int64_t stride;
};

// The columns of every 32 split: the even ones, then the odd ones.
struct Split {
  template <class T>
  static INLINE void load_two(const T* p, int64_t left, Vec& even, Vec& odd) {
    load_split(p, first_elements(left), even, odd);
  }
};

using SplitPanels = ScalePanels<kPairRows, kPairVectors, Split>;

// 1 + s_r s_c for 32 columns, split: of rank 1 from s_r at `row` and s_c at `col`, else as made before at `made`.
template <bool kRankOne>
INLINE void factor_split(Vec base, const float* row, const float* col, const float* made, Vec& even, Vec& odd) {
  if (kRankOne) {
    const Vec scale = splat(row[0]);
    even = fma(scale, load(col), base);
    odd = fma(scale, load(col + kWidth), base);
  } else {
    even = load(made);
    odd = load(made + kWidth);
  }
}

// ---------------------------------------------------------------- forward: lanes are rows of W

// panel [⌈depth / 2⌉.., kPairPanel] = W'ᵀ of `rows` rows from n and `depth` columns from k, zero-padded.
template <class W, bool kRankOne>
SHARED void pack_transposed(const Weight& weight, const SplitPanels& split, int64_t n, int64_t rows, int64_t k, int64_t depth,
                     uint32_t* panel) {
  const Vec base = splat(static_cast<float>(weight.base));
  const int64_t group_rows = weight.group_rows(), ahead = rows_ahead<W>(weight, kWidth);
  alignas(64) float factors[kRankOne ? 1 : kWidth * kPairPanel];
  for (int64_t lane = 0; lane < kPairPanel; lane += kWidth) {
    const W* w[kWidth];
    const float *row[kWidth], *col[kWidth];
    const int64_t some = least(kWidth, rows - lane);
    for (int64_t i = 0; i < some; ++i) {
      const int64_t at = n + lane + i;
      w[i] = static_cast<const W*>(weight.data) + at * weight.stride + k;
      row[i] = static_cast<const float*>(weight.row) + at;
      col[i] = split.at(at / group_rows, k);
    }
    for (int64_t at = 0; at < depth; at += 2 * kWidth) {
      const int64_t in_panel = at % kPairPanel;
      if (!kRankOne && in_panel == 0 && some > 0) split.factors_to(weight, n + lane, some, k + at, factors);
      const __mmask32 elements = first_elements(depth - at);
      Pairs block[kWidth];
      auto rescaled = [&](int64_t i) __attribute__((always_inline)) {
        Vec even, odd, f_even, f_odd;
        __builtin_prefetch(w[i] + at + ahead);
        load_split(w[i] + at, elements, even, odd);
        factor_split<kRankOne>(base, row[i], col[i] + at, factors + i * kPairPanel + in_panel, f_even, f_odd);
        return round_pairs(mul(even, f_even), mul(odd, f_odd));
      };
      if (some == kWidth) {
        UNROLL for (int64_t i = 0; i < kWidth; ++i) block[i] = rescaled(i);
      } else {
        for (int64_t i = 0; i < kWidth; ++i) block[i] = i < some ? rescaled(i) : no_pairs();
      }
      transpose(block);
      uint32_t* out = panel + at / 2 * kPairPanel + lane;
      UNROLL for (int64_t i = 0; i < kWidth; ++i) store_pairs(out + i * kPairPanel, block[i]);
    }
  }
}

// A row of a tile to 64 contiguous bfloat16, of which `some` exist.
INLINE void store_row(bf16* out, Vec a, Vec b, Vec c, Vec d, int64_t some) {
  store_pairs(out, round_both(a, b), first_elements(some));
  store_pairs(out + 2 * kWidth, round_both(c, d), first_elements(some - 2 * kWidth));
}

// Products of `count` rows with W', by panels of its rows that do not cross a multiple of `span`.
//
// tiles(n, visit) has to call visit(m, row, height, a, stride) for all tiles of up to kPairRows rows, in pairs from `a` on,
// beside the panel from n on: m counts the rows. begin_panel(n, some) gives finish(row, total), which takes a tile's sums with
// the panel's `some` rows of W'.
template <class Tiles, class Begin>
INLINE void multiply_panels(const Weight& weight, int64_t span, int64_t count, Tiles tiles, Begin begin_panel) {
  const SplitPanels split(weight, false);
  const int64_t cols = weight.cols, panels = (span + kPairPanel - 1) / kPairPanel;
  auto body = [&](int64_t, int64_t begin, int64_t end) {
    const int64_t deepest = round_up(least(cols, kPairDepth), 2 * kWidth);
    const Buffer panel_buffer(deepest / 2 * kPairPanel * sizeof(uint32_t));
    const Buffer sums_buffer(cols > kPairDepth ? count * kPairPanel * sizeof(float) : 0);
    uint32_t* panel = static_cast<uint32_t*>(panel_buffer.data());
    float* sums = static_cast<float*>(sums_buffer.data());
    for (int64_t index = begin; index < end; ++index) {
      const int64_t n = index / panels * span + index % panels * kPairPanel;
      const int64_t some = least(kPairPanel, (index / panels + 1) * span - n);
      const auto finish = begin_panel(n, some);
      for (int64_t k = 0; k < cols; k += kPairDepth) {
        const int64_t depth = least(kPairDepth, cols - k);
        with_form(weight, [&](auto w, auto one) __attribute__((always_inline)) {
          pack_transposed<decltype(w), decltype(one)::value>(weight, split, n, some, k, depth, panel);
        });
        tiles(n, [&](int64_t m, int64_t row, int64_t height, const bf16* a, int64_t stride) __attribute__((always_inline)) {
          auto multiply = [&](auto rows) __attribute__((always_inline)) {
            constexpr int MR = decltype(rows)::value;
            Vec total[MR][kPairVectors];
            UNROLL for (int i = 0; i < MR; ++i) {
              UNROLL for (int j = 0; j < kPairVectors; ++j) {
                total[i][j] = k == 0 ? zero() : load(sums + (m + i) * kPairPanel + j * kWidth);
              }
            }
            multiply_tile<MR, false>(a + k, stride, panel, (depth + 1) / 2, total);
            if (k + depth == cols) return finish(row, total);
            UNROLL for (int i = 0; i < MR; ++i) {
              UNROLL for (int j = 0; j < kPairVectors; ++j) store(sums + (m + i) * kPairPanel + j * kWidth, total[i][j]);
            }
          };
          with_count<kPairRows>(height, multiply);
        });
      }
    }
  };
  parallel(weight.rows / span * panels, body);
}

// tile(first, height) for `count` rows in tiles of up to `tallest` and of nearly equal height.
template <class Tile>
INLINE void for_tiles(int64_t count, int64_t tallest, Tile tile) {
  const int64_t tiles = (count + tallest - 1) / tallest;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = count * i / tiles;
    tile(first, count * (i + 1) / tiles - first);
  }
}

void pairs_forward(const Forward& p) {
  const PairedRows x(p.x, p.runs, p.count, p.weight.cols);
  multiply_panels(
      p.weight, p.weight.rows, p.count,
      [&](int64_t, auto visit) __attribute__((always_inline)) {
        for_runs(p.runs, 0, p.count, [&](int64_t m, int64_t row, int64_t count) __attribute__((always_inline)) {
          for_tiles(count, kPairRows, [&](int64_t first, int64_t height) __attribute__((always_inline)) {
            visit(m + first, row + first, height, x.at(m + first, row + first), x.stride);
          });
        });
      },
      [&](int64_t n, int64_t some) __attribute__((always_inline)) {
        const Vec bias[] = {load_bias(p.bias, n, some), load_bias(p.bias, n + kWidth, some - kWidth),
                            load_bias(p.bias, n + 2 * kWidth, some - 2 * kWidth),
                            load_bias(p.bias, n + 3 * kWidth, some - 3 * kWidth)};
        return [=, &p](int64_t row, auto& total) __attribute__((always_inline)) {
          constexpr int MR = sizeof(total) / sizeof(total[0]);
          UNROLL for (int i = 0; i < MR; ++i) {
            UNROLL for (int j = 0; j < kPairVectors; ++j) total[i][j] = add(total[i][j], bias[j]);
            bf16* y = static_cast<bf16*>(p.y) + (row + i) * p.weight.rows + n;
            store_row(y, total[i][0], total[i][1], total[i][2], total[i][3], some);
          }
        };
      });
}
