// exp and GELU on 16 floats. Islands of float: right to a few units of 2**-24 of the largest value, not to the last bit.
#pragma once
#include "common.h"

// exp(x) for x <= 0
static inline __m512 exp16(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-104.0f));  // 0 in float32 from here on, and no infinities below
  const __m512 n = rint16(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)));
  __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // ln 2 in two parts
  f = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), f);
  __m512 p = _mm512_set1_ps(1.0f / 720);  // the series of exp on |f| <= ln(2) / 2
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

// The normal distribution's Phi on [0, 6) in 16 pieces of degree 5, interpolated at Chebyshev's points when loaded.
struct Phi {
  static const int PIECES = 16, TERMS = 6;
  alignas(64) float coefficient[TERMS][PIECES];
  static constexpr double WIDTH = 6.0 / PIECES;

  Phi() {
    for (int piece = 0; piece < PIECES; ++piece) {
      double a[TERMS][TERMS + 1];
      for (int i = 0; i < TERMS; ++i) {
        const double t = std::cos(M_PI * (i + 0.5) / TERMS), x = (piece + 0.5 + 0.5 * t) * WIDTH;
        for (int j = 0; j < TERMS; ++j) a[i][j] = std::pow(t, j);
        a[i][TERMS] = 0.5 * std::erfc(-x * M_SQRT1_2);
      }
      for (int c = 0; c < TERMS; ++c) {  // Gauss and Jordan; the points are far apart, but the first column needs no pivot
        int best = c;
        for (int i = c; i < TERMS; ++i)
          if (std::fabs(a[i][c]) > std::fabs(a[best][c])) best = i;
        std::swap(a[c], a[best]);
        for (int i = 0; i < TERMS; ++i) {
          if (i == c) continue;
          const double factor = a[i][c] / a[c][c];
          for (int j = c; j <= TERMS; ++j) a[i][j] -= factor * a[c][j];
        }
      }
      for (int c = 0; c < TERMS; ++c) coefficient[c][piece] = float(a[c][TERMS] / a[c][c]);
    }
  }
};
static const Phi PHI;

// x * Phi(x)
static inline __m512 gelu16(__m512 x) {
  const __m512 size = _mm512_min_ps(_mm512_abs_ps(x), _mm512_set1_ps(5.9999995f));
  const __m512 place = _mm512_mul_ps(size, _mm512_set1_ps(float(1 / Phi::WIDTH)));
  const __m512i piece = _mm512_cvttps_epi32(place);
  const __m512 from = _mm512_sub_ps(place, _mm512_cvtepi32_ps(piece));  // 0 to 1 within the piece
  const __m512 t = _mm512_fmsub_ps(from, _mm512_set1_ps(2.0f), _mm512_set1_ps(1.0f));
  __m512 p = _mm512_permutexvar_ps(piece, _mm512_load_ps(PHI.coefficient[Phi::TERMS - 1]));
  for (int c = Phi::TERMS - 2; c >= 0; --c)
    p = _mm512_fmadd_ps(p, t, _mm512_permutexvar_ps(piece, _mm512_load_ps(PHI.coefficient[c])));
  const Lanes below = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  p = _mm512_mask_sub_ps(p, below, _mm512_set1_ps(1.0f), p);
  return _mm512_mul_ps(x, p);
}
