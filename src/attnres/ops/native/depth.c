/* Depth attention on a CPU. The compiler is told the element type: TYPE names it, ELEMENT is how a row holds it, REAL is
   what is computed with: float, or double for float64.

   A token is taken at a time, so that its rows, which are read several times, stay in the first caches. With
   u = query * key_norm, r_i = 1 / sqrt(mean(v_i^2) + eps), z_i = <u, v_i> r_i and p = softmax(z), a read is
   h = scale sum_i p_i v_i. An earlier read that it goes on from, the prior, is one more row, whose logit is given.
   With heads a token is as many rows, each with a query of its own; keys may be the last channels of a row alone.

   Rows are converted in registers; half precision with integers, which every compiler turns into vector instructions. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define GLUE_(name, type) name##_##type
#define GLUE(name, type) GLUE_(name, type)

/* One call, as `calls.py` packs it: eight bytes a field. What a call does not have is NULL. */
struct call {
    int64_t tokens, width, keys, heads, sources, queries, threads, norm; /* rows; of a row, and of these the keys' */
    double eps, scale, norm_eps;
    const void *query, *key_norm, *weight, *prior_lse, *addend;
    void *total, *lse, *stats;
    const void *dlse;
    void *dquery, *dkey_norm, *dweight, *dprior_lse;
    void *rows[]; /* forward: sources, prior, results; backward: these two, gradients of results, later, results */
};

INLINE float as_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint32_t as_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE float from_float32(float x) { return x; }
INLINE float to_float32(float x) { return x; }
INLINE double from_float64(double x) { return x; }
INLINE double to_float64(double x) { return x; }

INLINE float from_bfloat16(uint16_t x) { return as_float((uint32_t)x << 16); }

INLINE uint16_t to_bfloat16(float x)
{
    uint32_t bits = as_bits(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return x != x ? (uint16_t)(bits >> 16 | 0x40) : (uint16_t)rounded; /* a NaN whose last bits fall away stays one */
}

INLINE float from_float16(uint16_t x)
{
    /* exponent and mantissa take their places in a float, whose product with 2^112 mends the bias, subnormals too */
    uint32_t magnitude = (uint32_t)(x & 0x7fff) << 13, sign = (uint32_t)(x & 0x8000) << 16;
    uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f), endless = magnitude | 0x7f800000;
    return as_float(sign | (magnitude >= 0x0f800000 ? endless : finite));
}

INLINE uint16_t to_float16(float x)
{
    uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000; /* the sum rounds to steps of 2^-24 */
    uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
    half = magnitude >= 0x477ff000 ? 0x7c00 : half;
    half = magnitude > 0x7f800000 ? 0x7e00 : half;
    return (uint16_t)(sign | half);
}

/* exp of x <= 0: 2^k times a polynomial, k the nearest whole number to x / ln 2. Exact at 0; a NaN stays one. */
INLINE float exp_float(float x)
{
    float y = x < -87.0f ? -87.0f : x;
    float shifted = y * 1.44269504f + 12582912.0f, k = shifted - 12582912.0f;
    float r = y - k * 0.693359375f + k * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    p *= as_float(((as_bits(shifted) & 0x1ff) + 127) << 23);
    return x < -87.0f ? 0.0f : p;
}

INLINE double exp_double(double x) { return exp(x); }
INLINE float log_float(float x) { return logf(x); }
INLINE double log_double(double x) { return log(x); }

#define LOAD(x) GLUE(from, TYPE)(x)
#define STORE(x) GLUE(to, TYPE)(x)
#define EXP(x) GLUE(exp, REAL)(x)
#define LOG(x) GLUE(log, REAL)(x)
#define ROW(pointer, token) ((ELEMENT *)(pointer) + (token) * width)
#define SUM _Pragma("omp simd reduction(+ : s0, s1, s2, s3)")
#define SUM_TWICE _Pragma("omp simd reduction(+ : s0, s1, s2, s3, q0, q1, q2, q3)")
#define EACH _Pragma("omp simd")

