/* One tick of the cached PixelCNN: `models.pixelcnn.Model.step` after its vertical stack, for every chain of a batch.
 *
 * Plain C over the tensors' own memory, compiled by `models._native` where there is a compiler. What a chain computes
 * depends on that chain alone, down to the last bit: each of its sums is taken in one order, however many chains there are.
 *
 *     F features    L layers    E' = C·E numbers of a pixel    matrices lie (inputs, outputs)
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "_product.h"

typedef struct {
    int64_t features, layers, embedding, channels, hidden, levels, reach, width, height, columns, margin, chains;
} Shape;

typedef struct {
    const float *look_left, *past, *now, *horizontal_out, *table;          /* (REACH·E', F), 3 × (L, ., .), (C·levels, E) */
    const float *const *head;                                              /* of each channel: first, bias, last, bias */
    const int64_t *dilation, *tick;                                        /* (L,), (B,) */
    const double *temperature, *uniforms;                                  /* (B,), (B, H·W, C) */
    const float *told;                                                     /* (B, M + W, F + L·2F) */
    float *pixels, *past_features;                                         /* (B, M + W, E'), (B, M + W, L·F) */
    int64_t *chosen;                                                       /* (B, H·W, C) */
} Tensors;

/* The quantile at u of softmax(logits / temperature), as `models.pixelcnn.draw`. */
static int64_t quantile(const float *logits, int64_t levels, double temperature, double u, double *weight)
{
    double top = -INFINITY, total = 0, upto = 0;
    for (int64_t k = 0; k < levels; k++)
        top = fmax(top, logits[k] / temperature);
    for (int64_t k = 0; k < levels; k++)
        total += weight[k] = exp(logits[k] / temperature - top);
    for (int64_t k = 0; k < levels; k++) {
        upto += weight[k] / total;
        if (upto > u)
            return k;
    }
    return levels; /* no number is above u: a logit is not a number */
}

/* 0, or the number (from 1) of the first chain that had no level to draw, or -1 where memory is short. */
int64_t tick(const Shape *s, const Tensors *t)
{
    const int64_t F = s->features, L = s->layers, E = s->embedding, pixel = E * s->channels;
    const int64_t told_row = F + L * 2 * F, past_row = L * F, seen = F + (s->channels - 1) * E, size = s->width * s->height;
    const int64_t scratch = 3 * F + L * 2 * F + L * F + s->reach * pixel + s->hidden + s->levels + seen;
    float *memory = malloc(sizeof(float) * BLOCK * scratch + sizeof(double) * s->levels);
    if (!memory)
        return -1;
    double *weight = (double *)memory;
    float *h = (float *)(weight + s->levels), *gated = h + BLOCK * F, *gates = gated + BLOCK * F;
    float *behind = gates + BLOCK * L * 2 * F, *near = behind + BLOCK * L * F, *hidden = near + BLOCK * s->reach * pixel;
    float *logits = hidden + BLOCK * s->hidden, *known = logits + BLOCK * s->levels;
    int64_t failed = 0;

    for (int64_t first = 0; first < s->chains; first += BLOCK) {
        const int rows = (int)(s->chains - first < BLOCK ? s->chains - first : BLOCK);
        int64_t column[BLOCK]; /* of the caches, by chain */
        for (int r = 0; r < rows; r++) {
            const int64_t at = s->margin + t->tick[first + r] % s->width;
            column[r] = (first + r) * s->columns + at;
            const float *told = t->told + column[r] * told_row;
            memcpy(h + r * F, told, sizeof(float) * F);
            memcpy(gates + r * L * 2 * F, told + F, sizeof(float) * L * 2 * F);
            memcpy(near + r * s->reach * pixel, t->pixels + (column[r] - s->reach) * pixel, sizeof(float) * s->reach * pixel);
            for (int64_t l = 0; l < L; l++)
                memcpy(behind + r * L * F + l * F, t->past_features + (column[r] - t->dilation[l]) * past_row + l * F, sizeof(float) * F);
        }
        product(rows, h, F, near, s->reach * pixel, t->look_left, s->reach * pixel, F);
        for (int64_t l = 0; l < L; l++) {
            float *gate = gates + l * 2 * F;
            for (int r = 0; r < rows; r++)
                memcpy(t->past_features + column[r] * past_row + l * F, h + r * F, sizeof(float) * F);
            product(rows, gate, L * 2 * F, behind + l * F, L * F, t->past + l * F * 2 * F, F, 2 * F);
            product(rows, gate, L * 2 * F, h, F, t->now + l * F * 2 * F, F, 2 * F);
            for (int r = 0; r < rows; r++)
                for (int64_t k = 0; k < F; k++)
                    gated[r * F + k] = gate[r * L * 2 * F + k] / (1 + expf(-gate[r * L * 2 * F + F + k]));
            product(rows, h, F, gated, F, t->horizontal_out + l * F * F, F, F);
        }
        for (int r = 0; r < rows; r++)
            memcpy(known + r * seen, h + r * F, sizeof(float) * F);
        for (int64_t c = 0; c < s->channels; c++) {
            const float *const *head = t->head + 4 * c;
            for (int r = 0; r < rows; r++) {
                memcpy(hidden + r * s->hidden, head[1], sizeof(float) * s->hidden);
                memcpy(logits + r * s->levels, head[3], sizeof(float) * s->levels);
            }
            product(rows, hidden, s->hidden, known, seen, head[0], F + c * E, s->hidden);
            for (int64_t k = 0; k < rows * s->hidden; k++)
                hidden[k] = hidden[k] < 0 ? 0 : hidden[k]; /* what is not a number stays none */
            product(rows, logits, s->levels, hidden, s->hidden, head[2], s->hidden, s->levels);
            for (int r = 0; r < rows; r++) {
                const int64_t chain = first + r, place = (chain * size + t->tick[chain]) * s->channels + c;
                int64_t level = quantile(logits + r * s->levels, s->levels, t->temperature[chain], t->uniforms[place], weight);
                if (level == s->levels) {
                    failed = failed ? failed : chain + 1;
                    level = 0;
                }
                const float *embedded = t->table + (c * s->levels + level) * E;
                t->chosen[place] = level;
                memcpy(t->pixels + column[r] * pixel + c * E, embedded, sizeof(float) * E);
                if (c + 1 < s->channels)
                    memcpy(known + r * seen + F + c * E, embedded, sizeof(float) * E);
            }
        }
    }
    free(memory);
    return failed;
}
