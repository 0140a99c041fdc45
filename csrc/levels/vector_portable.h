// Vectors of 4 floats in the compiler's own notation: whatever the target has at its baseline.
#pragma once

typedef float Vec __attribute__((vector_size(16), aligned(4)));
constexpr int kWidth = 4;
constexpr int kTileRows = 4;  // 8 accumulators of 16 registers
constexpr int kDotRows = 2;
constexpr int kStreamRows = 4;

INLINE float to_float(bf16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
INLINE bf16 to_bf16(float a) {  // to nearest even, NaN kept
  uint32_t bits;
  __builtin_memcpy(&bits, &a, sizeof bits);
  if (a != a) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

INLINE Vec zero() { return Vec{0, 0, 0, 0}; }
INLINE Vec splat(float a) { return Vec{a, a, a, a}; }
INLINE Vec add(Vec a, Vec b) { return a + b; }
INLINE Vec sub(Vec a, Vec b) { return a - b; }
INLINE Vec mul(Vec a, Vec b) { return a * b; }
INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

INLINE Vec load(const float* p) { return Vec{p[0], p[1], p[2], p[3]}; }
// p[0], …, p[N - 1] in the first N lanes, and again in the next: N = 1, 2 or 4.
template <int N>
INLINE Vec splat_some(const float* p) {
  return N == 1 ? splat(p[0]) : N == 2 ? Vec{p[0], p[1], p[0], p[1]} : load(p);
}
INLINE Vec load(const bf16* p) { return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
INLINE void store(float* p, Vec a) { __builtin_memcpy(p, &a, sizeof a); }
INLINE void store(bf16* p, Vec a) {
  for (int i = 0; i < kWidth; ++i) p[i] = to_bf16(a[i]);
}
template <class T>
INLINE Vec load_first(const T* p, int64_t n) {
  T lanes[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
INLINE void store_first(T* p, Vec a, int64_t n) {
  T lanes[kWidth];
  store(lanes, a);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

INLINE float sum(Vec a) { return (a[0] + a[1]) + (a[2] + a[3]); }
INLINE void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
}