/* dots[i] = <v_i, x>, of v_i the channels from `from` on */
static void dot_products(const ELEMENT **rows, int64_t count, int64_t from, const REAL *x, int64_t width, REAL *dots)
{
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        const ELEMENT *a = rows[i] + from, *b = rows[i + 1] + from, *c = rows[i + 2] + from, *e = rows[i + 3] + from;
        REAL s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        SUM for (int64_t d = 0; d < width; d++) {
            s0 += LOAD(a[d]) * x[d], s1 += LOAD(b[d]) * x[d], s2 += LOAD(c[d]) * x[d], s3 += LOAD(e[d]) * x[d];
        }
        dots[i] = s0, dots[i + 1] = s1, dots[i + 2] = s2, dots[i + 3] = s3;
    }
    for (; i < count; i++) {
        const ELEMENT *a = rows[i] + from;
        REAL s0 = 0;
#pragma omp simd reduction(+ : s0)
        for (int64_t d = 0; d < width; d++)
            s0 += LOAD(a[d]) * x[d];
        dots[i] = s0;
    }
}

/* The same, and squares[i] = <v_i, v_i>. */
static void dots_and_squares(const ELEMENT **rows, int64_t count, int64_t from, const REAL *x, int64_t width, REAL *dots,
                             REAL *squares)
{
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        const ELEMENT *a = rows[i] + from, *b = rows[i + 1] + from, *c = rows[i + 2] + from, *e = rows[i + 3] + from;
        REAL s0 = 0, s1 = 0, s2 = 0, s3 = 0, q0 = 0, q1 = 0, q2 = 0, q3 = 0;
        SUM_TWICE for (int64_t d = 0; d < width; d++) {
            REAL v = LOAD(a[d]), w = LOAD(b[d]), y = LOAD(c[d]), z = LOAD(e[d]);
            s0 += v * x[d], s1 += w * x[d], s2 += y * x[d], s3 += z * x[d];
            q0 += v * v, q1 += w * w, q2 += y * y, q3 += z * z;
        }
        dots[i] = s0, dots[i + 1] = s1, dots[i + 2] = s2, dots[i + 3] = s3;
        squares[i] = q0, squares[i + 1] = q1, squares[i + 2] = q2, squares[i + 3] = q3;
    }
    for (; i < count; i++) {
        const ELEMENT *a = rows[i] + from;
        REAL s0 = 0, q0 = 0;
#pragma omp simd reduction(+ : s0, q0)
        for (int64_t d = 0; d < width; d++) {
            REAL v = LOAD(a[d]);
            s0 += v * x[d], q0 += v * v;
        }
        dots[i] = s0, squares[i] = q0;
    }
}

/* sum += sum_i weights[i] v_i, of v_i the channels from `from` on */
static void mix(const ELEMENT **rows, int64_t count, int64_t from, const REAL *weights, int64_t width, REAL *restrict sum)
{
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        const ELEMENT *a = rows[i] + from, *b = rows[i + 1] + from, *c = rows[i + 2] + from, *e = rows[i + 3] + from;
        REAL p = weights[i], q = weights[i + 1], r = weights[i + 2], s = weights[i + 3];
        EACH for (int64_t d = 0; d < width; d++)
            sum[d] += (p * LOAD(a[d]) + q * LOAD(b[d])) + (r * LOAD(c[d]) + s * LOAD(e[d]));
    }
    for (; i < count; i++) {
        const ELEMENT *a = rows[i] + from;
        REAL p = weights[i];
        EACH for (int64_t d = 0; d < width; d++)
            sum[d] += p * LOAD(a[d]);
    }
}

/* row = the RMSNorm of h; returns its reciprocal root. */
static REAL normalise(const REAL *h, const REAL *weight, REAL eps, int64_t width, ELEMENT *restrict row)
{
    REAL s0 = 0;
#pragma omp simd reduction(+ : s0)
    for (int64_t d = 0; d < width; d++)
        s0 += h[d] * h[d];
    REAL r = 1 / (REAL)sqrt(s0 / width + eps);
    if (weight) {
        EACH for (int64_t d = 0; d < width; d++)
            row[d] = STORE(h[d] * r * weight[d]);
    } else {
        EACH for (int64_t d = 0; d < width; d++)
            row[d] = STORE(h[d] * r);
    }
    return r;
}

