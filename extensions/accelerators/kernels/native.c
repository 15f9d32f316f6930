/* y += sum over the rank rows s of a row's mixture of w_s (a_s . x) b_s, as `naive.py` has it.

   All a_s . x come first, then the sums, factor by factor: each is read once, in the order of memory, for all tokens that use
   it. Sums and weights are in fp32, whatever the factors are stored in, and in one order; y is rounded once. A row's numbers
   do not depend on the other rows. `native_rows.py` compiles this file and says what the fields hold. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__F16C__) || defined(__FMA__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

/* no product is fused with the sum it goes to but by `fused`: which ones gcc would fuse depends on the form of the factors */
#ifndef __clang__
#pragma GCC optimize("fp-contract=off")
#endif

typedef struct {
    int64_t num_rows, num_tokens, num_inputs, num_outputs, num_factors;
    const void *a, *b;      /* rank rows of num_inputs, and of num_outputs, one factor's after the other's */
    const int64_t *counts;  /* of each factor: its rank rows; then of each, and one more, where its uses begin: */
    const float *weights;   /* each one's weight; and its row, after those */
    float *work;            /* of each token: num_outputs, and one for each rank row that it uses */
} Table;

typedef uint16_t bf16, f16;
typedef float f32;

/* sixteen numbers at once, of a processor whose registers hold fewer in several of them */
#define LANES 16
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef float eight __attribute__((vector_size(32)));
typedef float four __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

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

static inline lanes load_f32(const float *from) {
    lanes found;
    memcpy(&found, from, sizeof found);
    return found;
}

static inline void store_f32(float *to, lanes values) { memcpy(to, &values, sizeof values); }

static inline lanes load_bf16(const bf16 *from) {
    halves found;
    memcpy(&found, from, sizeof found);
    return (lanes)(__builtin_convertvector(found, words) << 16);
}

static inline void store_bf16(bf16 *to, lanes values) {
    halves found = __builtin_convertvector((words)values >> 16, halves);
    memcpy(to, &found, sizeof found);
}

#ifdef __F16C__
static inline float widen_f16(f16 value) { return _cvtsh_ss(value); }

static inline lanes load_f16(const f16 *from) {
#ifdef __AVX512F__
    return (lanes)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#else
    __m256 found[2] = {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)),
                       _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from + 1))};
    return load_f32((const float *)found);
#endif
}

static inline void store_f16(f16 *to, lanes values) {
#ifdef __AVX512F__
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT));
#else
    float wide[LANES];
    store_f32(wide, values);
    for (int64_t i = 0; i < LANES; i += 8)
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(wide + i), _MM_FROUND_TO_NEAREST_INT));
#endif
}
#endif

/* the halves added to each other, until one number is left */
static inline float sum_of(lanes values) {
    eight eights[2];
    four fours[2];
    memcpy(eights, &values, sizeof eights);
    eights[0] += eights[1];
    memcpy(fours, eights, sizeof fours);
    fours[0] += fours[1];
    return (fours[0][0] + fours[0][2]) + (fours[0][1] + fours[0][3]);
}

/* a b + c, rounded once where the processor can */
static inline lanes fused(lanes a, lanes b, lanes c) {
#if defined(__AVX512F__)
    return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    __m256 x[2], y[2], z[2];
    memcpy(x, &a, sizeof x), memcpy(y, &b, sizeof y), memcpy(z, &c, sizeof z);
    for (int k = 0; k < 2; k++) z[k] = _mm256_fmadd_ps(x[k], y[k], z[k]);
    memcpy(&c, z, sizeof c);
    return c;
#else
    return a * b + c;
#endif
}

/* how many rank rows are read at once, whose sums fill the registers */
#ifdef __AVX512F__
enum { MANY = 8 };
#else
enum { MANY = 4 };
#endif

static inline int64_t at_once(int64_t left) { return left < 4 ? 1 : left < MANY ? 4 : MANY; }

/* a call of `function`, the last argument of which is n, as one of a number that the compiler knows */
#define BY_NUMBER(n, function, ...) \
    if (n == MANY) function(__VA_ARGS__, MANY); \
    else if (n == 4) function(__VA_ARGS__, 4); \
    else function(__VA_ARGS__, 1);

/* a loop that the compiler writes out, so that an array that it goes through stays in registers */
#define WRITTEN_OUT _Pragma("GCC unroll 8")

/* what is read next comes from memory, some rank rows of it, while the processor is busy with these */
static inline void fetch(const void *start, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)start + at, 0, 3);
}

#define ALWAYS_INLINE inline __attribute__((always_inline))

/* F is what factors are stored in, T what x and y are */
#define DOT(F, T) \
    static inline void dots_##F##_##T(const F *restrict a, const T *restrict x, int64_t n, float *restrict h, int num) { \
        lanes sums[MANY] = {{0}}; \
        int64_t i = 0; \
        for (; i + LANES <= n; i += LANES) { \
            const lanes xi = load_##T(x + i); \
            WRITTEN_OUT for (int k = 0; k < num; k++) sums[k] = fused(load_##F(a + k * n + i), xi, sums[k]); \
        } \
        WRITTEN_OUT for (int k = 0; k < num; k++) h[k] = sum_of(sums[k]); \
        for (int k = 0; k < num; k++) { \
            float rest = 0; \
            for (int64_t j = i; j < n; j++) rest += widen_##F(a[k * n + j]) * widen_##T(x[j]); \
            h[k] += rest; \
        } \
    }

/* A w has the weights in the place of the table's: a number for each row and factor, and a use of one that is 0 adds nothing,
   whatever its value. x has num_inputs numbers a token, whose hidden values are x a^T; without an a, these are the hidden
   values themselves. Each of the three ways is compiled by itself, without a look at what it has within its loops */
