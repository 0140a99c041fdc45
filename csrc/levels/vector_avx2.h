// Vectors of 8 floats: AVX2 and FMA.
#pragma once

using Vec = __m256;
constexpr int kWidth = 8;
constexpr int kTileRows = 6;  // 12 accumulators, 2 columns, 1 broadcast: 15 of 16 registers
constexpr int kDotRows = 3;   // 12 accumulators, 3 rows of x, 1 of W'
constexpr int kStreamRows = 4;

INLINE Vec zero() { return _mm256_setzero_ps(); }
INLINE Vec splat(float a) { return _mm256_set1_ps(a); }
INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

INLINE __m256i first(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
INLINE Vec load_first(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
// p[0], …, p[N - 1] in the first N lanes, and again in the next: N = 1, 2 or 4.
template <int N>
INLINE Vec splat_some(const float* p) {
  if (N == 1) return splat(p[0]);
  if (N == 2) {
    double both;
    __builtin_memcpy(&both, p, sizeof both);
    return _mm256_castpd_ps(_mm256_set1_pd(both));
  }
  const __m128 four = _mm_loadu_ps(p);
  return _mm256_insertf128_ps(_mm256_castps128_ps256(four), four, 1);
}
INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
INLINE void store_first(float* p, Vec a, int64_t n) { _mm256_maskstore_ps(p, first(n), a); }

INLINE Vec widen(__m128i bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }
INLINE __m128i narrow(Vec a) {  // to nearest even, NaN kept
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

INLINE Vec load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
INLINE void store(bf16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a)); }
INLINE Vec load_first(const bf16* p, int64_t n) {
  bf16 lanes[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
INLINE void store_first(bf16* p, Vec a, int64_t n) {
  bf16 lanes[kWidth];
  store(lanes, a);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

INLINE __m128 halves(Vec a) { return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); }
INLINE void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  const Vec abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(out, halves(abcd));
}
INLINE float sum(Vec a) {
  float out[4];
  sum4(a, zero(), zero(), zero(), out);
  return out[0];
}