/* dh from the gradient dx of its RMSNorm, whose weight's gradient it adds to dweight. */
static void normalise_backward(const ELEMENT *dx, const REAL *h, const REAL *weight, REAL r, int64_t width,
                                     REAL *restrict dh, REAL *restrict dweight)
{
    REAL s0 = 0;
    if (weight) {
#pragma omp simd reduction(+ : s0)
        for (int64_t d = 0; d < width; d++) {
            REAL g = LOAD(dx[d]);
            dweight[d] += g * h[d] * r;
            dh[d] = g * weight[d];
            s0 += dh[d] * h[d];
        }
    } else {
#pragma omp simd reduction(+ : s0)
        for (int64_t d = 0; d < width; d++) {
            dh[d] = LOAD(dx[d]);
            s0 += dh[d] * h[d];
        }
    }
    REAL k = s0 * r * r / width;
    EACH for (int64_t d = 0; d < width; d++)
        dh[d] = r * (dh[d] - k * h[d]);
}

/* Sums over tokens: `recent` over the last few, `sums` over all, so that long sums lose no digits. */
#define FEW_TOKENS 64
static void carry(REAL *restrict sums, REAL *restrict recent, int64_t size)
{
    EACH for (int64_t d = 0; d < size; d++) {
        sums[d] += recent[d];
        recent[d] = 0;
    }
}

/* Numbers of all queries. */
#define QUERIES(call) ((call)->heads * (call)->queries * (call)->keys)

/* Bytes of scratch a thread: the sums (queries and norm's weight), recent ones, a row for h and one, dh, for each query,
   and some numbers for each row and query. */
static size_t scratch_bytes(const struct call *call)
{
    size_t numbers = 2 * QUERIES(call) + call->width * (call->queries + 4) + (call->sources + 1) * (3 * call->queries + 3);
    return (numbers * sizeof(REAL) + 63) / 64 * 64;
}

/* A token's numbers for the backward pass: logits of each query and source, reciprocal roots of the sources and of what
   the norm was given. */
#define STATS(call) ((call)->sources * ((call)->queries + 1) + 1)

/* The softmax of n logits and of the prior's, if there is one, behind them, and their log-sum-exp. */
static void softmax(const REAL *logits, int64_t n, const REAL *prior, REAL *weights, REAL *lse)
{
    REAL top = prior ? *prior : -INFINITY, mass = 0;
    for (int64_t i = 0; i < n; i++)
        top = logits[i] > top ? logits[i] : top;
    EACH for (int64_t i = 0; i < n; i++)
        weights[i] = EXP(logits[i] - top);
    if (prior)
        weights[n++] = EXP(*prior - top);
    for (int64_t i = 0; i < n; i++)
        mass += weights[i];
    for (int64_t i = 0; i < n; i++)
        weights[i] /= mass;
    if (lse)
        *lse = top + LOG(mass);
}

static void read_tokens(const struct call *call, const REAL *query, int64_t first, int64_t last, void *scratch)
{
    const int64_t width = call->width, n = call->sources, queries = call->queries, all = n + (call->prior_lse != NULL);
    const int64_t keys = call->keys, from = width - keys;
    const REAL *weight = call->weight, *prior_lse = call->prior_lse;
    const REAL eps = call->eps, scale = call->scale;
    void *const *results = call->rows + all;
    REAL *h = scratch, *squares = h + width, *weights = squares + n, *kept = weights + all;
    const ELEMENT *rows[all];
    for (int64_t t = first; t < last; t++) {
        for (int64_t i = 0; i < all; i++)
            rows[i] = ROW(call->rows[i], t);
        if (call->addend) {
            const ELEMENT *a = rows[0], *b = ROW(call->addend, t);
            ELEMENT *total = ROW(call->total, t);
            EACH for (int64_t d = 0; d < width; d++)
                total[d] = STORE(LOAD(a[d]) + LOAD(b[d]));
            rows[0] = total;
        }
        REAL *stats = call->stats ? (REAL *)call->stats + t * STATS(call) : kept, *roots = stats + queries * n;
        const REAL *own = query + t % call->heads * keys;
        for (int64_t l = 0; l < queries; l++) {
            REAL *logits = stats + l * n;
            if (l == 0) {
                dots_and_squares(rows, n, from, own, keys, logits, squares);
                for (int64_t i = 0; i < n; i++)
                    roots[i] = 1 / (REAL)sqrt(squares[i] / keys + eps);
            } else
                dot_products(rows, n, from, own + l * keys, keys, logits);
            for (int64_t i = 0; i < n; i++)
                logits[i] *= roots[i];
            softmax(logits, n, prior_lse ? prior_lse + t : NULL, weights,
                    call->lse ? (REAL *)call->lse + l * call->tokens + t : NULL);
            if (!results[l])
                continue;
            memset(h, 0, width * sizeof(REAL));
            mix(rows, all, 0, weights, width, h);
            ELEMENT *row = ROW(results[l], t);
            if (l == 0 && call->norm)
                roots[n] = normalise(h, weight, call->norm_eps, width, row);
            else {
                EACH for (int64_t d = 0; d < width; d++)
                    row[d] = STORE(h[d] * scale);
            }
        }
    }
}

