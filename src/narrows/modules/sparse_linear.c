/* A linear layer with sparse weights, forward and backward: one pass over the nonzeros, vectorised over rows of the input.

   Weights are CSR: `value[i]` and `column[i]` for start[n] <= i < start[n + 1] make up output n. x is [rows, inputs] and
   y is [rows, outputs]; TILE rows at a time are transposed into a scratch that stays in the cache, so that all of a
   tile's numbers for one input lie side by side and a weight multiplies whole registers. */
#include <stdint.h>
#include <string.h>

#define LANES 16
#define GROUPS 4
#define TILE (LANES * GROUPS)

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));

int64_t tile_rows(void) { return TILE; }

/* the lanes of a and b whose bit s is clear, or set, after b, or a, moved s lanes up, or down */
#define CLEAR(j, s) ((j) & (s) ? LANES + (j) - (s) : (j))
#define SET(j, s) ((j) & (s) ? LANES + (j) : (j) + (s))
#define EACH(f, s)                                                                                                   \
    f(0, s), f(1, s), f(2, s), f(3, s), f(4, s), f(5, s), f(6, s), f(7, s), f(8, s), f(9, s), f(10, s), f(11, s),    \
        f(12, s), f(13, s), f(14, s), f(15, s)
#define SWAP(s)                                                                                                      \
    for (int i = 0; i < LANES; i++)                                                                                  \
        if (!(i & (s))) {                                                                                            \
            lanes a = row[i], b = row[i + (s)];                                                                      \
            row[i] = __builtin_shufflevector(a, b, EACH(CLEAR, s));                                                  \
            row[i + (s)] = __builtin_shufflevector(a, b, EACH(SET, s));                                              \
        }

/* a square of LANES x LANES, transposed in registers; rows lie `stride` and `pitch` floats apart */
static inline void transpose(const float *from, int64_t stride, float *to, int64_t pitch)
{
    lanes row[LANES];
    for (int i = 0; i < LANES; i++)
        row[i] = *(const lanes *)(from + i * stride);
    SWAP(8)
    SWAP(4)
    SWAP(2)
    SWAP(1)
    for (int i = 0; i < LANES; i++)
        *(lanes *)(to + i * pitch) = row[i];
}

/* from[rows, width] into to[width, TILE]; missing rows become zeros */
static void gather(const float *from, int64_t rows, int64_t width, float *to)
{
    int64_t m = 0;
    if (rows < TILE)
        memset(to, 0, sizeof(float) * TILE * width);
    for (; m + LANES <= rows; m += LANES) {
        int64_t k = 0;
        for (; k + LANES <= width; k += LANES)
            transpose(from + m * width + k, width, to + k * TILE + m, TILE);
        for (; k < width; k++)
            for (int l = 0; l < LANES; l++)
                to[k * TILE + m + l] = from[(m + l) * width + k];
    }
    for (; m < rows; m++)
        for (int64_t k = 0; k < width; k++)
            to[k * TILE + m] = from[m * width + k];
}

/* from[width, TILE] into to[rows, width] */
static void scatter(const float *from, int64_t rows, int64_t width, float *to)
{
    int64_t m = 0;
    for (; m + LANES <= rows; m += LANES) {
        int64_t k = 0;
        for (; k + LANES <= width; k += LANES)
            transpose(from + k * TILE + m, TILE, to + m * width + k, width);
        for (; k < width; k++)
            for (int l = 0; l < LANES; l++)
                to[(m + l) * width + k] = from[k * TILE + m + l];
    }
    for (; m < rows; m++)
        for (int64_t k = 0; k < width; k++)
            to[m * width + k] = from[k * TILE + m];
}

/* y = x W^T; scratch holds TILE x (inputs + outputs) floats */
void sparse_forward(const int32_t *start, const int32_t *column, const float *value, int64_t rows, int64_t inputs,
                    int64_t outputs, const float *x, float *y, float *scratch)
{
    float *xt = scratch, *yt = scratch + TILE * inputs;
    for (int64_t first = 0; first < rows; first += TILE) {
        int64_t here = rows - first < TILE ? rows - first : TILE;
        gather(x + first * inputs, here, inputs, xt);
        for (int64_t n = 0; n < outputs; n++) {
            lanes sum[GROUPS] = {0};
            for (int32_t i = start[n]; i < start[n + 1]; i++) {
                const lanes *row = (const lanes *)(xt + (int64_t)column[i] * TILE);
                for (int g = 0; g < GROUPS; g++)
                    sum[g] += value[i] * row[g];
            }
            memcpy(yt + n * TILE, sum, sizeof sum);
        }
        scatter(yt, here, outputs, y + first * outputs);
    }
}

/* dx = dy W and, at the nonzeros alone, dvalue += dy^T x; scratch holds TILE x (2 inputs + outputs) floats */
void sparse_backward(const int32_t *start, const int32_t *column, const float *value, int64_t rows, int64_t inputs,
                     int64_t outputs, const float *x, const float *dy, float *dx, float *dvalue, float *scratch)
{
    float *xt = scratch, *dxt = xt + TILE * inputs, *dyt = dxt + TILE * inputs;
    for (int64_t first = 0; first < rows; first += TILE) {
        int64_t here = rows - first < TILE ? rows - first : TILE;
        gather(x + first * inputs, here, inputs, xt);
        gather(dy + first * outputs, here, outputs, dyt);
        memset(dxt, 0, sizeof(float) * TILE * inputs);
        for (int64_t n = 0; n < outputs; n++) {
            lanes given[GROUPS];
            memcpy(given, dyt + n * TILE, sizeof given);
            for (int32_t i = start[n]; i < start[n + 1]; i++) {
                const lanes *row = (const lanes *)(xt + (int64_t)column[i] * TILE);
                lanes *out = (lanes *)(dxt + (int64_t)column[i] * TILE), dot = {0};
                for (int g = 0; g < GROUPS; g++) {
                    dot += given[g] * row[g];
                    out[g] += value[i] * given[g];
                }
                float sum = 0;
                for (int l = 0; l < LANES; l++)
                    sum += dot[l];
                dvalue[i] += sum;
            }
        }
        scatter(dxt, here, inputs, dx + first * inputs);
    }
}
