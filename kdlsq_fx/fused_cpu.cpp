// One pass each over the data for a learned quantizer, forward and backward, and for the masked squares of a loss.
// The arithmetic is quantizer.py's and lsq.py's, operation for operation; built by fused_cpu.py, called through ctypes.
//
// A tensor is n0 x n1 x n2 x n3 with unit stride in the last dimension of both sides. Work is cut into planes (n0 x n1),
// or, where all lies in one row, into chunks of CHUNK: never by the number of threads, so sums do not depend on it.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int64_t CHUNK = 16384, PART = 2048, SMALL = 32768;

struct bf16 {
    uint16_t bits;
    operator float() const {
        uint32_t wide = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
};
inline void put(float& to, float value) { to = value; }
inline void put(double& to, double value) { to = value; }
inline void put(bf16& to, float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    uint32_t rounded = wide + 0x7fff + ((wide >> 16) & 1);
    to.bits = uint16_t((value != value ? (wide | 0x400000) : rounded) >> 16);
}
inline float nearest(float v) { return __builtin_rintf(v); }
inline double nearest(double v) { return __builtin_rint(v); }
template <class T> inline T clamped(T v, T low, T high) {  // NaN stays
    v = v < low ? low : v;
    return v > high ? high : v;
}

struct Layout {
    int64_t n[4], x[3], y[3];  // sizes; strides of the input; strides of the output and its gradient
    int64_t planes() const { return n[0] * n[1]; }
    bool flat() const { return planes() * n[2] == 1; }
    int64_t count() const { return planes() * n[2] * n[3]; }
    int64_t pieces() const { return flat() ? (n[3] + CHUNK - 1) / CHUNK : planes(); }
    // calls row(offset in x, offset in y, length) for each row of a piece
    template <class F> void each(int64_t piece, F row) const {
        if (flat()) {
            int64_t from = piece * CHUNK, size = n[3] - from < CHUNK ? n[3] - from : CHUNK;
            return row(from, from, size);
        }
        int64_t i = piece / n[1], j = piece % n[1];
        for (int64_t k = 0; k < n[2]; ++k)
            row(i * x[0] + j * x[1] + k * x[2], i * y[0] + j * y[1] + k * y[2], n[3]);
    }
};

struct Grid {
    double qmin, qmax, low, high;  // codes; the open interval of x / step in which the gradient passes
    int64_t alpha;                 // raw is a clip value, qmax steps of it
    int64_t per_row;               // one scale for each plane
    int64_t threads;
};

template <class T> struct Scale {
    T step, zero;
    Scale(const Grid& g, const T* raw, const T* floor, const T* offset, int64_t at) {
        T least = raw[at] < floor[at] ? floor[at] : raw[at];
        step = g.alpha ? least / T(g.qmax) : least;
        zero = offset ? clamped(nearest(-offset[0] / step), T(g.qmin), T(g.qmax)) : T(0);
    }
};

template <class X, class T>
void forward(const Layout& l, const Grid& g, const X* x, T* y, T* raw, const T* floor, const T* offset, bool project) {
    const T qmin = T(g.qmin), qmax = T(g.qmax);
    if (project)
        for (int64_t c = 0; c < (g.per_row ? l.planes() : 1); ++c) raw[c] = raw[c] < floor[c] ? floor[c] : raw[c];
#pragma omp parallel for schedule(static) num_threads(g.threads) if (l.count() > SMALL)
    for (int64_t piece = 0; piece < l.pieces(); ++piece) {
        const Scale<T> s(g, raw, floor, offset, g.per_row && !l.flat() ? piece : 0);
        l.each(piece, [&](int64_t from, int64_t to, int64_t n) {
            const X* a = x + from;
            T* b = y + to;
            const T step = s.step, zero = s.zero;
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) {
                const T q = clamped(nearest(T(a[i]) / step) + zero, qmin, qmax);
                b[i] = (q - zero) * step;
            }
        });
    }
}

template <class X, class T, bool WRITE>
void backward(const Layout& l, const Grid& g, const X* x, const T* grad, X* grad_x, const T* raw, const T* floor,
              const T* offset, const T* features, T* grad_raw, T* grad_offset) {
    const T qmin = T(g.qmin), qmax = T(g.qmax), low = T(g.low), high = T(g.high);
    std::vector<double> slopes(l.pieces()), outside(l.pieces());
#pragma omp parallel for schedule(static) num_threads(g.threads) if (l.count() > SMALL)
    for (int64_t piece = 0; piece < l.pieces(); ++piece) {
        const Scale<T> s(g, raw, floor, offset, g.per_row && !l.flat() ? piece : 0);
        double all = 0, out = 0;
        l.each(piece, [&](int64_t from, int64_t to, int64_t n) {
            for (int64_t start = 0; start < n; start += PART) {
                const X* a = x + from + start;
                const T* d = grad + to + start;
                X* e = WRITE ? grad_x + from + start : nullptr;
                const int64_t size = n - start < PART ? n - start : PART;
                const T step = s.step, zero = s.zero;
                T sum = 0, beyond = 0;
#pragma omp simd reduction(+ : sum, beyond)
                for (int64_t i = 0; i < size; ++i) {
                    const T up = d[i], r = T(a[i]) / step, q = clamped(nearest(r) + zero, qmin, qmax), rz = r + zero;
                    const bool cut = (rz <= low) | (rz >= high);  // NaN is not cut, as in the plain version
                    const T passed = cut ? T(0) : up, within = cut ? T(0) : rz;
                    sum += (q - within) * up;
                    beyond += up - passed;
                    if (WRITE) put(e[i], passed);
                }
                all += sum;
                out += beyond;
            }
        });
        slopes[piece] = all;
        outside[piece] = out;
    }
    const double share = g.alpha ? 1 / g.qmax : 1 / std::sqrt((features[0] < 1 ? 1.0 : double(features[0])) * g.qmax);
    const bool rows = g.per_row && !l.flat();
    double total = 0, beyond = 0;
    for (int64_t piece = 0; piece < l.pieces(); ++piece) {
        total = rows ? slopes[piece] : total + slopes[piece];
        beyond += outside[piece];
        if (!rows && piece + 1 < l.pieces()) continue;
        grad_raw[rows ? piece : 0] = T(total * share);
    }
    if (grad_offset) grad_offset[0] = T(beyond * share);
}

