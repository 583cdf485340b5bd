// What is computed row by row: softmax in floats and in integers, LayerNorm in floats and in integers.
#pragma once
#include "curves.h"

// kdlsq_fx/ops/int_softmax.py with the table of exponentials
struct IntSoftmax {
  const int32_t* table;  // null: softmax in floats
  int64_t multiplier, shift, limit, divider, last;
};

static inline float largest(const float* x, int64_t n) {
  __m512 top = _mm512_set1_ps(-INFINITY);
  for (int64_t j = 0; j < n; j += 16)
    top = _mm512_mask_max_ps(top, lanes(n - j), top, _mm512_maskz_loadu_ps(lanes(n - j), x + j));
  return _mm512_reduce_max_ps(top);
}

// x: n floats, overwritten with exponentials; codes of softmax(x) to `out`.
static inline void softmax_row(float* x, int64_t n, const Grid& g, uint8_t* out) {
  const __m512 top = _mm512_set1_ps(largest(x, n));
  __m512 total = _mm512_setzero_ps();
  for (int64_t j = 0; j < n; j += 16) {
    const Lanes mask = lanes(n - j);
    const __m512 e = _mm512_maskz_mov_ps(mask, exp16(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + j), top)));
    total = _mm512_add_ps(total, e);
    store_floats(x + j, e, mask);
  }
  const __m512 factor = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
  for (int64_t j = 0; j < n; j += 16) {
    const Lanes mask = lanes(n - j);
    store_bytes(out + j, quantize16(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + j), factor), g), mask);
  }
}

static inline int64_t step_of(int64_t below, const IntSoftmax& s) {
  return std::min(round_shift(std::min(std::max<int64_t>(below, 0), s.limit) * s.multiplier, s.shift), s.last);
}

// 8 differences of scores to steps of the table; doubles hold them, and are checked for ties as in common.h
static inline __m256i steps8(__m512i below, __m512d ratio, const IntSoftmax& s) {
  below = _mm512_min_epi64(_mm512_max_epi64(below, _mm512_setzero_si512()), _mm512_set1_epi64(s.limit));
  const __m512d y = _mm512_min_pd(_mm512_mul_pd(_mm512_cvtepi64_pd(below), ratio), _mm512_set1_pd(double(s.last)));
  const __m512d r = _mm512_roundscale_pd(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512d far = _mm512_abs_pd(_mm512_sub_pd(y, r));
  if (__builtin_expect(_mm512_cmp_pd_mask(far, _mm512_set1_pd(0.5 - 1e-9), _CMP_GT_OQ) == 0, 1)) return _mm512_cvtpd_epi32(r);
  alignas(64) int64_t v[8];
  alignas(32) int32_t d[8];
  _mm512_store_si512(v, below);
  for (int i = 0; i < 8; ++i) d[i] = int32_t(step_of(v[i], s));
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(d));
}

