/* The entries of the products b a of several experts, pruned and merged tile by tile: no dense update is ever stored.

   `_entries.py` compiles this file, says what the fields hold and has the same in PyTorch, as has `_pruning.py`. */

#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "draws are read as little-endian words"
#endif

/* numbers of a register, and how many registers of a line are summed at a time, so that all sums stay in registers */
#if defined __AVX512F__
enum { LANES = 16, AT_ONCE = 4 };
#elif defined __AVX__
enum { LANES = 8, AT_ONCE = 2 };
#else
enum { LANES = 4, AT_ONCE = 2 };
#endif
enum { HIGH = 4, WIDE = 64, TILE = HIGH * WIDE };

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float half __attribute__((vector_size(2 * LANES), aligned(4), may_alias));
typedef double doubles __attribute__((vector_size(4 * LANES)));
typedef int32_t flags __attribute__((vector_size(4 * LANES)));
typedef uint16_t shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint64_t words __attribute__((vector_size(2 * LANES)));

static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* where the LANES entries from n on of a line are before `end` */
static inline flags before(int64_t n, int32_t end) {
    flags place;
    memcpy(&place, numbers, sizeof place);
    return place + (int32_t)n < end;
}

static inline lanes magnitude(lanes values) { return (lanes)((flags)values & 0x7fffffff); }

/* a where the flag is set, else b */
static inline lanes pick(flags set, lanes a, lanes b) { return (lanes)(((flags)a & set) | ((flags)b & ~set)); }

static inline int any(flags set) {
    uint64_t words[LANES / 2], found = 0;
    memcpy(words, &set, sizeof words);
    for (int k = 0; k < LANES / 2; k++) found |= words[k];
    return found != 0;
}

typedef struct {
    const float *b, *a;   /* num_outputs x rank, rank x num_inputs */
    int64_t rank;
    float weight;
    float value;          /* kept are magnitudes above it, and those equal to it up to the flat index `last`, .. */
    int64_t last;
    uint64_t seed;        /* .. of which the 16 bits drawn are below level; a negative level draws nothing */
    int64_t level;
} Expert;

typedef struct {
    int64_t num_experts, num_outputs, num_inputs;
    int64_t elects, weighted, counts, divides;  /* `merge_elected`'s; divides: by 0 nothing, 1 a count, 2 weights */
    float scale, tie;
    int64_t cancelled;    /* found: whether an election of votes that are not all zero came to nothing, .. */
    int64_t balance;      /* .. and how many more entries elected the positive sign than the negative */
} Merge;

/* what is left of a tile, where it is the same for whole lines */
typedef struct {
    float least[HIGH];    /* magnitudes below it are zeros */
    uint64_t state[HIGH]; /* of the draws, at the first entry of each row */
    int32_t level;
    float weight;
} Left;

/* SplitMix64 (Steele, Lea and Flood 2014): the word that a state gives, and what a step adds to it */
#define STEP 0x9e3779b97f4a7c15u
#define MIX(z)                                       \
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;       \
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;       \
    z ^= z >> 31;

/* the draws of LANES entries, the first of which is the n-th, a multiple of 4, after that of the state */
static inline flags draws(uint64_t state, int64_t n) {
    static const uint64_t steps[4] = {STEP, STEP * 2, STEP * 3, STEP * 4};
    words z;
    memcpy(&z, steps, sizeof z);
    z += state + n / 4 * STEP;
    MIX(z)
    return __builtin_convertvector((shorts)z, flags);
}

/* HIGH rows of b by WIDE columns of a, which lie side by side: each entry's sum runs over the ranks in order. With `left`,
   what is left of them times the weight. Its loops are written out, or gcc puts the sums on the stack. The functions made of
   it are never inlined: a sum that had this product within it would leave a rounding error of x - x. */
