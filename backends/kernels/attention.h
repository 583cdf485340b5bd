// softmax(q @ k.T + mask) @ v on codes, one head at a time, nothing of it leaving the cache; and products alone.
#pragma once
#include "pack.h"
#include "rows.h"

struct Strides {
  int64_t batch, head, row;  // in bytes; the codes of a row stand side by side
};

enum MaskKind { NO_MASK, ADDED, KEPT };  // float32 to add to the scores; bool, true where a key is there

struct Attention {
  int64_t q_signed, q_zero, k_signed, k_zero, v_signed, v_zero;
  float scale;       // of the scores; floats only
  Grid probs;        // codes of the probabilities, 0...255
  IntSoftmax whole;  // table null: in floats
  Requantize out;
};

struct Tokens {  // one call
  const uint8_t *q, *k, *v, *mask;
  Strides q_strides, k_strides, v_strides, mask_strides;  // mask: in elements, a key after the other or all the same
  int64_t mask_step, mask_kind, batch, heads, rows, keys, dim;  // dim: a multiple of 4
};

static inline void probabilities(const Attention& p, const Tokens& t, int64_t b, int64_t h, int64_t row, int32_t row_term,
                                 const int32_t* terms, int32_t* scores, uint8_t* keep, uint8_t* out) {
  const int64_t at = b * t.mask_strides.batch + h * t.mask_strides.head + row * t.mask_strides.row, n = t.keys;
  for (int64_t j = 0; j < n; ++j) scores[j] += terms[j] + row_term;
  if (p.whole.table) {
    const uint8_t* kept = nullptr;
    if (t.mask_kind == KEPT) {
      kept = t.mask + at;
      if (t.mask_step == 0) std::memset(keep, *kept, n), kept = keep;
    }
    return int_softmax_row(scores, kept, n, p.whole, p.probs, scores, out);
  }
  float* real = reinterpret_cast<float*>(scores);
  const float* mask = t.mask_kind == ADDED ? reinterpret_cast<const float*>(t.mask) + at : nullptr;
  for (int64_t j = 0; j < n; j += 16) {
    const Lanes there = lanes(n - j);
    __m512 x = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(there, scores + j));
    x = _mm512_mul_ps(x, _mm512_set1_ps(p.scale));
    if (mask)
      x = _mm512_add_ps(x, t.mask_step ? _mm512_maskz_loadu_ps(there, mask + j) : _mm512_set1_ps(*mask));
    store_floats(real + j, x, there);
  }
  softmax_row(real, n, p.probs, out);
}

