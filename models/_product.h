/* Products of a few rows with a matrix, for the steps that stand in C (`models._native`).
 *
 * A row's sums are each taken in one order, whether it is alone or one of several rows that share a read of the matrix.
 */
#include <stdint.h>

#define LANES 16
#define TILE 2 /* vectors of outputs that are summed at once */
#define BLOCK 4 /* chains that share a read of the weights */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));

/* y (rows, n) += x (rows, m) · w (m, n). Rows of x and y lie x_stride and y_stride apart. */
static inline __attribute__((always_inline)) void
product_of(const int rows, float *y, int64_t y_stride, const float *x, int64_t x_stride, const float *w, int64_t m, int64_t n)
{
    int64_t j = 0;
    for (; j + TILE * LANES <= n; j += TILE * LANES) {
        vec sum[BLOCK][TILE];
        for (int r = 0; r < rows; r++)
            for (int t = 0; t < TILE; t++)
                sum[r][t] = *(const vec *)(y + r * y_stride + j + t * LANES);
        for (int64_t i = 0; i < m; i++) {
            vec weight[TILE];
            for (int t = 0; t < TILE; t++)
                weight[t] = *(const vec *)(w + i * n + j + t * LANES);
            for (int r = 0; r < rows; r++)
                for (int t = 0; t < TILE; t++)
                    sum[r][t] += x[r * x_stride + i] * weight[t];
        }
        for (int r = 0; r < rows; r++)
            for (int t = 0; t < TILE; t++)
                *(vec *)(y + r * y_stride + j + t * LANES) = sum[r][t];
    }
    for (; j < n; j++)
        for (int r = 0; r < rows; r++) {
            float sum = y[r * y_stride + j];
            for (int64_t i = 0; i < m; i++)
                sum += x[r * x_stride + i] * w[i * n + j];
            y[r * y_stride + j] = sum;
        }
}

static void product(int rows, float *y, int64_t y_stride, const float *x, int64_t x_stride, const float *w, int64_t m, int64_t n)
{
    if (rows == BLOCK)
        product_of(BLOCK, y, y_stride, x, x_stride, w, m, n);
    else
        for (int r = 0; r < rows; r++)
            product_of(1, y + r * y_stride, y_stride, x + r * x_stride, x_stride, w, m, n);
}