static inline __attribute__((always_inline)) void products(const float *const *b, const float *a, int64_t rank,
                                                           const Left *left, int drawn, float *tile) {
    for (int n = 0; n < WIDE; n += AT_ONCE * LANES) {
        lanes sums[HIGH * AT_ONCE] = {0};
        const float *line = a + n;
        for (int64_t r = 0; r < rank; r++, line += WIDE)
#pragma GCC unroll 4
            for (int o = 0; o < HIGH; o++)
#pragma GCC unroll 4
                for (int k = 0; k < AT_ONCE; k++) sums[o * AT_ONCE + k] += b[o][r] * *(const lanes *)(line + k * LANES);
#pragma GCC unroll 4
        for (int o = 0; o < HIGH; o++)
#pragma GCC unroll 4
            for (int k = 0; k < AT_ONCE; k++) {
                lanes own = sums[o * AT_ONCE + k];
                if (left) {
                    flags kept = magnitude(own) >= left->least[o];
                    if (drawn) kept &= draws(left->state[o], n + k * LANES) < left->level;
                    own = pick(kept, left->weight * own, (lanes){0});
                }
                *(lanes *)(tile + o * WIDE + n + k * LANES) = own;
            }
    }
}

static __attribute__((noinline)) void multiply(const float *const *b, const float *a, int64_t rank, float *tile) {
    products(b, a, rank, NULL, 0, tile);
}

static __attribute__((noinline)) void multiply_cut(const float *const *b, const float *a, int64_t rank, const Left *left,
                                                   float *tile) {
    products(b, a, rank, left, 0, tile);
}

static __attribute__((noinline)) void multiply_drawn(const float *const *b, const float *a, int64_t rank, const Left *left,
                                                     float *tile) {
    products(b, a, rank, left, 1, tile);
}

/* the columns from `column` on side by side, zeros beyond the last one */
static int64_t pack(const Expert *e, int64_t num_inputs, int64_t column, float *packed) {
    const int64_t width = num_inputs - column < WIDE ? num_inputs - column : WIDE;
    for (int64_t r = 0; r < e->rank; r++, packed += WIDE) {
        memcpy(packed, e->a + r * num_inputs + column, width * sizeof *packed);
        memset(packed + width, 0, (WIDE - width) * sizeof *packed);
    }
    return width;
}

/* the rows of b from `row` on; beyond `end` the last one again */
static inline void rows_of(const Expert *e, int64_t row, int64_t end, const float **b) {
    for (int o = 0; o < HIGH; o++) b[o] = e->b + (row + o < end ? row + o : end - 1) * e->rank;
}

/* the tile of the rows from `row` on */
static void fill(const Expert *e, const float *packed, int64_t row, int64_t end, float *tile) {
    const float *b[HIGH];
    rows_of(e, row, end, b);
    multiply(b, packed, e->rank, tile);
}

/* rows start to end of one expert's entries; `packed` has room for rank * WIDE numbers */
void read_entries(const Expert *e, int64_t num_inputs, int64_t start, int64_t end, float *packed, float *out) {
    float tile[TILE];
    for (int64_t column = 0; column < num_inputs; column += WIDE) {
        const int64_t width = pack(e, num_inputs, column, packed);
        for (int64_t row = start; row < end; row += HIGH) {
            fill(e, packed, row, end, tile);
            for (int64_t o = 0; o < HIGH && row + o < end; o++)
                memcpy(out + (row + o - start) * num_inputs + column, tile + o * WIDE, width * sizeof *out);
        }
    }
}

/* appends the magnitudes of a line from low to high, as far as there is room; returns how many they are */
static inline int64_t collect(const float *line, int64_t width, float low, float high, float *between, int64_t room,
                              int64_t *above) {
    int64_t found = 0;
#ifdef __AVX512F__
    const __m512 least = _mm512_set1_ps(low), most = _mm512_set1_ps(high);
    for (int64_t n = 0; n < width; n += LANES) {
        const __mmask16 there = width - n < LANES ? (1u << (width - n)) - 1 : 0xffff;
        const __m512 size = _mm512_abs_ps(_mm512_maskz_loadu_ps(there, line + n));
        const __mmask16 larger = _mm512_mask_cmp_ps_mask(there, size, most, _CMP_GT_OQ);
        const __mmask16 inside = _mm512_mask_cmp_ps_mask(there, size, least, _CMP_GE_OQ) & ~larger;
        const __m512 packed = _mm512_maskz_compress_ps(inside, size);
        /* beyond what is found, a whole store writes zeros, over which the next one writes */
        if (found + LANES <= room) _mm512_storeu_ps(between + found, packed);
        else if (found < room) _mm512_mask_storeu_ps(between + found, (1u << (room - found)) - 1, packed);
        *above += __builtin_popcount(larger);
        found += __builtin_popcount(inside);
    }
#else
    flags larger = {0};
    for (int64_t n = 0; n < width; n += LANES) {
        const lanes size = magnitude(*(const lanes *)(line + n));
        const flags there = before(n, (int32_t)width), inside = there & (size >= low) & (size <= high);
        larger -= there & (size > high);
        if (any(inside))
            for (int k = 0; k < LANES; k++) {
                if (inside[k] && found < room) between[found] = size[k];
                found -= inside[k];
            }
    }
    for (int k = 0; k < LANES; k++) *above += larger[k];
#endif
    return found;
}

