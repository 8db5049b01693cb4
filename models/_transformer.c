/* One token through a causal transformer with its cache: `models._transformer.Transformer.step`, for every row of a batch.
 *
 * Plain C over the tensors' own memory, compiled by `models._native` where there is a compiler. What a row computes
 * depends on that row alone, down to the last bit: each of its sums is taken in one order, however many rows there are.
 *
 *     D width    d of a head    S stride    K slots of a lane    matrices lie (inputs, outputs)
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "_product.h"

typedef struct {
    int64_t rows, width, heads, hidden, layers;
} Shape;

typedef struct {
    const float *scale, *shift; /* (D,) */
} Norm;

typedef struct {
    Norm norm1;
    const float *qkv, *bias, *out; /* (D, 3·D), (reach, heads), (D, D) */
    Norm norm2;
    const float *up, *down; /* (D, hidden), (hidden, D) */
    float *cache;           /* (B, heads, 2, S, K, d) */
    int64_t reach, stride, kept;
} Layer;

static float sum_of(vec v)
{
    float part[LANES];
    *(vec *)part = v;
    for (int n = LANES / 2; n; n /= 2)
        for (int k = 0; k < n; k++)
            part[k] += part[k + n];
    return part[0];
}

static float dot(const float *x, const float *y, int64_t n)
{
    vec sum = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        sum += *(const vec *)(x + i) * *(const vec *)(y + i);
    float total = sum_of(sum);
    for (; i < n; i++)
        total += x[i] * y[i];
    return total;
}

/* y += a · x */
static void add(float *y, float a, const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        y[i] += a * x[i];
}

static void normalise(float *y, const float *x, Norm norm, int64_t n)
{
    float mean = 0, square = 0;
    for (int64_t i = 0; i < n; i++)
        mean += x[i];
    mean /= n;
    for (int64_t i = 0; i < n; i++)
        square += (x[i] - mean) * (x[i] - mean);
    const float scale = 1 / sqrtf(square / n + 1e-5f); /* the eps of torch.nn.LayerNorm */
    for (int64_t i = 0; i < n; i++)
        y[i] = (x[i] - mean) * scale * norm.scale[i] + norm.shift[i];
}

/* One row of one layer: keep its key and value, and mix the values of its lane. qkv (3·D) -> mixed (D). */
static void attend(const Shape *s, const Layer *l, int64_t row, int64_t position, const float *qkv, float *mixed, float *weight)
{
    const int64_t d = s->width / s->heads, lane = position % l->stride, turn = position / l->stride, slot = turn % l->kept;
    const int64_t slots = turn < l->kept ? turn + 1 : l->kept; /* that hold something */
    const float scale = 1 / sqrtf((float)d);
    for (int64_t head = 0; head < s->heads; head++) {
        float *keys = l->cache + (((row * s->heads + head) * 2 + 0) * l->stride + lane) * l->kept * d;
        float *values = keys + l->stride * l->kept * d;
        memcpy(keys + slot * d, qkv + s->width + head * d, sizeof(float) * d);
        memcpy(values + slot * d, qkv + 2 * s->width + head * d, sizeof(float) * d);

        float top = -INFINITY, total = 0;
        for (int64_t k = 0; k < slots; k++) {
            const int64_t lag = (slot - k + l->kept) % l->kept;
            weight[k] = -INFINITY;
            if (lag < l->reach)
                weight[k] = scale * dot(qkv + head * d, keys + k * d, d) + l->bias[lag * s->heads + head];
            top = fmaxf(top, weight[k]);
        }
        for (int64_t k = 0; k < slots; k++)
            total += weight[k] = expf(weight[k] - top);
        float *into = mixed + head * d;
        memset(into, 0, sizeof(float) * d);
        for (int64_t k = 0; k < slots; k++)
            add(into, weight[k] / total, values + k * d, d);
    }
}

/* h (B, D), of tokens at position (B,), becomes the transformer's output. 0, or -1 where memory is short. */
int64_t step(const Shape *s, const Layer *layers, const Norm *last, const int64_t *position, float *h)
{
    const int64_t D = s->width;
    int64_t kept = 0;
    for (int64_t i = 0; i < s->layers; i++)
        kept = layers[i].kept > kept ? layers[i].kept : kept;
    float *x = malloc(sizeof(float) * (BLOCK * (D + 3 * D + D + s->hidden) + kept));
    if (!x)
        return -1;
    float *qkv = x + BLOCK * D, *mixed = qkv + BLOCK * 3 * D, *hidden = mixed + BLOCK * D, *weight = hidden + BLOCK * s->hidden;

    for (int64_t first = 0; first < s->rows; first += BLOCK) {
        const int rows = (int)(s->rows - first < BLOCK ? s->rows - first : BLOCK);
        float *token = h + first * D;
        for (const Layer *l = layers; l < layers + s->layers; l++) {
            for (int r = 0; r < rows; r++)
                normalise(x + r * D, token + r * D, l->norm1, D);
            memset(qkv, 0, sizeof(float) * BLOCK * 3 * D);
            product(rows, qkv, 3 * D, x, D, l->qkv, D, 3 * D);
            for (int r = 0; r < rows; r++)
                attend(s, l, first + r, position[first + r], qkv + r * 3 * D, mixed + r * D, weight);
            product(rows, token, D, mixed, D, l->out, D, D);

            for (int r = 0; r < rows; r++)
                normalise(x + r * D, token + r * D, l->norm2, D);
            memset(hidden, 0, sizeof(float) * BLOCK * s->hidden);
            product(rows, hidden, s->hidden, x, D, l->up, D, s->hidden);
            for (int64_t k = 0; k < rows * s->hidden; k++)
                hidden[k] *= 0.5f * (1 + erff(hidden[k] * (float)M_SQRT1_2));
            product(rows, token, D, hidden, s->hidden, l->down, s->hidden, D);
        }
        for (int r = 0; r < rows; r++)
            normalise(token + r * D, token + r * D, *last, D);
    }
    free(x);
    return 0;
}