/* out = in + p dh; in may be NULL. */
INLINE void pass_back(ELEMENT *restrict out, const ELEMENT *in, REAL p, const REAL *dh, int64_t width)
{
    if (in) {
        EACH for (int64_t d = 0; d < width; d++)
            out[d] = STORE(LOAD(in[d]) + p * dh[d]);
    } else {
        EACH for (int64_t d = 0; d < width; d++)
            out[d] = STORE(p * dh[d]);
    }
}

static void read_tokens_backward(const struct call *call, const REAL *query, int64_t first, int64_t last, void *scratch)
{
    const int64_t width = call->width, n = call->sources, queries = call->queries, all = n + (call->prior_lse != NULL);
    const int64_t keys = call->keys, from = width - keys, size = QUERIES(call);
    const REAL *weight = call->weight, *prior_lse = call->prior_lse;
    const REAL scale = call->scale;
    void *const *gradients = call->rows + all, *const *later = gradients + queries, *const *results = later + n;
    REAL *sums = scratch, *recent = sums + size + width, *h = recent + size + width;
    REAL *dh = h + width, *along_row = dh + queries * width, *along_query = along_row + all, *shares = along_query + all * queries,
         *gains = shares + all * queries;
    const ELEMENT *rows[all];
    for (int64_t t = first; t < last; t++) {
        for (int64_t i = 0; i < all; i++)
            rows[i] = ROW(call->rows[i], t), along_row[i] = 0;
        const REAL *stats = (const REAL *)call->stats + t * STATS(call), *roots = stats + queries * n;
        const int64_t head = t % call->heads * keys;
        for (int64_t l = 0; l < queries; l++) {
            const REAL *logits = stats + l * n;
            REAL *dx = dh + l * width, *weights = shares + l * all, *along = along_query + l * all;
            softmax(logits, n, prior_lse ? prior_lse + t : NULL, weights, NULL);
            if (!gradients[l])
                memset(dx, 0, width * sizeof(REAL));
            else if (l == 0 && call->norm) {
                memset(h, 0, width * sizeof(REAL));
                mix(rows, all, 0, weights, width, h);
                normalise_backward(ROW(gradients[l], t), h, weight, roots[n], width, dx, recent + size);
            } else {
                const ELEMENT *row = ROW(gradients[l], t);
                EACH for (int64_t d = 0; d < width; d++)
                    dx[d] = LOAD(row[d]) * scale;
            }
            dot_products(rows, all, 0, dx, width, gains); /* the gradients of the weights */
            REAL mean = call->dlse ? -((const REAL *)call->dlse)[l * call->tokens + t] : 0;
            for (int64_t i = 0; i < all; i++)
                mean += weights[i] * gains[i];
            for (int64_t i = 0; i < all; i++) {
                REAL dlogit = weights[i] * (gains[i] - mean);
                if (i == n) {
                    ((REAL *)call->dprior_lse)[t] = dlogit;
                    break;
                }
                along[i] = dlogit * roots[i];
                along_row[i] -= dlogit * logits[i] * roots[i] * roots[i] / keys;
            }
            mix(rows, n, from, along, keys, recent + head + l * keys);
        }
        for (int64_t i = 0; i < all; i++) {
            const ELEMENT *v = rows[i], *in = i < n && later[i] ? ROW(later[i], t) : NULL;
            ELEMENT *restrict out = ROW(results[i], t);
            REAL a = along_row[i];
            if (i == n)
                pass_back(out, NULL, shares[n], dh, width);
            else if (queries == 1) {
                const REAL *own = query + head;
                REAL p = shares[i], q = along_query[i];
                pass_back(out, in, p, dh, from);
                if (in) {
                    EACH for (int64_t d = from; d < width; d++)
                        out[d] = STORE(LOAD(in[d]) + p * dh[d] + q * own[d - from] + a * LOAD(v[d]));
                } else {
                    EACH for (int64_t d = from; d < width; d++)
                        out[d] = STORE(p * dh[d] + q * own[d - from] + a * LOAD(v[d]));
                }
            } else {
                EACH for (int64_t d = 0; d < width; d++)
                    h[d] = a * LOAD(v[d]) + (in ? LOAD(in[d]) : 0);
                for (int64_t l = 0; l < queries; l++) {
                    const REAL *x = dh + l * width, *u = query + l * width;
                    REAL p = shares[l * all + i], q = along_query[l * all + i];
                    EACH for (int64_t d = 0; d < width; d++)
                        h[d] += p * x[d] + q * u[d];
                }
                EACH for (int64_t d = 0; d < width; d++)
                    out[d] = STORE(h[d]);
            }
        }
        if ((t - first) % FEW_TOKENS == FEW_TOKENS - 1 || t == last - 1)
            carry(sums, recent, size + width);
    }
}