#define ADD(F, T) \
    static inline void add_rows_##F##_##T(float *restrict sums, const F *restrict b, int64_t n, const float *h, int num) { \
        lanes own[MANY]; \
        int64_t o = 0; \
        /* as a sum with 0, a negative 0 would lose its sign */ \
        WRITTEN_OUT for (int k = 0; k < num; k++) own[k] = h[k] - (lanes){0}; \
        for (; o + LANES <= n; o += LANES) { \
            lanes sum = load_f32(sums + o); \
            WRITTEN_OUT for (int k = 0; k < num; k++) sum = fused(own[k], load_##F(b + k * n + o), sum); \
            store_f32(sums + o, sum); \
        } \
        for (; o < n; o++) \
            for (int k = 0; k < num; k++) sums[o] += h[k] * widen_##F(b[k * n + o]); \
    } \
    static ALWAYS_INLINE void sum_##F##_##T( \
        const Table *t, const F *a, const T *restrict x, const float *restrict w, T *restrict y) { \
        const int64_t num_tokens = t->num_tokens, in = t->num_inputs, out = t->num_outputs, num_factors = t->num_factors; \
        const int64_t num_sums = t->num_rows * num_tokens * out; \
        float *restrict sums = t->work, *restrict h = sums + num_sums; \
        const int64_t *counts = t->counts, *starts = counts + num_factors, *rows = starts + num_factors + 1; \
        const F *b = t->b; \
        for (int64_t f = 0, first = 0; f < num_factors; a += a ? counts[f] * in : 0, first += counts[f++]) \
            for (int64_t r = 0, n; r < counts[f]; r += n) { \
                n = at_once(counts[f] - r); \
                if (a) fetch(a + (r + n) * in, n * in * sizeof *a); \
                for (int64_t u = starts[f]; u < starts[f + 1]; u++) { \
                    const float weight = w ? w[rows[u] * num_factors + f] : t->weights[u]; \
                    if (w && weight == 0) continue; \
                    for (int64_t token = rows[u] * num_tokens, k = 0; k < num_tokens; token++, k++, h += n) { \
                        if (a) { \
                            BY_NUMBER(n, dots_##F##_##T, a + r * in, x + token * in, in, h) \
                        } else \
                            for (int64_t i = 0; i < n; i++) h[i] = widen_##T(x[token * in + first + r + i]); \
                        for (int64_t i = 0; i < n; i++) h[i] *= weight; \
                    } \
                } \
            } \
        /* what nothing is added to stays what it is, 0 with its sign */ \
        for (int64_t o = 0; o < num_sums; o++) sums[o] = -0.0f; \
        h = sums + num_sums; \
        for (int64_t f = 0; f < num_factors; b += counts[f++] * out) \
            for (int64_t r = 0, n; r < counts[f]; r += n) { \
                n = at_once(counts[f] - r); \
                fetch(b + (r + n) * out, n * out * sizeof *b); \
                for (int64_t u = starts[f]; u < starts[f + 1]; u++) { \
                    if (w && w[rows[u] * num_factors + f] == 0) continue; \
                    for (int64_t token = rows[u] * num_tokens, k = 0; k < num_tokens; token++, k++, h += n) { \
                        BY_NUMBER(n, add_rows_##F##_##T, sums + token * out, b + r * out, out, h) \
                    } \
                } \
            } \
        _Pragma("omp simd") \
        for (int64_t o = 0; o < num_sums; o++) y[o] = round_##T(widen_##T(y[o]) + sums[o]); \
    } \
    void add_##F##_##T(const Table *t, const T *restrict x, const float *restrict w, T *restrict y) { \
        if (!w) sum_##F##_##T(t, t->a, x, NULL, y); \
        else if (t->a) sum_##F##_##T(t, t->a, x, w, y); \
        else sum_##F##_##T(t, NULL, x, w, y); \
    }

/* whether n numbers, a multiple of LANES, are all the same in the shorter form, in which they are written as far as they are */
#define NARROW(F) \
    int narrow_##F(const float *restrict from, F *restrict to, int64_t n) { \
        for (int64_t i = 0; i < n; i += LANES) { \
            const lanes values = load_f32(from + i); \
            store_##F(to + i, values); \
            const words other = (words)(load_##F(to + i) != values); \
            uint32_t any = 0; \
            for (int k = 0; k < LANES; k++) any |= other[k]; \
            if (any) return 0; \
        } \
        return 1; \
    }

#define ALL(F, T) \
    DOT(F, T) \
    ADD(F, T)

ALL(f32, f32)
ALL(bf16, f32)
NARROW(bf16)
#ifdef __F16C__
ALL(f16, f32)
NARROW(f16)
#endif

#ifdef __AVX512BF16__
static inline void dots_bf16_bf16(const bf16 *restrict a, const bf16 *restrict x, int64_t n, float *restrict h, int num) {
    __m512 s[MANY];
    WRITTEN_OUT for (int k = 0; k < num; k++) s[k] = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 32) {
        const __mmask32 there = n - i < 32 ? (1u << (n - i)) - 1 : 0xffffffff;
        const __m512bh xi = (__m512bh)_mm512_maskz_loadu_epi16(there, x + i);
        WRITTEN_OUT for (int k = 0; k < num; k++)
            s[k] = _mm512_dpbf16_ps(s[k], (__m512bh)_mm512_maskz_loadu_epi16(there, a + k * n + i), xi);
    }
    WRITTEN_OUT for (int k = 0; k < num; k++) h[k] = _mm512_reduce_add_ps(s[k]);
}
#else
DOT(bf16, bf16)
#endif
ADD(bf16, bf16)
