// The inner product of everything: a block of up to 6 rows of bytes by up to 64 packed columns, into int32.
#pragma once
#include "common.h"

static const int ROWS = 6, COLUMNS = 64;  // 24 accumulators of the 32 registers; 4 hold columns, 1 a row

// Packed columns: [k / 4][columns][4] int8, columns a multiple of 16. `a`: rows of uint8, or of int8 with FLIP, which
// adds 128 to each; whoever packs the columns subtracts what that adds to the sums.
template <int M, int N, bool FLIP>
static inline void tile(const uint8_t* a, int64_t lda, const int8_t* b, int64_t quads, int32_t* out, int64_t ldo) {
  __m512i acc[M][N];
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) acc[i][j] = _mm512_setzero_si512();
  const __m512i flip = _mm512_set1_epi8(char(0x80));
  for (int64_t k = 0; k < quads; ++k, b += 64 * N) {
    __m512i columns[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) columns[j] = _mm512_loadu_si512(b + 64 * j);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) {
      int32_t four;
      std::memcpy(&four, a + i * lda + 4 * k, 4);
      __m512i x = _mm512_set1_epi32(four);
      if (FLIP) x = _mm512_xor_si512(x, flip);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], x, columns[j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) _mm512_storeu_si512(out + i * ldo + 16 * j, acc[i][j]);
}

template <int N, bool FLIP>
static inline void rows_of(
    int m, const uint8_t* a, int64_t lda, const int8_t* b, int64_t quads, int32_t* out, int64_t ldo) {
  switch (m) {
    case 1: return tile<1, N, FLIP>(a, lda, b, quads, out, ldo);
    case 2: return tile<2, N, FLIP>(a, lda, b, quads, out, ldo);
    case 3: return tile<3, N, FLIP>(a, lda, b, quads, out, ldo);
    case 4: return tile<4, N, FLIP>(a, lda, b, quads, out, ldo);
    case 5: return tile<5, N, FLIP>(a, lda, b, quads, out, ldo);
    default: return tile<6, N, FLIP>(a, lda, b, quads, out, ldo);
  }
}

// m <= 6 rows by all of `columns` (a multiple of 16), which stand in panels of 64, the last one narrower.
static inline void product(
    int m, const uint8_t* a, int64_t lda, const int8_t* b, int64_t quads, int64_t columns, int32_t* out, int64_t ldo) {
  for (int64_t first = 0; first < columns; first += COLUMNS, b += 4 * quads * COLUMNS) {
    switch (std::min<int64_t>(4, (columns - first) / 16)) {
      case 1: rows_of<1, false>(m, a, lda, b, quads, out + first, ldo); break;
      case 2: rows_of<2, false>(m, a, lda, b, quads, out + first, ldo); break;
      case 3: rows_of<3, false>(m, a, lda, b, quads, out + first, ldo); break;
      default: rows_of<4, false>(m, a, lda, b, quads, out + first, ldo);
    }
  }
}
