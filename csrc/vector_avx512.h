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

INLINE void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  const Vec ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vec cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const Vec abcd = add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

// bf16 pairs: 32 elements, multiplied and added two by two into 16 floats.
#define RLRR_PAIRS 1
INLINE __m512i load_pairs(const void* p) { return _mm512_loadu_si512(p); }
INLINE __m512i load_pairs_first(const bf16* p, int64_t n) {
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
}
INLINE __m512i splat_pair(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
INLINE Vec multiply_pairs(__m512i a, __m512i b, Vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
// Lane i: the rounded even[i] below the rounded odd[i].
INLINE void store_pairs(uint32_t* p, Vec even, Vec odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
  _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
// Lane i < n: even[i] below odd[i], or below zero where there is no odd row.
INLINE void interleave_first(uint32_t* p, const bf16* even, const bf16* odd, int64_t n) {
  const __mmask16 lanes = first(n);
  __m512i pairs = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, even));
  if (odd != nullptr) {
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, odd));
    pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(high, 16));
  }
  _mm512_mask_storeu_epi32(p, lanes, pairs);
}