// total[b] = sum of ((student - teacher) * keep)^2 over the plane b; entries <= floor count as 0
template <class T> struct Squares {
    int64_t n[4], k[4];  // sizes of the contiguous tensors; strides of keep, 0 where it is broadcast
    int64_t floored, threads;
    T floor;
    T least() const { return floored ? floor : -std::numeric_limits<T>::infinity(); }
    const T* weights(const T* keep, int64_t plane, int64_t r) const {
        return keep ? keep + (plane / n[1]) * k[0] + (plane % n[1]) * k[1] + r * k[2] : nullptr;
    }
};

template <class T> void squares(const Squares<T>& s, const T* a, const T* b, const T* keep, T* total) {
    const T least = s.least();
    std::vector<double> sums(s.n[0] * s.n[1]);
#pragma omp parallel for schedule(static) num_threads(s.threads) if (s.n[0] * s.n[1] * s.n[2] * s.n[3] > SMALL)
    for (int64_t plane = 0; plane < s.n[0] * s.n[1]; ++plane) {
        double all = 0;
        for (int64_t r = 0; r < s.n[2]; ++r) {
            const int64_t at = (plane * s.n[2] + r) * s.n[3];
            const T* w = s.weights(keep, plane, r);
            T sum = 0;
            if (w && !s.k[3] && *w == 0) continue;  // a row that does not count
            if (w && s.k[3]) {
#pragma omp simd reduction(+ : sum)
                for (int64_t i = 0; i < s.n[3]; ++i) {
                    const T u = a[at + i], v = b[at + i];
                    const T d = ((u <= least ? T(0) : u) - (v <= least ? T(0) : v)) * w[i];
                    sum += d * d;
                }
            } else {
#pragma omp simd reduction(+ : sum)
                for (int64_t i = 0; i < s.n[3]; ++i) {
                    const T u = a[at + i], v = b[at + i];
                    const T d = (u <= least ? T(0) : u) - (v <= least ? T(0) : v);
                    sum += d * d;
                }
                sum *= w ? *w * *w : T(1);
            }
            all += sum;
        }
        sums[plane] = all;
    }
    for (int64_t i = 0; i < s.n[0]; ++i) {
        double all = 0;
        for (int64_t j = 0; j < s.n[1]; ++j) all += sums[i * s.n[1] + j];
        total[i] = T(all);
    }
}

template <class T>
void squares_back(const Squares<T>& s, const T* a, const T* b, const T* keep, const T* up, T* out) {
    const T least = s.least();
#pragma omp parallel for schedule(static) num_threads(s.threads) if (s.n[0] * s.n[1] * s.n[2] * s.n[3] > SMALL)
    for (int64_t plane = 0; plane < s.n[0] * s.n[1]; ++plane) {
        const T scale = 2 * up[plane / s.n[1]];
        for (int64_t r = 0; r < s.n[2]; ++r) {
            const int64_t at = (plane * s.n[2] + r) * s.n[3];
            const T* w = s.weights(keep, plane, r);
            if (w && !s.k[3] && *w == 0) {
                std::memset(out + at, 0, s.n[3] * sizeof(T));
                continue;
            }
            if (w && s.k[3]) {
#pragma omp simd
                for (int64_t i = 0; i < s.n[3]; ++i) {
                    const T u = a[at + i], v = b[at + i];
                    out[at + i] = u <= least ? T(0) : (u - (v <= least ? T(0) : v)) * w[i] * w[i] * scale;
                }
            } else {
                const T factor = w ? *w * *w * scale : scale;
#pragma omp simd
                for (int64_t i = 0; i < s.n[3]; ++i) {
                    const T u = a[at + i], v = b[at + i];
                    out[at + i] = u <= least ? T(0) : (u - (v <= least ? T(0) : v)) * factor;
                }
            }
        }
    }
}

}  // namespace

#define QUANTIZER(NAME, X, T)                                                                                        \
    extern "C" void forward_##NAME(const Layout* l, const Grid* g, const X* x, T* y, T* raw, const T* floor,         \
                                   const T* offset, int project) {                                                   \
        forward<X, T>(*l, *g, x, y, raw, floor, offset, project);                                                    \
    }                                                                                                                \
    extern "C" void backward_##NAME(const Layout* l, const Grid* g, const X* x, const T* grad, X* grad_x,            \
                                    const T* raw, const T* floor, const T* offset, const T* features, T* grad_raw,   \
                                    T* grad_offset) {                                                                \
        (grad_x ? backward<X, T, true> : backward<X, T, false>)(*l, *g, x, grad, grad_x, raw, floor, offset,         \
                                                                features, grad_raw, grad_offset);                    \
    }
QUANTIZER(float, float, float)
QUANTIZER(double, double, double)
QUANTIZER(bf16, bf16, float)

extern "C" void squares_float(const Squares<float>* s, const float* a, const float* b, const float* keep, float* total) {
    squares(*s, a, b, keep, total);
}
extern "C" void squares_back_float(const Squares<float>* s, const float* a, const float* b, const float* keep,
                                   const float* up, float* out) {
    squares_back(*s, a, b, keep, up, out);
}
