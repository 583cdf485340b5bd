// x @ w.T + bias on codes, and what stands behind it, while the sums are still in the cache.
#pragma once
#include "curves.h"
#include "tile.h"

enum Behind { ACCUMULATOR, CODES, REAL, CURVE };  // int32; requantized; float (+ residual); float, curve, quantized
enum Curve { NONE, GELU, RELU };

// All vectors are padded to a multiple of 64 columns; `bias` holds what the zero point and the flip of x add, too.
struct Linear {
  const int8_t* weight;   // panels of 64 columns, see tile.h
  const int32_t* bias;
  const float* scale;     // REAL, CURVE
  const uint8_t* table;   // CODES: a function of the code, 256 entries by its byte, or null
  int64_t n, k, flip, behind, curve;
  Requantize requantize;  // CODES
  Grid grid;              // CURVE
};

static inline void finish_row(
    const Linear& p, const int32_t* sums, int64_t column, void* out, const float* residual) {
  alignas(64) uint8_t codes[64];
  for (int j = 0; j < 4; ++j) {
    const int64_t at = column + 16 * j;
    const Lanes mask = lanes(p.n - at);
    const __m512i acc = _mm512_add_epi32(_mm512_loadu_si512(sums + 16 * j), _mm512_loadu_si512(p.bias + at));
    if (p.behind == ACCUMULATOR) {
      store_ints(static_cast<int32_t*>(out) + at, acc, mask);
    } else if (p.behind == CODES) {
      _mm_store_si128(reinterpret_cast<__m128i*>(codes + 16 * j), _mm512_cvtepi32_epi8(requantize16(acc, p.requantize, at)));
    } else {
      __m512 real = _mm512_mul_ps(_mm512_cvtepi32_ps(acc), _mm512_loadu_ps(p.scale + at));
      if (p.behind == REAL) {
        if (residual) real = _mm512_add_ps(real, _mm512_maskz_loadu_ps(mask, residual + at));
        store_floats(static_cast<float*>(out) + at, real, mask);
      } else {
        if (p.curve == GELU) real = gelu16(real);
        if (p.curve == RELU) real = _mm512_max_ps(real, _mm512_setzero_ps());
        store_bytes(static_cast<uint8_t*>(out) + at, quantize16(real, p.grid), mask);
      }
    }
  }
  if (p.behind != CODES) return;
  const int64_t left = p.n - column;
  __m512i row = _mm512_load_si512(codes);
  if (p.table) row = lookup64(row, p.table);
  if (left >= 64) _mm512_storeu_si512(static_cast<uint8_t*>(out) + column, row);
  else _mm512_mask_storeu_epi8(static_cast<uint8_t*>(out) + column, (__mmask64(1) << left) - 1, row);
}

// x: `m` rows of k bytes (k a multiple of 4), `ldx` bytes apart. out, residual: [m, n] contiguous.
static void linear(const Linear& p, const uint8_t* x, int64_t m, int64_t ldx, void* out, const float* residual, int threads) {
  const int64_t chunk = 8 * ROWS, panels = (p.n + COLUMNS - 1) / COLUMNS, chunks = (m + chunk - 1) / chunk;
  const int64_t size = p.behind == CODES || p.behind == CURVE ? 1 : 4;
#pragma omp parallel num_threads(threads)
  {
    alignas(64) int32_t sums[ROWS * COLUMNS];
    const Share share(panels * chunks);
    for (int64_t task = share.first; task < share.last; ++task) {
      const int64_t panel = task / chunks, begin = task % chunks * chunk, end = std::min(m, begin + chunk);
      const int8_t* columns = p.weight + panel * COLUMNS * p.k;
      for (int64_t row = begin; row < end; row += ROWS) {
        const int count = int(std::min<int64_t>(ROWS, end - row));
        const uint8_t* from = x + row * ldx;
        if (p.flip) rows_of<4, true>(count, from, ldx, columns, p.k / 4, sums, COLUMNS);
        else rows_of<4, false>(count, from, ldx, columns, p.k / 4, sums, COLUMNS);
        for (int i = 0; i < count; ++i)
          finish_row(p, sums + i * COLUMNS, panel * COLUMNS, static_cast<uint8_t*>(out) + (row + i) * p.n * size,
                     residual ? residual + (row + i) * p.n : nullptr);
      }
    }
  }
}
