/* Softmax of n floats in two passes with (mantissa, exponent) pairs, and in three passes with the same exponential.

   e^x = m 2^n with n = rint(x / ln 2) and m between sqrt(1/2) and sqrt(2). Pairs are summed without overflow, so no pass
   for the maximum is needed. Built with -DCOUNT the functions also count the floats that they load and store. */

#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512") /* GCC would use half of the width; the pairs are bound by arithmetic then */
#endif

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 64                /* independent sums, so that a compiler may vectorize without reordering any of them */
#define FLOOR (-1048576.0f)     /* -inf and all below count as this: their share of any sum is zero */

#ifdef COUNT
static int64_t moved;
int64_t numbers_moved(void) { int64_t n = moved; moved = 0; return n; }
#define LOAD(place) (moved++, (place))
#define STORE(place, value) (moved++, (place) = (value))
#else
#define LOAD(place) (place)
#define STORE(place, value) ((place) = (value))
#endif

/* 2^n for whole n; 0 below the least normal float */
static inline float power(float n) {
    float at_least = n > -127.0f ? n : -127.0f;
    int32_t bits = ((int32_t)at_least + 127) << 23;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

/* m of e^x = m 2^n, with n given out; NaN stays NaN */
static inline float mantissa(float x, float *n) {
    x = x < FLOOR ? FLOOR : x;
    float whole = rintf(x * 1.44269504f);
    float t = fmaf(whole, -0.693359375f, x);
    t = fmaf(whole, 2.12194440e-4f, t);
    float p = fmaf(t, 1.0f / 720, 1.0f / 120);  /* Taylor: |t| <= ln(2) / 2, the next term is below 1.3e-7 */
    p = fmaf(p, t, 1.0f / 24);
    p = fmaf(p, t, 1.0f / 6);
    p = fmaf(p, t, 0.5f);
    p = fmaf(p, t, 1.0f);
    *n = whole;
    return fmaf(p, t, 1.0f);
}

static inline float exponential(float x) {  /* of x <= 0 */
    float n, m = mantissa(x, &n);
    return m * power(n);
}

/* one pair for the sum of pairs: returns its mantissa, puts its exponent into n */
static float joined(const float *m, const float *e, float *n) {
    float top = e[0], sum = 0.0f;
    for (int j = 1; j < LANES; j++) top = e[j] > top ? e[j] : top;
    for (int j = 0; j < LANES; j++) sum += m[j] * power(e[j] - top);
    *n = top;
    return sum;
}

/* y = softmax(x); the exponent of the sum is the result, for the caller to refuse what is out of range */
float softmax_two_pass(const float *restrict x, float *restrict y, int64_t n) {
    float m[LANES], e[LANES], top;
    for (int j = 0; j < LANES; j++) m[j] = 0.0f, e[j] = 2.0f * FLOOR;
    for (int64_t i = 0; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) {
            float mine, whole;
            mine = mantissa(LOAD(x[i + j]), &whole);
            float higher = whole > e[j] ? whole : e[j];
            m[j] = fmaf(m[j], power(e[j] - higher), mine * power(whole - higher));
            e[j] = higher;
        }
    for (int64_t i = n - n % LANES; i < n; i++) {
        float whole, mine = mantissa(LOAD(x[i]), &whole), higher = whole > e[0] ? whole : e[0];
        m[0] = m[0] * power(e[0] - higher) + mine * power(whole - higher);
        e[0] = higher;
    }
    float scale = 1.0f / joined(m, e, &top);
    for (int64_t i = 0; i < n; i++) {
        float whole, mine = mantissa(LOAD(x[i]), &whole);
        STORE(y[i], mine * scale * power(whole - top));
    }
    return top;
}

static float maximum(const float *x, int64_t n) {
    float top[LANES], all;
    for (int j = 0; j < LANES; j++) top[j] = -INFINITY;
    for (int64_t i = 0; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) {
            float mine = LOAD(x[i + j]);
            top[j] = mine > top[j] ? mine : top[j];
        }
    all = top[0];
    for (int j = 1; j < LANES; j++) all = top[j] > all ? top[j] : all;
    for (int64_t i = n - n % LANES; i < n; i++) {
        float mine = LOAD(x[i]);
        all = mine > all ? mine : all;
    }
    return all;
}

static float total(const float *lanes) {
    float sum = 0.0f;
    for (int j = 0; j < LANES; j++) sum += lanes[j];
    return sum;
}

/* three passes: the exponentials are computed twice */
float softmax_three_pass_recompute(const float *restrict x, float *restrict y, int64_t n) {
    float top = maximum(x, n), sums[LANES] = {0};
    for (int64_t i = 0; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) sums[j] += exponential(LOAD(x[i + j]) - top);
    for (int64_t i = n - n % LANES; i < n; i++) sums[0] += exponential(LOAD(x[i]) - top);
    float scale = 1.0f / total(sums);
    for (int64_t i = 0; i < n; i++) STORE(y[i], exponential(LOAD(x[i]) - top) * scale);
    return 0.0f;
}

/* three passes: the exponentials are kept in y and scaled in the last */
float softmax_three_pass_reload(const float *restrict x, float *restrict y, int64_t n) {
    float top = maximum(x, n), sums[LANES] = {0};
    for (int64_t i = 0; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) {
            float mine = exponential(LOAD(x[i + j]) - top);
            STORE(y[i + j], mine);
            sums[j] += mine;
        }
    for (int64_t i = n - n % LANES; i < n; i++) {
        float mine = exponential(LOAD(x[i]) - top);
        STORE(y[i], mine);
        sums[0] += mine;
    }
    float scale = 1.0f / total(sums);
    for (int64_t i = 0; i < n; i++) STORE(y[i], LOAD(y[i]) * scale);
    return 0.0f;
}
