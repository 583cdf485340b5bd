// What all kernels share: grids, exact rounding, and the tails of rows. AVX-512 with VNNI; two's complement wraps.
#pragma once
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

using Lanes = __mmask16;

// Mask of the lanes of a vector of 16 that begins `left` elements before the end of its row.
static inline Lanes lanes(int64_t left) { return left >= 16 ? Lanes(0xffff) : Lanes((1u << std::max<int64_t>(left, 0)) - 1); }

// real = (code - zero_point) * step, qmin <= code <= qmax; `inverse` is 1 / step.
struct Grid {
  float step, inverse;
  int32_t zero_point, qmin, qmax;
};

// code = clamp(round_half_even(acc * multiplier / 2**shift) + zero_point); one multiplier, or one a channel.
struct Requantize {
  const int64_t *multiplier, *shift;
  const float* ratio;  // multiplier / 2**shift in float32
  int64_t per_channel;
  int32_t zero_point, qmin, qmax;
};

// A float32 quotient that lies this close to a tie may be on its wrong side: 3 roundings of 2**-24 on at most 512 codes
// are below 2**-13. Such vectors are computed again exactly, so codes never depend on the shortcut.
static const float NEAR_TIE = 0.5f - 0x1p-13f;

static inline bool near_tie(__m512 y, __m512 rounded) {
  const __m512 far = _mm512_abs_ps(_mm512_sub_ps(y, rounded));
  return _mm512_cmp_ps_mask(far, _mm512_set1_ps(NEAR_TIE), _CMP_GT_OQ) != 0;
}

static inline __m512 rint16(__m512 y) { return _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// Rounded floats to codes. Clamped as floats: an int32 could not hold them all.
static inline __m512i to_codes(__m512 rounded, int32_t zero_point, int32_t qmin, int32_t qmax) {
  rounded = _mm512_max_ps(rounded, _mm512_set1_ps(float(qmin - zero_point)));
  rounded = _mm512_min_ps(rounded, _mm512_set1_ps(float(qmax - zero_point)));
  return _mm512_add_epi32(_mm512_cvtps_epi32(rounded), _mm512_set1_epi32(zero_point));
}

// kdlsq_fx/ops/qdq.py, quantize: clamp(round_half_even(x / step) + zero_point)
static inline __m512i quantize16(__m512 x, const Grid& g) {
  const __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(g.inverse));
  __m512 r = rint16(y);
  if (__builtin_expect(near_tie(y, r), 0)) r = rint16(_mm512_div_ps(x, _mm512_set1_ps(g.step)));
  return to_codes(r, g.zero_point, g.qmin, g.qmax);
}

static inline int64_t round_shift(int64_t value, int64_t shift) {
  const int64_t half = int64_t(1) << (shift - 1), odd = (value >> shift) & 1;
  return (value + half - 1 + odd) >> shift;
}

static inline int64_t round_divide(int64_t n, int64_t d) {  // d > 0
  int64_t floor = n / d, rest = n % d;
  if (rest < 0) floor -= 1, rest += d;
  return floor + (2 * rest + (floor & 1) > d);
}

static inline int64_t clamp64(int64_t v, int64_t low, int64_t high) { return std::min(std::max(v, low), high); }

static __attribute__((noinline)) __m512i requantize_exactly(__m512i acc, const Requantize& p, int64_t channel) {
  alignas(64) int32_t v[16];
  _mm512_store_si512(v, acc);
  for (int i = 0; i < 16; ++i) {
    const int64_t c = p.per_channel ? channel + i : 0;
    const int64_t q = round_shift(v[i] * p.multiplier[c], p.shift[c]) + p.zero_point;
    v[i] = int32_t(clamp64(q, p.qmin, p.qmax));
  }
  return _mm512_load_si512(v);
}

// kdlsq_fx/ops/fixed_point.py, requantize; `channel` of the first lane. Constants of channels are padded to 64.
static inline __m512i requantize16(__m512i acc, const Requantize& p, int64_t channel) {
  const __m512 ratio = p.per_channel ? _mm512_loadu_ps(p.ratio + channel) : _mm512_set1_ps(*p.ratio);
  const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(acc), ratio), r = rint16(y);
  if (__builtin_expect(near_tie(y, r), 0)) return requantize_exactly(acc, p, channel);
  return to_codes(r, p.zero_point, p.qmin, p.qmax);
}

// Stores of a vector or of the tail of a row; masked stores are slow on some CPUs, so whole vectors go without.
static inline void store_bytes(void* to, __m512i codes, Lanes mask) {
  const __m128i bytes = _mm512_cvtepi32_epi8(codes);
  if (__builtin_expect(mask == 0xffff, 1)) _mm_storeu_si128(static_cast<__m128i*>(to), bytes);
  else _mm_mask_storeu_epi8(to, mask, bytes);
}

static inline void store_ints(int32_t* to, __m512i v, Lanes mask) {
  if (__builtin_expect(mask == 0xffff, 1)) _mm512_storeu_si512(to, v);
  else _mm512_mask_storeu_epi32(to, mask, v);
}

static inline void store_floats(float* to, __m512 v, Lanes mask) {
  if (__builtin_expect(mask == 0xffff, 1)) _mm512_storeu_ps(to, v);
  else _mm512_mask_storeu_ps(to, mask, v);
}

// 64 codes, as bytes, through a table of 256 bytes.
static inline __m512i lookup64(__m512i bytes, const uint8_t* table) {
#ifdef __AVX512VBMI__
  const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), bytes, _mm512_loadu_si512(table + 64));
  const __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), bytes, _mm512_loadu_si512(table + 192));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(bytes), low, high);
#else
  alignas(64) uint8_t v[64];
  _mm512_store_si512(v, bytes);
  for (uint8_t& b : v) b = table[b];
  return _mm512_load_si512(v);
#endif
}

// The share [first, last) of `tasks` that this thread of the team takes.
struct Share {
  int64_t first, last;
  explicit Share(int64_t tasks) {
    const int64_t t = omp_get_thread_num(), all = omp_get_num_threads();
    first = tasks * t / all, last = tasks * (t + 1) / all;
  }
};

// Memory of a thread that stays from call to call, aligned to cache lines.
static inline uint8_t* scratch(int which, size_t bytes) {
  static thread_local std::vector<uint8_t> owned[8];
  std::vector<uint8_t>& v = owned[which];
  if (v.size() < bytes + 64) v.resize(bytes + 64);
  return v.data() + (64 - (reinterpret_cast<uintptr_t>(v.data()) & 63)) % 64;
}