/* h = sum_i w_i v_i. Weights: `keys` of them, one a source, or with keys = 0 one a source and row. */
static void mix_tokens(const struct call *call, const REAL *query, int64_t first, int64_t last, void *scratch)
{
    const int64_t width = call->width, n = call->sources;
    REAL *h = scratch, *weights = h + width;
    const ELEMENT *rows[n];
    for (int64_t t = first; t < last; t++) {
        for (int64_t i = 0; i < n; i++)
            rows[i] = ROW(call->rows[i], t), weights[i] = call->keys ? query[i] : query[i * call->tokens + t];
        memset(h, 0, width * sizeof(REAL));
        mix(rows, n, 0, weights, width, h);
        ELEMENT *row = ROW(call->rows[n], t);
        EACH for (int64_t d = 0; d < width; d++)
            row[d] = STORE(h[d]);
    }
}

static void mix_tokens_backward(const struct call *call, const REAL *query, int64_t first, int64_t last, void *scratch)
{
    const int64_t width = call->width, n = call->sources, keys = call->keys;
    void *const *later = call->rows + n + 1, *const *results = later + n;
    REAL *sums = scratch, *recent = sums + keys, *dh = recent + keys, *gains = dh + width, *each = call->dquery;
    const ELEMENT *rows[n];
    for (int64_t t = first; t < last; t++) {
        const ELEMENT *gradient = ROW(call->rows[n], t);
        EACH for (int64_t d = 0; d < width; d++)
            dh[d] = LOAD(gradient[d]);
        for (int64_t i = 0; i < n; i++)
            rows[i] = ROW(call->rows[i], t);
        dot_products(rows, n, 0, dh, width, gains);
        for (int64_t i = 0; i < n; i++) {
            pass_back(ROW(results[i], t), later[i] ? ROW(later[i], t) : NULL,
                      keys ? query[i] : query[i * call->tokens + t], dh, width);
            if (keys)
                recent[i] += gains[i];
            else
                each[i * call->tokens + t] = gains[i];
        }
        if ((t - first) % FEW_TOKENS == FEW_TOKENS - 1 || t == last - 1)
            carry(sums, recent, keys);
    }
}

static void add_tokens(const struct call *call, const REAL *query, int64_t first, int64_t last, void *scratch)
{
    (void)query;
    const int64_t width = call->width;
    REAL *h = scratch, *roots = call->stats;
    for (int64_t t = first; t < last; t++) {
        const ELEMENT *a = ROW(call->rows[0], t);
        if (call->addend) {
            const ELEMENT *b = ROW(call->addend, t);
            ELEMENT *total = ROW(call->total, t);
            EACH for (int64_t d = 0; d < width; d++) {
                ELEMENT sum = STORE(LOAD(a[d]) + LOAD(b[d]));
                total[d] = sum;
                h[d] = LOAD(sum);
            }
        } else {
            EACH for (int64_t d = 0; d < width; d++)
                h[d] = LOAD(a[d]);
        }
        REAL root = normalise(h, call->weight, call->norm_eps, width, ROW(call->rows[1], t));
        if (roots)
            roots[t] = root;
    }
}