/* Writes one expert's magnitudes from low to high, as many as there is room for; returns how many there are, and adds to
   `above` how many are larger. */
int64_t narrow_entries(const Expert *e, int64_t num_inputs, int64_t num_outputs, float low, float high, float *packed,
                       float *between, int64_t room, int64_t *above) {
    float tile[TILE];
    int64_t found = 0;
    for (int64_t column = 0; column < num_inputs; column += WIDE) {
        const int64_t width = pack(e, num_inputs, column, packed);
        for (int64_t row = 0; row < num_outputs; row += HIGH) {
            fill(e, packed, row, num_outputs, tile);
            for (int64_t o = 0; o < HIGH && row + o < num_outputs; o++)
                found += collect(tile + o * WIDE, width, low, high, between + found, room - found, above);
        }
    }
    return found;
}

/* What an expert's rule leaves of a line of WIDE entries, of which the first has that flat index, times the weight. Never
   inlined, for the reason of `products`. */
static __attribute__((noinline)) void prune(const Expert *e, int64_t first, float weight, float *line) {
    enum { WORDS = WIDE / 4 + 1 };
    const int64_t upto = e->last + 1 - first;
    const int32_t end = upto < 0 ? 0 : upto > WIDE ? WIDE : (int32_t)upto, level = (int32_t)e->level;
    const lanes zero = {0};
    uint16_t drawn[4 * WORDS];
    if (level >= 0)
        for (int w = 0; w < WORDS; w++) {
            uint64_t z = e->seed + ((uint64_t)first / 4 + w + 1) * STEP;
            MIX(z)
            memcpy(drawn + 4 * w, &z, sizeof z);
        }
    for (int n = 0; n < WIDE; n += LANES) {
        const lanes own = *(const lanes *)(line + n), size = magnitude(own);
        flags kept = (size > e->value) | ((size == e->value) & before(n, end));
        if (level >= 0) kept &= __builtin_convertvector(*(const shorts *)(drawn + first % 4 + n), flags) < level;
        *(lanes *)(line + n) = pick(kept, weight * own, zero);
    }
}

/* the least number above one that is not negative; no number, which nothing reaches, above infinity */
static inline float next_above(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits += 1;
    memcpy(&value, &bits, sizeof bits);
    return value;
}

/* `fill`, and what the expert's rule leaves of it, times the weight */
static void fill_pruned(const Expert *e, const float *packed, int64_t row, int64_t end, int64_t num_inputs, int64_t column,
                        float weight, float *tile) {
    const float *b[HIGH];
    Left left = {.level = (int32_t)e->level, .weight = weight};
    const int drawn = e->level >= 0;
    int whole = !drawn || num_inputs % 4 == 0;
    rows_of(e, row, end, b);
    for (int o = 0; o < HIGH; o++) {
        const int64_t first = (row + o) * num_inputs + column, upto = e->last + 1 - first;
        left.least[o] = upto >= WIDE || e->value < 0 ? e->value : next_above(e->value);
        left.state[o] = e->seed + (uint64_t)first / 4 * STEP;
        whole &= upto >= WIDE || upto <= 0;
    }
    if (whole) (drawn ? multiply_drawn : multiply_cut)(b, packed, e->rank, &left, tile);
    else {
        multiply(b, packed, e->rank, tile);
        for (int o = 0; o < HIGH; o++) prune(e, (row + o) * num_inputs + column, weight, tile + o * WIDE);
    }
}

