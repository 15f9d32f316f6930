/* y += sum over the rank rows s of a row's mixture of w_s (a_s . x) b_s, as `naive.py` has it.

   All a_s . x come first, then the sums, factor by factor: each is read once, in the order of memory, for all tokens that use
   it. Sums and weights are in fp32, whatever the factors are stored in; y is rounded once. A row's numbers do not depend on
   the other rows. `native_rows.py` compiles this file and says what the fields hold. */

#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

typedef struct {
    int64_t num_rows, num_tokens, num_inputs, num_outputs, num_factors;
    const void *a, *b;      /* rank rows of num_inputs, and of num_outputs, one factor's after the other's */
    const int64_t *counts;  /* of each factor: its rank rows; then of each, and one more, where its uses begin: */
    const float *weights;   /* each one's weight; and its row, after those */
    float *work;            /* of each token: num_outputs, and one for each rank row that it uses */
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
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)start + at, 0, 3);
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
    void add_##T(const Table *t, const T *restrict x, T *restrict y) { \
        const int64_t num_tokens = t->num_tokens, in = t->num_inputs, out = t->num_outputs; \
        const int64_t num_sums = t->num_rows * num_tokens * out; \
        float *restrict sums = t->work, *restrict h = sums + num_sums; \
        const T *a = t->a, *b = t->b; \
        const int64_t *counts = t->counts, *starts = counts + t->num_factors, *rows = starts + t->num_factors + 1; \
        for (int64_t f = 0; f < t->num_factors; a += counts[f++] * in) \
            for (int64_t r = 0, n; r < counts[f]; r += n) { \
                n = counts[f] - r < 4 ? 1 : 4; \
                fetch(a + (r + n) * in, n * in * sizeof *a); \
                for (int64_t u = starts[f]; u < starts[f + 1]; u++) \
                    for (int64_t token = rows[u] * num_tokens, k = 0; k < num_tokens; token++, k++, h += n) { \
                        if (n == 4) dots_##T(a + r * in, x + token * in, in, h); \
                        else *h = dot_##T(a + r * in, x + token * in, in); \
                        for (int64_t i = 0; i < n; i++) h[i] *= t->weights[u]; \
                    } \
            } \
        /* what nothing is added to stays what it is, 0 with its sign */ \
        for (int64_t o = 0; o < num_sums; o++) sums[o] = -0.0f; \
        h = sums + num_sums; \
        for (int64_t f = 0; f < t->num_factors; b += counts[f++] * out) \
            for (int64_t r = 0, n; r < counts[f]; r += n) { \
                n = counts[f] - r < 4 ? 1 : 4; \
                fetch(b + (r + n) * out, n * out * sizeof *b); \
                for (int64_t u = starts[f]; u < starts[f + 1]; u++) \
                    for (int64_t token = rows[u] * num_tokens, k = 0; k < num_tokens; token++, k++, h += n) { \
                        if (n == 4) add_four_##T(sums + token * out, b + r * out, out, h); \
                        else add_one_##T(sums + token * out, b + r * out, out, *h); \
                    } \
            } \
        _Pragma("omp simd") \
        for (int64_t o = 0; o < num_sums; o++) y[o] = round_##T(widen_##T(y[o]) + sums[o]); \
    }

/* y += (hidden * w) b, of the hidden values of num_rows tokens, a row every num_inputs: w has a number for each token and
   factor, and what counts 0 adds nothing, whatever its value */
#define MIX(T) \
    void mix_##T(const Table *t, const T *restrict hidden, const float *restrict w, T *restrict y) { \
        const int64_t num_tokens = t->num_rows, out = t->num_outputs, num_sums = num_tokens * out; \
        float *restrict sums = t->work; \
        const T *b = t->b; \
        for (int64_t o = 0; o < num_sums; o++) sums[o] = -0.0f; \
        for (int64_t f = 0; f < t->num_factors; b += t->counts[f] * out, hidden += t->counts[f++]) \
            for (int64_t r = 0, n; r < t->counts[f]; r += n) { \
                n = t->counts[f] - r < 4 ? 1 : 4; \
                fetch(b + (r + n) * out, n * out * sizeof *b); \
                for (int64_t token = 0; token < num_tokens; token++) { \
                    const float weight = w[token * t->num_factors + f]; \
                    float h[4]; \
                    if (weight == 0) continue; \
                    for (int64_t i = 0; i < n; i++) h[i] = weight * widen_##T(hidden[token * t->num_inputs + r + i]); \
                    if (n == 4) add_four_##T(sums + token * out, b + r * out, out, h); \
                    else add_one_##T(sums + token * out, b + r * out, out, *h); \
                } \
            } \
        _Pragma("omp simd") \
        for (int64_t o = 0; o < num_sums; o++) y[o] = round_##T(widen_##T(y[o]) + sums[o]); \
    }

#define f32 float
DOT(f32)
ADD(f32)
MIX(f32)

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
MIX(bf16)
