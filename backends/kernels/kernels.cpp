// The native backend's kernels as C functions, called by kdlsq_fx/backends/native_library.py. No torch, no Python.
// They need AVX-512 (F, BW, DQ, VL) and VNNI; with VBMI tables of codes are faster.
#include "attention.h"
#include "linear.h"

#if !defined(__AVX512VNNI__) || !defined(__AVX512BW__) || !defined(__AVX512DQ__) || !defined(__AVX512VL__)
#error "these kernels need AVX-512 with VNNI"
#endif

// One call for `rows` independent rows; body(row) must not touch another's results.
template <typename Body>
static inline void each_row(int64_t rows, int threads, const Body& body) {
#pragma omp parallel num_threads(threads)
  {
    const Share share(rows);
    for (int64_t row = share.first; row < share.last; ++row) body(row);
  }
}

// Sum of up to 3 terms in one fixed point, kdlsq_fx/ops/fixed_point.py, int_add; then int_layer_norm where `norm` is given.
struct Term {
  const void* data;           // [rows, n] contiguous, or [n] with `is_row`
  const int64_t* multiplier;  // one, or n with `per_channel`
  int64_t bytes, is_unsigned, zero_point, per_channel, is_row;
};

struct Sum {
  Term terms[3];
  int64_t count, n, shift, zero_point, qmin, qmax, out_bytes;
};

template <typename T>
static inline void add_term(int64_t* sum, const T* data, const Term& t, int64_t n) {
  const int64_t zero = t.zero_point;
  if (t.per_channel) {
    for (int64_t j = 0; j < n; ++j) sum[j] += (int64_t(data[j]) - zero) * t.multiplier[j];
  } else {
    const int64_t m = *t.multiplier;
    for (int64_t j = 0; j < n; ++j) sum[j] += (int64_t(data[j]) - zero) * m;
  }
}

extern "C" {

int64_t kdlsq_version() { return 1; }

void kdlsq_linear(const Linear* p, const uint8_t* x, int64_t m, int64_t ldx, void* out, const float* residual, int threads) {
  linear(*p, x, m, ldx, out, residual, threads);
}

void kdlsq_attention(const Attention* p, const Tokens* t, uint8_t* out, int threads) { attention(*p, *t, out, threads); }

void kdlsq_product(const Product* p, const uint8_t* a, const int64_t* a_offsets, const uint8_t* b, const int64_t* b_offsets,
                   int64_t batch, int32_t* out, int threads) {
  batched_product(*p, a, a_offsets, b, b_offsets, batch, out, threads);
}

void kdlsq_norm(const float* x, int64_t rows, int64_t n, const float* gain, const float* offset, float eps, const Grid* g,
                float* real, uint8_t* codes, int threads) {
  each_row(rows, threads, [=](int64_t row) {
    norm_row(x + row * n, n, gain, offset, eps, *g, real ? real + row * n : nullptr, codes ? codes + row * n : nullptr);
  });
}

void kdlsq_softmax(const float* x, int64_t rows, int64_t n, const Grid* g, uint8_t* codes, int threads) {
  each_row(rows, threads, [=](int64_t row) {
    float* own = reinterpret_cast<float*>(scratch(2, n * 4));
    std::memcpy(own, x + row * n, n * 4);
    softmax_row(own, n, *g, codes + row * n);
  });
}

// keep: bool [rows, n] or null
void kdlsq_int_softmax(const int32_t* x, const uint8_t* keep, int64_t rows, int64_t n, const IntSoftmax* s, const Grid* g,
                       uint8_t* codes, int threads) {
  each_row(rows, threads, [=](int64_t row) {
    int32_t* e = reinterpret_cast<int32_t*>(scratch(2, n * 4));
    int_softmax_row(x + row * n, keep ? keep + row * n : nullptr, n, *s, *g, e, codes + row * n);
  });
}

void kdlsq_sum(const Sum* s, const IntNorm* norm, int64_t rows, void* out, int threads) {
  each_row(rows, threads, [=](int64_t row) {
    const int64_t n = s->n;
    int64_t* sum = reinterpret_cast<int64_t*>(scratch(2, n * 8));
    std::memset(sum, 0, n * 8);
    for (int64_t i = 0; i < s->count; ++i) {
      const Term& t = s->terms[i];
      const char* data = static_cast<const char*>(t.data) + (t.is_row ? 0 : row * n * t.bytes);
      if (t.bytes == 4) add_term(sum, reinterpret_cast<const int32_t*>(data), t, n);
      else if (t.bytes == 2) add_term(sum, reinterpret_cast<const int16_t*>(data), t, n);
      else if (t.is_unsigned) add_term(sum, reinterpret_cast<const uint8_t*>(data), t, n);
      else add_term(sum, reinterpret_cast<const int8_t*>(data), t, n);
    }
    for (int64_t j = 0; j < n; ++j) sum[j] = clamp64(round_shift(sum[j], s->shift) + s->zero_point, s->qmin, s->qmax);
    if (norm) return int_norm_row(sum, *norm, static_cast<uint8_t*>(out) + row * n);
    if (s->out_bytes == 4) for (int64_t j = 0; j < n; ++j) static_cast<int32_t*>(out)[row * n + j] = int32_t(sum[j]);
    else if (s->out_bytes == 2) for (int64_t j = 0; j < n; ++j) static_cast<int16_t*>(out)[row * n + j] = int16_t(sum[j]);
    else for (int64_t j = 0; j < n; ++j) static_cast<uint8_t*>(out)[row * n + j] = uint8_t(sum[j]);
  });
}

void kdlsq_int_norm(const int32_t* x, const IntNorm* p, int64_t rows, uint8_t* out, int threads) {
  each_row(rows, threads, [=](int64_t row) {
    int64_t* y = reinterpret_cast<int64_t*>(scratch(2, p->n * 8));
    for (int64_t j = 0; j < p->n; ++j) y[j] = x[row * p->n + j];
    int_norm_row(y, *p, out + row * p->n);
  });
}

// [rows, n] int32 to codes of one byte
void kdlsq_requantize(const int32_t* acc, const Requantize* p, int64_t rows, int64_t n, uint8_t* out, int threads) {
  each_row(rows, threads, [=](int64_t row) {
    for (int64_t j = 0; j < n; j += 16) {
      const Lanes mask = lanes(n - j);
      store_bytes(out + row * n + j, requantize16(_mm512_maskz_loadu_epi32(mask, acc + row * n + j), *p, j), mask);
    }
  });
}

void kdlsq_quantize(const float* x, const Grid* g, int64_t rows, int64_t n, uint8_t* out, int threads) {
  each_row(rows, threads, [=](int64_t row) {
    for (int64_t j = 0; j < n; j += 16) {
      const Lanes mask = lanes(n - j);
      store_bytes(out + row * n + j, quantize16(_mm512_maskz_loadu_ps(mask, x + row * n + j), *g), mask);
    }
  });
}

void kdlsq_gelu(const float* x, float* out, int64_t n) {  // for tests of the curve
  for (int64_t j = 0; j < n; j += 16)
    store_floats(out + j, gelu16(_mm512_maskz_loadu_ps(lanes(n - j), x + j)), lanes(n - j));
}

void kdlsq_exp(const float* x, float* out, int64_t n) {
  for (int64_t j = 0; j < n; j += 16)
    store_floats(out + j, exp16(_mm512_maskz_loadu_ps(lanes(n - j), x + j)), lanes(n - j));
}

}  // extern "C"