/* a line of every expert, one every TILE numbers, added in their order */
static inline void sum(int64_t num_experts, const float *entries, float *out) {
    lanes sums[WIDE / LANES] = {0};
    for (int64_t e = 0; e < num_experts; e++)
        for (int k = 0; k < WIDE / LANES; k++) sums[k] += *(const lanes *)(entries + e * TILE + k * LANES);
    memcpy(out, sums, sizeof sums);
}

/* the sign of the sum over experts of the entries, in float64: a sum of fp32 numbers is zero or at least 2^-149, as in fp32 */
static __attribute__((noinline)) lanes exact_votes(int64_t num_experts, const float *entries) {
    doubles exact[2] = {{0}, {0}};
    lanes votes;
    for (int64_t e = 0; e < num_experts; e++)
        for (int k = 0; k < 2; k++)
            exact[k] += __builtin_convertvector(((const half *)(entries + e * TILE))[k], doubles);
    for (int k = 0; k < 2; k++) ((half *)&votes)[k] = __builtin_convertvector(exact[k], half);
    return votes;
}

/* LANES entries of every expert, one every TILE numbers: the sum of what agrees with the elected sign */
static inline void elect(const Merge *m, const Expert *experts, const float *entries, flags *tally, float *out) {
    const lanes zero = {0}, one = zero + 1;
    lanes votes = zero, sizes = zero, sums = zero, divisors = zero;
    for (int64_t e = 0; e < m->num_experts; e++) {
        const lanes own = *(const lanes *)(entries + e * TILE);
        if (m->counts) votes += pick(own > 0, one, zero) - pick(own < 0, one, zero);
        else votes += own;
        sizes += magnitude(own);
    }
    /* what fp32 rounds of a sum of n numbers is below n 2^-23 times that of their sizes */
    const flags unsure = (magnitude(votes) < sizes * ((float)m->num_experts * 0x1p-23f)) | (sizes > 0x1p120f);
    if (!m->counts && any(unsure)) votes = exact_votes(m->num_experts, entries);
    tally[0] += (votes < 0) - (votes > 0);
    tally[1] |= (votes == 0) & (sizes != 0);
    votes = pick(votes == 0, zero + m->tie, votes);
    for (int64_t e = 0; e < m->num_experts; e++) {
        const lanes own = *(const lanes *)(entries + e * TILE);
        const flags agrees = (((flags)own ^ (flags)votes) >= 0) & (own != 0);
        sums += (m->weighted ? 1 : experts[e].weight) * pick(agrees, own, zero);
        divisors += pick(agrees, zero + (m->divides == 2 ? experts[e].weight : 1), zero);
    }
    if (m->divides) sums /= pick(divisors == 0, one, divisors);
    *(lanes *)out = sums * m->scale;
}

/* Rows start to end of the merge of all experts; `work` has room for WIDE numbers of every rank and a TILE of every expert. */
void merge_entries(Merge *m, const Expert *experts, int64_t start, int64_t end, float *work, float *out) {
    float *tiles = work, line[WIDE];
    flags tally[2] = {{0}};
    for (int64_t column = 0; column < m->num_inputs; column += WIDE) {
        float *packed = work + m->num_experts * TILE;
        int64_t width = 0;
        for (int64_t e = 0; e < m->num_experts; packed += experts[e++].rank * WIDE)
            width = pack(experts + e, m->num_inputs, column, packed);
        for (int64_t row = start; row < end; row += HIGH) {
            packed = work + m->num_experts * TILE;
            for (int64_t e = 0; e < m->num_experts; packed += experts[e++].rank * WIDE) {
                const float weight = m->elects && !m->weighted ? 1 : experts[e].weight;
                fill_pruned(experts + e, packed, row, end, m->num_inputs, column, weight, tiles + e * TILE);
            }
            for (int64_t o = 0; o < HIGH && row + o < end; o++) {
                if (m->elects)
                    for (int k = 0; k < WIDE; k += LANES) elect(m, experts, tiles + o * WIDE + k, tally, line + k);
                else sum(m->num_experts, tiles + o * WIDE, line);
                memcpy(out + (row + o) * m->num_inputs + column, line, width * sizeof *out);
            }
        }
    }
    for (int n = 0; n < LANES; n++) m->balance += tally[0][n], m->cancelled |= tally[1][n];
}
