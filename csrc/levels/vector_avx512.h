// Vectors of 16 floats: AVX-512 F, BW, DQ, VL, and the bf16 pair product of AVX512_BF16 (entered only where it exists).
#pragma once

using Vec = __m512;
constexpr int kWidth = 16;
constexpr int kTileRows = 14;  // 28 accumulators, 2 columns, 1 broadcast: 31 of 32 registers
constexpr int kDotRows = 6;    // 24 accumulators, 6 rows of x, 1 of W'
constexpr int kStreamRows = 8;

INLINE Vec zero() { return _mm512_setzero_ps(); }
INLINE Vec splat(float a) { return _mm512_set1_ps(a); }
INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
INLINE Vec load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
// p[0], …, p[N - 1] in the first N lanes, and again in the next: N = 1, 2 or 4.
template <int N>
INLINE Vec splat_some(const float* p) {
  if (N == 1) return splat(p[0]);
  if (N == 2) {
    double both;
    __builtin_memcpy(&both, p, sizeof both);
    return _mm512_castpd_ps(_mm512_set1_pd(both));
  }
  return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
}
INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
INLINE void store_first(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a); }

INLINE Vec widen(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
INLINE __m256i narrow(Vec a) {  // to nearest even, NaN kept
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_mask_mov_epi32(
      rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

INLINE Vec load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
INLINE Vec load_first(const bf16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
INLINE void store(bf16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
INLINE void store_first(bf16* p, Vec a, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), narrow(a)); }

INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a); }

INLINE __m128 four_sums(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vec cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const Vec abcd = add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
INLINE void sum4(Vec a, Vec b, Vec c, Vec d, float* out) { _mm_storeu_ps(out, four_sums(a, b, c, d)); }

// bf16 pairs: 32 elements, multiplied and added two by two into 16 floats. A lane holds the element with the lower address
// in its lower half.
#define RLRR_PAIRS 1
using Pairs = __m512i;

INLINE __mmask32 first_elements(int64_t n) {
  return n >= 32 ? ~__mmask32{0} : n > 0 ? static_cast<__mmask32>((uint64_t{1} << n) - 1) : 0;
}
INLINE Pairs no_pairs() { return _mm512_setzero_si512(); }
INLINE Pairs load_pairs(const void* p) { return _mm512_loadu_si512(p); }
INLINE Pairs load_pairs(const void* p, __mmask32 elements) { return _mm512_maskz_loadu_epi16(elements, p); }
INLINE void store_pairs(void* p, Pairs a) { _mm512_storeu_si512(p, a); }
INLINE void store_pairs(void* p, Pairs a, __mmask32 elements) { _mm512_mask_storeu_epi16(p, elements, a); }
INLINE Pairs splat_pair(const void* p, bool both = true) {  // without `both` the second is 0
  int bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return _mm512_set1_epi32(both ? bits : bits & 0xffff);
}
INLINE Vec multiply_pairs(Pairs a, Pairs b, Vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }

// The lower and the upper halves of the lanes, widened.
INLINE Vec lower(Pairs a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }
INLINE Vec upper(Pairs a) {
  return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
// Elements 0, 2, … and 1, 3, … of 32; those that `elements` lacks are zero.
INLINE void load_split(const bf16* p, __mmask32 elements, Vec& even, Vec& odd) {
  const Pairs both = load_pairs(p, elements);
  even = lower(both);
  odd = upper(both);
}
INLINE void load_split(const float* p, __mmask32 elements, Vec& even, Vec& odd) {
  const __m512i from = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const Vec a = _mm512_maskz_loadu_ps(static_cast<__mmask16>(elements), p);
  const Vec b = _mm512_maskz_loadu_ps(static_cast<__mmask16>(elements >> 16), p + kWidth);
  even = _mm512_permutex2var_ps(a, from, b);
  odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(from, _mm512_set1_epi32(1)), b);
}
// Rounded: 32 elements, those of `a` before those of `b`.
INLINE Pairs round_both(Vec a, Vec b) { return (Pairs)_mm512_cvtne2ps_pbh(b, a); }
// Rounded: lane i holds low[i] below high[i].
INLINE Pairs round_pairs(Vec low, Vec high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, round_both(low, high));
}
// Lanes of a and b: the elements 0, 2, … of each side by side, and the elements 1, 3, ….
INLINE Pairs pair_even(Pairs a, Pairs b) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16));
}
INLINE Pairs pair_odd(Pairs a, Pairs b) { return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b); }
// out [n <= 4] = the rounded sums of the lanes, plus `plus`.
INLINE void sum4(Vec a, Vec b, Vec c, Vec d, const float (&plus)[4], bf16* out, int64_t n) {
  const __m128 sums = _mm_add_ps(four_sums(a, b, c, d), _mm_loadu_ps(plus));
  _mm_mask_storeu_epi16(out, static_cast<__mmask8>((1u << n) - 1), (__m128i)_mm_cvtneps_pbh(sums));
}
// Lanes of a and b side by side, of each eight elements the first four or the last four.
INLINE Pairs interleave_low(Pairs a, Pairs b) { return _mm512_unpacklo_epi16(a, b); }
INLINE Pairs interleave_high(Pairs a, Pairs b) { return _mm512_unpackhi_epi16(a, b); }
// 32 floats in order from the first and the last four of each eight.
INLINE void join_eights(Vec low, Vec high, Vec& first, Vec& second) {
  const __m512i fours = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  first = _mm512_permutex2var_ps(low, fours, high);
  second = _mm512_permutex2var_ps(low, _mm512_add_epi32(fours, _mm512_set1_epi32(8)), high);
}
// Lane i < n <= 8: even[i] below odd[i], or below zero where there is no odd row.
INLINE void interleave_first(uint32_t* p, const bf16* even, const bf16* odd, int64_t n) {
  const __mmask8 lanes = static_cast<__mmask8>((1u << n) - 1);
  const __m128i low = _mm_maskz_loadu_epi16(lanes, even);
  const __m128i high = odd == nullptr ? _mm_setzero_si128() : _mm_maskz_loadu_epi16(lanes, odd);
  const __m256i pairs =
      _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi16(low, high)), _mm_unpackhi_epi16(low, high), 1);
  _mm256_mask_storeu_epi32(p, lanes, pairs);
}
// The lanes of 16 vectors as a matrix, transposed.
INLINE void transpose(Pairs (&r)[16]) {
  Pairs t[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  UNROLL for (int c = 0; c < 4; ++c) {
    const Pairs even0 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), even1 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    const Pairs odd0 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd), odd1 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(even0, even1, 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
    t[12 + c] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
  }
  UNROLL for (int i = 0; i < 16; ++i) r[i] = t[i];
}
