// Operands of products that are computed, not stored: bytes of a strided matrix into the panels of tile.h.
#pragma once
#include "tile.h"

// `count` vectors of `size` codes, `stride` bytes from one to the next; the codes of a vector stand side by side.
// `flip`: the codes are uint8; 128 is subtracted from each to make them int8.
struct Side {
  const uint8_t* data;
  int64_t count, size, stride, flip;
};

static inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static inline void add_sums(int32_t* sums, __m512i quads) {  // + the 4 int8 of each lane
  const __m512i ones = _mm512_set1_epi8(1);
  _mm512_storeu_si512(sums, _mm512_dpbusd_epi32(_mm512_loadu_si512(sums), ones, quads));
}

// The vectors are the columns (keys, in q @ k.T). `size` must be a multiple of 4. sums: of each column.
static void pack_columns(const Side& s, int8_t* out, int32_t* sums) {
  const __m512i flip = _mm512_set1_epi8(s.flip ? char(0x80) : 0);
  const __m512i steps = _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(int32_t(s.stride)));
  const int64_t columns = padded(s.count, 16);
  std::memset(sums, 0, columns * 4);
  for (int64_t first = 0; first < columns; first += COLUMNS) {
    const int64_t width = std::min<int64_t>(COLUMNS, columns - first);
    for (int64_t c = 0; c < width; c += 16) {
      const Lanes there = lanes(s.count - first - c);
      const uint8_t* from = s.data + (first + c) * s.stride;
      for (int64_t k = 0; k < s.size; k += 4) {
        __m512i quads = _mm512_mask_i32gather_epi32(flip, there, steps, from + k, 1);
        quads = _mm512_xor_si512(quads, flip);
        _mm512_storeu_si512(out + k * width + 4 * c, quads);
        add_sums(sums + first + c, quads);
      }
    }
    out += s.size * width;
  }
}

// The vectors are the rows, k of them (keys, in probabilities @ v). sums: of each column.
static void pack_rows(const Side& s, int8_t* out, int32_t* sums) {
  const __m128i flip = _mm_set1_epi8(s.flip ? char(0x80) : 0);
  const int64_t columns = padded(s.size, 16), quads = padded(s.count, 4) / 4;
  std::memset(sums, 0, columns * 4);
  for (int64_t first = 0; first < columns; first += COLUMNS) {
    const int64_t width = std::min<int64_t>(COLUMNS, columns - first);
    for (int64_t q = 0; q < quads; ++q) {
      for (int64_t c = 0; c < width; c += 16) {
        __m128i r[4];
        const Lanes there = lanes(s.size - first - c);
        for (int i = 0; i < 4; ++i) {
          const int64_t row = 4 * q + i;
          const Lanes mask = row < s.count ? there : 0;  // nothing is read of rows that are not there
          r[i] = _mm_maskz_loadu_epi8(mask, s.data + row * s.stride + first + c);
          r[i] = _mm_maskz_mov_epi8(mask, _mm_xor_si128(r[i], flip));
        }
        const __m128i low01 = _mm_unpacklo_epi8(r[0], r[1]), high01 = _mm_unpackhi_epi8(r[0], r[1]);
        const __m128i low23 = _mm_unpacklo_epi8(r[2], r[3]), high23 = _mm_unpackhi_epi8(r[2], r[3]);
        __m128i* to = reinterpret_cast<__m128i*>(out + 4 * (q * width + c));
        _mm_storeu_si128(to, _mm_unpacklo_epi16(low01, low23));
        _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(low01, low23));
        _mm_storeu_si128(to + 2, _mm_unpacklo_epi16(high01, high23));
        _mm_storeu_si128(to + 3, _mm_unpackhi_epi16(high01, high23));
        add_sums(sums + first + c, _mm512_loadu_si512(to));
      }
    }
    out += 4 * quads * width;
  }
}

// `m` <= 6 rows of `size` codes, as uint8, padded with zeros to a multiple of 4. `flip`: the codes are int8.
static inline void pack_left(const uint8_t* data, int64_t stride, int m, int64_t size, bool flip, uint8_t* out) {
  const int64_t wide = padded(size, 4);
  const __m512i bits = _mm512_set1_epi8(flip ? char(0x80) : 0);
  for (int i = 0; i < m; ++i) {
    for (int64_t k = 0; k < wide; k += 64) {
      const int64_t in = size - k, fit = wide - k;
      const __mmask64 there = in >= 64 ? ~__mmask64(0) : (__mmask64(1) << in) - 1;
      const __mmask64 room = fit >= 64 ? ~__mmask64(0) : (__mmask64(1) << fit) - 1;
      const __m512i codes = _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, data + i * stride + k), bits);
      if (fit >= 64) _mm512_storeu_si512(out + i * wide + k, _mm512_maskz_mov_epi8(there, codes));
      else _mm512_mask_storeu_epi8(out + i * wide + k, room, _mm512_maskz_mov_epi8(there, codes));
    }
  }
}

static inline int32_t sum_of(const uint8_t* codes, int64_t n) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += codes[i];
  return int32_t(total);
}
