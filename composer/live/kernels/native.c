/* y += sum over the rank rows s of a row's mixture of w_s (a_s . x) b_s, row by row, as `naive.py` has it.

   Sums and weights are in fp32, whatever the factors are stored in; y is rounded once. A row's numbers do not depend on the
   other rows. `native_rows.py` compiles this file and says what the fields hold. */

#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

typedef struct {
    int64_t num_rows, num_inputs, num_outputs;
    const void *a, *b;      /* rank rows of num_inputs, and of num_outputs */
    const int64_t *starts;  /* of each row, and one more: where its entries begin */
    const int64_t *firsts;  /* of each entry: its first rank row, */
    const int64_t *counts;  /* how many it has, */
    const float *weights;   /* and their weight */
    float *sums;            /* num_outputs numbers to work with */
} Table;

typedef uint16_t bf16;

static inline float widen_bf16(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float found;
    memcpy(&found, &bits, sizeof found);
    return found;
}

static inline bf16 round_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bf16)rounded;
}

static inline float widen_f32(float value) { return value; }
static inline float round_f32(float value) { return value; }

/* what is read next comes from memory, four rank rows of it, while the processor is busy with these */
static inline void fetch(const void *start, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)start + at, 0, 2);
}

#define DOT(T) \
    static inline float dot_##T(const T *restrict a, const T *restrict x, int64_t n) { \
        float sum = 0; \
        _Pragma("omp simd reduction(+ : sum)") \
        for (int64_t i = 0; i < n; i++) sum += widen_##T(a[i]) * widen_##T(x[i]); \
        return sum; \
    } \
    static inline void dots_##T(const T *restrict a, const T *restrict x, int64_t n, float *restrict h) { \
        const T *restrict a1 = a + n, *restrict a2 = a1 + n, *restrict a3 = a2 + n; \
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0; \
        _Pragma("omp simd reduction(+ : s0, s1, s2, s3)") \
        for (int64_t i = 0; i < n; i++) { \
            float xi = widen_##T(x[i]); \
            s0 += widen_##T(a[i]) * xi; \
            s1 += widen_##T(a1[i]) * xi; \
            s2 += widen_##T(a2[i]) * xi; \
            s3 += widen_##T(a3[i]) * xi; \
        } \
        h[0] = s0, h[1] = s1, h[2] = s2, h[3] = s3; \
    }

#define ADD(T) \
    static inline void add_one_##T(float *restrict sums, const T *restrict b, int64_t n, float h) { \
        _Pragma("omp simd") \
        for (int64_t o = 0; o < n; o++) sums[o] += h * widen_##T(b[o]); \
    } \
    static inline void add_four_##T(float *restrict sums, const T *restrict b, int64_t n, const float *restrict h) { \
        const T *restrict b1 = b + n, *restrict b2 = b1 + n, *restrict b3 = b2 + n; \
        const float h0 = h[0], h1 = h[1], h2 = h[2], h3 = h[3]; \
        _Pragma("omp simd") \
        for (int64_t o = 0; o < n; o++) \
            sums[o] += h0 * widen_##T(b[o]) + h1 * widen_##T(b1[o]) + h2 * widen_##T(b2[o]) + h3 * widen_##T(b3[o]); \
    } \
    void add_##T(const Table *t, int64_t num_tokens, const T *restrict x, T *restrict y) { \
        const int64_t in = t->num_inputs, out = t->num_outputs; \
        float *restrict sums = t->sums; \
        for (int64_t row = 0; row < t->num_rows; row++) \
            for (int64_t token = 0; token < num_tokens; token++, x += in, y += out) { \
                if (t->starts[row] == t->starts[row + 1]) continue; \
                memset(sums, 0, out * sizeof *sums); \
                for (int64_t e = t->starts[row]; e < t->starts[row + 1]; e++) { \
                    const T *a = (const T *)t->a + t->firsts[e] * in, *b = (const T *)t->b + t->firsts[e] * out; \
                    const float w = t->weights[e]; \
                    int64_t r = 0; \
                    float h[4]; \
                    for (; r + 4 <= t->counts[e]; r += 4) { \
                        fetch(b + r * out, 4 * out * sizeof *b); \
                        dots_##T(a + r * in, x, in, h); \
                        fetch(a + (r + 4) * in, 4 * in * sizeof *a); \
                        for (int k = 0; k < 4; k++) h[k] *= w; \
                        add_four_##T(sums, b + r * out, out, h); \
                    } \
                    for (; r < t->counts[e]; r++) add_one_##T(sums, b + r * out, out, w * dot_##T(a + r * in, x, in)); \
                } \
                _Pragma("omp simd") \
                for (int64_t o = 0; o < out; o++) y[o] = round_##T(widen_##T(y[o]) + sums[o]); \
            } \
    }

#define f32 float
DOT(f32)
ADD(f32)

#ifdef __AVX512BF16__
static inline float dot_bf16(const bf16 *restrict a, const bf16 *restrict x, int64_t n) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += widen_bf16(a[i]) * widen_bf16(x[i]);
    return sum;
}

static inline void dots_bf16(const bf16 *restrict a, const bf16 *restrict x, int64_t n, float *restrict h) {
    __m512 s[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < n; i += 32) {
        const __mmask32 there = n - i < 32 ? (1u << (n - i)) - 1 : 0xffffffff;
        const __m512bh xi = (__m512bh)_mm512_maskz_loadu_epi16(there, x + i);
        for (int k = 0; k < 4; k++) s[k] = _mm512_dpbf16_ps(s[k], (__m512bh)_mm512_maskz_loadu_epi16(there, a + k * n + i), xi);
    }
    for (int k = 0; k < 4; k++) h[k] = _mm512_reduce_add_ps(s[k]);
}
#else
DOT(bf16)
#endif
ADD(bf16)