static void add_tokens_backward(const struct call *call, const REAL *query, int64_t first, int64_t last, void *scratch)
{
    (void)query;
    const int64_t width = call->width;
    REAL *sums = scratch, *recent = sums + width, *h = recent + width, *dh = h + width;
    const REAL *roots = call->stats;
    for (int64_t t = first; t < last; t++) {
        const ELEMENT *total = ROW(call->rows[0], t), *in = call->rows[2] ? ROW(call->rows[2], t) : NULL;
        ELEMENT *out = ROW(call->rows[3], t);
        EACH for (int64_t d = 0; d < width; d++)
            h[d] = LOAD(total[d]);
        normalise_backward(ROW(call->rows[1], t), h, call->weight, roots[t], width, dh, recent);
        if (in) {
            EACH for (int64_t d = 0; d < width; d++)
                out[d] = STORE(dh[d] + LOAD(in[d]));
        } else {
            EACH for (int64_t d = 0; d < width; d++)
                out[d] = STORE(dh[d]);
        }
        if ((t - first) % FEW_TOKENS == FEW_TOKENS - 1 || t == last - 1)
            carry(sums, recent, width);
    }
}

/* What is done for a share of the tokens. */
typedef void (*worker)(const struct call *, const REAL *query, int64_t first, int64_t last, void *scratch);

/* Runs the worker on its share of the tokens in each thread; scratch holds `size` bytes a thread. */
static void share(const struct call *call, const REAL *query, worker work, char *scratch, size_t size)
{
#ifdef _OPENMP
    if (call->threads > 1) {
#pragma omp parallel num_threads(call->threads)
        {
            int64_t k = omp_get_thread_num(), threads = omp_get_num_threads();
            work(call, query, call->tokens * k / threads, call->tokens * (k + 1) / threads, scratch + k * size);
        }
        return;
    }
#endif
    work(call, query, 0, call->tokens, scratch);
}

static void *zeros(size_t size)
{
    void *start = NULL;
    if (posix_memalign(&start, 64, size ? size : 1))
        return NULL;
    return memset(start, 0, size);
}

/* Does the call in its threads, with queries folded, and sums the parameters' gradients over the threads in their order.
   Returns 1 without memory. */
static int run(const struct call *call, worker work)
{
    const int64_t width = call->width, size = QUERIES(call);
    const size_t scratch = scratch_bytes(call);
    char *memory = zeros(call->threads * scratch + (call->key_norm ? size * sizeof(REAL) : 0));
    if (!memory)
        return 1;
    const REAL *query = call->query, *key_norm = call->key_norm, *used = query;
    if (key_norm) {
        REAL *folded = (REAL *)(memory + call->threads * scratch);
        for (int64_t d = 0; d < size; d++)
            folded[d] = query[d] * key_norm[d];
        used = folded;
    }
    share(call, used, work, memory, scratch);
    REAL *dquery = call->dquery, *dkey_norm = call->dkey_norm, *dweight = call->dweight, *sums = (REAL *)memory;
    if (dquery || dweight)
        for (int64_t k = 1; k < call->threads; k++)
            for (int64_t d = 0; d < size + width; d++)
                sums[d] += ((REAL *)(memory + k * scratch))[d];
    for (int64_t d = 0; dquery && d < size; d++) {
        dquery[d] = key_norm ? sums[d] * key_norm[d] : sums[d];
        if (dkey_norm)
            dkey_norm[d] = sums[d] * query[d];
    }
    if (dweight)
        memcpy(dweight, sums + size, width * sizeof(REAL));
    free(memory);
    return 0;
}

int depth_read(const struct call *call) { return run(call, read_tokens); }
int depth_read_backward(const struct call *call) { return run(call, read_tokens_backward); }
int depth_mix(const struct call *call) { return run(call, mix_tokens); }
int depth_mix_backward(const struct call *call) { return run(call, mix_tokens_backward); }
int depth_add(const struct call *call) { return run(call, add_tokens); }
int depth_add_backward(const struct call *call) { return run(call, add_tokens_backward); }