// x: n scores; keep: n bytes 0 or 1, or null; e: room for n int32 (may be x).
static inline void int_softmax_row(
    const int32_t* x, const uint8_t* keep, int64_t n, const IntSoftmax& s, const Grid& g, int32_t* e, uint8_t* out) {
  int32_t top = INT32_MIN;
  for (int64_t j = 0; j < n; ++j) top = std::max(top, !keep || keep[j] ? x[j] : INT32_MIN);
  const __m512i top64 = _mm512_set1_epi64(top);
  const __m512d ratio = _mm512_set1_pd(std::ldexp(double(s.multiplier), -int(s.shift)));
  __m512i total = _mm512_setzero_si512();
  for (int64_t j = 0; j < n; j += 16) {
    Lanes mask = lanes(n - j);
    const __m512i v = _mm512_maskz_loadu_epi32(mask, x + j);
    const __m512i low = _mm512_sub_epi64(top64, _mm512_cvtepi32_epi64(_mm512_castsi512_si256(v)));
    const __m512i high = _mm512_sub_epi64(top64, _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(v, 1)));
    const __m512i d = _mm512_inserti64x4(_mm512_castsi256_si512(steps8(low, ratio, s)), steps8(high, ratio, s), 1);
    const Lanes stored = mask;
    if (keep) {
      const __m128i kept = _mm_maskz_loadu_epi8(mask, keep + j);
      mask &= _mm_test_epi8_mask(kept, kept);
    }
    const __m512i found = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, d, s.table, 4);
    store_ints(e + j, found, stored);
    total = _mm512_add_epi64(total, _mm512_cvtepi32_epi64(_mm512_castsi512_si256(found)));
    total = _mm512_add_epi64(total, _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(found, 1)));
  }
  const int64_t whole = std::max<int64_t>(_mm512_reduce_add_epi64(total), 1) << 22;
  const __m512 factor = _mm512_set1_ps(float(double(s.divider) / double(whole)));
  for (int64_t j = 0; j < n; j += 16) {
    const Lanes mask = lanes(n - j);
    const __m512i found = _mm512_maskz_loadu_epi32(mask, e + j);
    const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(found), factor), r = rint16(y);
    __m512i codes = to_codes(r, g.zero_point, g.qmin, g.qmax);
    if (__builtin_expect(near_tie(y, r), 0)) {
      alignas(64) int32_t v[16];
      _mm512_store_si512(v, found);
      for (int32_t& one : v)
        one = int32_t(clamp64(round_divide(one * s.divider, whole) + g.zero_point, g.qmin, g.qmax));
      codes = _mm512_load_si512(v);
    }
    store_bytes(out + j, codes, mask);
  }
}

// (x - mean) / sqrt(var + eps) * gain + offset, to `real` and as codes to `codes`; either may be null.
static inline void norm_row(const float* x, int64_t n, const float* gain, const float* offset, float eps, const Grid& g,
                            float* real, uint8_t* codes) {
  __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  for (int64_t j = 0; j < n; j += 16) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes(n - j), x + j));
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / float(n));
  for (int64_t j = 0; j < n; j += 16) {
    const Lanes mask = lanes(n - j);
    const __m512 y = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, x + j), mean);
    squares = _mm512_fmadd_ps(y, y, squares);
  }
  const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / float(n) + eps));
  for (int64_t j = 0; j < n; j += 16) {
    const Lanes mask = lanes(n - j);
    __m512 y = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + j), mean), factor);
    if (gain) y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(mask, gain + j));
    if (offset) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, offset + j));
    if (real) store_floats(real + j, y, mask);
    if (codes) store_bytes(codes + j, quantize16(y, g), mask);
  }
}

// kdlsq_fx/ops/int_norm.py
struct IntNorm {
  const int64_t *gain, *offset;
  int64_t n, fraction, eps, shift, zero_point, qmin, qmax;
};

static inline int bits_of(uint64_t v) { return v ? 64 - __builtin_clzll(v) : 0; }

static inline int64_t root_of(uint64_t n) {  // floor(sqrt(n)), n < 2**32
  int64_t r = int64_t(std::sqrt(double(n)));
  while (uint64_t(r) * uint64_t(r) > n) --r;
  while (uint64_t(r + 1) * uint64_t(r + 1) <= n) ++r;
  return r;
}

// y: n int64, the codes of the row on entry; overwritten
static inline void int_norm_row(int64_t* y, const IntNorm& p, uint8_t* out) {
  int64_t sum = 0, v = 0;
  for (int64_t j = 0; j < p.n; ++j) sum += y[j] <<= p.fraction;
  const int64_t mean = round_divide(sum, p.n);
  for (int64_t j = 0; j < p.n; ++j) y[j] -= mean, v += y[j] * y[j];
  v += p.eps;
  const int h = (bits_of(v) - 31) >> 1;
  const int64_t factor = (int64_t(1) << 46) / root_of(h < 0 ? uint64_t(v) << (-2 * h) : uint64_t(v) >> (2 * h));
  const int64_t down = h + 22;
  for (int64_t j = 0; j < p.n; ++j) {
    const int64_t t = round_shift(y[j] * factor, down);
    const int64_t q = round_shift(t * p.gain[j] + p.offset[j], p.shift) + p.zero_point;
    out[j] = uint8_t(clamp64(q, p.qmin, p.qmax));
  }
}