// out: codes [batch, rows, heads, dim] contiguous
static void attention(const Attention& p, const Tokens& t, uint8_t* out, int threads) {
  const int64_t pairs = t.batch * t.heads, dim = t.dim, columns = padded(t.keys, 16), keys = padded(t.keys, 4);
  const int64_t width = padded(dim, 16);
  const int64_t parts = pairs >= threads ? 1 : (threads + pairs - 1) / pairs, part = padded((t.rows + parts - 1) / parts, ROWS);
  // codes less zero point, as tile.h takes them: q' = q + 128 and k' = k - 128 where the sign is not the one it wants
  const int32_t q_zero = int32_t(p.q_zero) + (p.q_signed ? 128 : 0);
  const int32_t k_zero = int32_t(p.k_zero) - (p.k_signed ? 0 : 128), v_zero = int32_t(p.v_zero) - (p.v_signed ? 0 : 128);
#pragma omp parallel num_threads(threads)
  {
    int8_t* k_packed = reinterpret_cast<int8_t*>(scratch(0, columns * dim));
    int8_t* v_packed = reinterpret_cast<int8_t*>(scratch(1, keys * width));
    int32_t* scores = reinterpret_cast<int32_t*>(scratch(2, ROWS * columns * 4));
    int32_t* terms = reinterpret_cast<int32_t*>(scratch(3, columns * 4));
    uint8_t* probs = scratch(4, ROWS * keys + 64);
    uint8_t* left = scratch(5, ROWS * dim + 64);
    int32_t* sums = reinterpret_cast<int32_t*>(scratch(6, (ROWS + 1) * width * 4));
    uint8_t* keep = scratch(7, columns);
    int32_t* v_sums = sums + ROWS * width;
    int64_t packed = -1;
    const Share share(pairs * parts);
    for (int64_t task = share.first; task < share.last; ++task) {
      const int64_t pair = task / parts, b = pair / t.heads, h = pair % t.heads;
      if (packed != pair) {
        packed = pair;
        const uint8_t* k = t.k + b * t.k_strides.batch + h * t.k_strides.head;
        const uint8_t* v = t.v + b * t.v_strides.batch + h * t.v_strides.head;
        pack_columns(Side{k, t.keys, dim, t.k_strides.row, !p.k_signed}, k_packed, terms);
        pack_rows(Side{v, t.keys, dim, t.v_strides.row, !p.v_signed}, v_packed, v_sums);
        for (int64_t j = 0; j < columns; ++j) terms[j] = -q_zero * terms[j] + int32_t(dim) * q_zero * k_zero;
      }
      const int64_t first = task % parts * part, last = std::min(t.rows, first + part);
      const uint8_t* q = t.q + b * t.q_strides.batch + h * t.q_strides.head;
      for (int64_t row = first; row < last; row += ROWS) {
        const int m = int(std::min<int64_t>(ROWS, last - row));
        pack_left(q + row * t.q_strides.row, t.q_strides.row, m, dim, p.q_signed, left);
        product(m, left, dim, k_packed, dim / 4, columns, scores, columns);
        for (int i = 0; i < m; ++i) {
          const int32_t row_term = k_zero ? -k_zero * sum_of(left + i * dim, dim) : 0;
          probabilities(p, t, b, h, row + i, row_term, terms, scores + i * columns, keep, probs + i * keys);
          for (int64_t j = t.keys; j < keys; ++j) probs[i * keys + j] = 0;
        }
        product(m, probs, keys, v_packed, keys / 4, width, sums, width);
        for (int i = 0; i < m; ++i) {
          const int32_t row_term = v_zero ? -v_zero * sum_of(probs + i * keys, t.keys) : 0;
          const int32_t both = int32_t(t.keys) * p.probs.zero_point * v_zero + row_term;
          uint8_t* to = out + ((b * t.rows + row + i) * t.heads + h) * dim;
          for (int64_t j = 0; j < dim; j += 16) {
            __m512i acc = _mm512_add_epi32(_mm512_loadu_si512(sums + i * width + j), _mm512_set1_epi32(both));
            if (p.probs.zero_point)
              acc = _mm512_sub_epi32(acc, _mm512_mullo_epi32(_mm512_set1_epi32(p.probs.zero_point), _mm512_loadu_si512(v_sums + j)));
            store_bytes(to + j, requantize16(acc, p.out, 0), lanes(dim - j));
          }
        }
      }
    }
  }
}

// One product of a batch: (a - a_zero) @ (b - b_zero), a [n, k], b [k, m] with its codes side by side along m (rows) or
// along k (columns). out: int32 [n, m] contiguous.
struct Product {
  int64_t n, k, m, a_signed, a_zero, b_signed, b_zero, b_in_columns, a_stride, b_stride;
};

static void batched_product(const Product& p, const uint8_t* a, const int64_t* a_offsets, const uint8_t* b,
                            const int64_t* b_offsets, int64_t batch, int32_t* out, int threads) {
  const int64_t k = padded(p.k, 4), columns = padded(p.m, 16);
  const int32_t a_zero = int32_t(p.a_zero) + (p.a_signed ? 128 : 0), b_zero = int32_t(p.b_zero) - (p.b_signed ? 0 : 128);
#pragma omp parallel num_threads(threads)
  {
    int8_t* right = reinterpret_cast<int8_t*>(scratch(0, columns * k));
    int32_t* sums = reinterpret_cast<int32_t*>(scratch(2, ROWS * columns * 4));
    int32_t* terms = reinterpret_cast<int32_t*>(scratch(3, columns * 4));
    uint8_t* left = scratch(5, ROWS * k + 64);
    const Share share(batch);
    for (int64_t one = share.first; one < share.last; ++one) {
      const uint8_t* from = a + a_offsets[one];
      if (p.b_in_columns) pack_columns(Side{b + b_offsets[one], p.m, p.k, p.b_stride, !p.b_signed}, right, terms);
      else pack_rows(Side{b + b_offsets[one], p.k, p.m, p.b_stride, !p.b_signed}, right, terms);
      for (int64_t j = 0; j < columns; ++j) terms[j] = -a_zero * terms[j] + int32_t(p.k) * a_zero * b_zero;
      for (int64_t row = 0; row < p.n; row += ROWS) {
        const int m = int(std::min<int64_t>(ROWS, p.n - row));
        pack_left(from + row * p.a_stride, p.a_stride, m, p.k, p.a_signed, left);
        product(m, left, k, right, k / 4, columns, sums, columns);
        for (int i = 0; i < m; ++i) {
          const int32_t row_term = b_zero ? -b_zero * sum_of(left + i * k, p.k) : 0;
          int32_t* to = out + (one * p.n + row + i) * p.m;
          for (int64_t j = 0; j < p.m; ++j) to[j] = sums[i * columns + j] + terms[j] + row_term;
        }
      }
    }
  }
}
