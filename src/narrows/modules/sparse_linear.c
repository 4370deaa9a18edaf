/* Linear layers with sparse weights: one pass over the nonzeros, vectorised over rows of the input.

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

/* Grouped n:m weights: of each m outputs an input has weights for n. Inputs come in chunks, of which as many have one pattern
   of n outputs as any other, so that the code knows which sums an input adds to and all of them stay in registers.
   `column[i]` is the place of an input in its chunk and value[i * n ..] its weights; they lie output block by chunk, and in
   these one input of each pattern after the other, `g` times. y = x W^T as above, G registers of rows at a time. */
#define EACH_SUM(m, G)                                                                                                 \
    for (int j = 0; j < m; j++)                                                                                        \
        for (int l = 0; l < G; l++)
#define GROUPED(n, m, G, TERMS, PATTERNS)                                                                              \
    static void grouped_##n##_##m(int64_t g, int64_t chunks, int64_t size, int64_t blocks, const uint8_t *column,      \
                                  const float *value, const float *xt, float *yt)                                      \
    {                                                                                                                  \
        for (int64_t c = 0; c < chunks; c++)                                                                           \
            for (int64_t b = 0; b < blocks; b++)                                                                       \
                for (int part = 0; part < GROUPS; part += G) {                                                         \
                    const uint8_t *at = column + (b * chunks + c) * size;                                              \
                    const float *v = value + (b * chunks + c) * size * n;                                              \
                    const float *x = xt + c * size * TILE + part * LANES;                                              \
                    float *y = yt + b * m * TILE + part * LANES;                                                       \
                    lanes sum[m][G];                                                                                   \
                    EACH_SUM(m, G) sum[j][l] = ((const lanes *)(y + j * TILE))[l];                                     \
                    for (int64_t i = 0; i < g; i++) {                                                                  \
                        PATTERNS(TERMS, G)                                                                             \
                    }                                                                                                  \
                    EACH_SUM(m, G) ((lanes *)(y + j * TILE))[l] = sum[j][l];                                           \
                }                                                                                                      \
    }
#define ONE(G, a)                                                                                                      \
    for (int l = 0; l < G; l++)                                                                                        \
        sum[a][l] += v[0] * ((const lanes *)(x + *at * TILE))[l];                                                      \
    at++, v++;
#define TWO(G, a, b)                                                                                                   \
    for (int l = 0; l < G; l++) {                                                                                      \
        lanes given = ((const lanes *)(x + *at * TILE))[l];                                                            \
        sum[a][l] += v[0] * given;                                                                                     \
        sum[b][l] += v[1] * given;                                                                                     \
    }                                                                                                                  \
    at++, v += 2;
#define OF_1_4(f, G) f(G, 0) f(G, 1) f(G, 2) f(G, 3)
#define OF_1_8(f, G) OF_1_4(f, G) f(G, 4) f(G, 5) f(G, 6) f(G, 7)
#define OF_2_4(f, G) f(G, 0, 1) f(G, 0, 2) f(G, 0, 3) f(G, 1, 2) f(G, 1, 3) f(G, 2, 3)
GROUPED(1, 4, 4, ONE, OF_1_4)
GROUPED(1, 8, 2, ONE, OF_1_8)
GROUPED(2, 4, 4, TWO, OF_2_4)

/* y = x W^T + bias for the n:m above (bias may be null); scratch holds TILE x (inputs + outputs) floats */
void grouped_forward(int64_t n, int64_t m, int64_t g, int64_t size, const uint8_t *column, const float *value,
                     const float *bias, int64_t rows, int64_t inputs, int64_t outputs, const float *x, float *y,
                     float *scratch)
{
    float *xt = scratch, *yt = scratch + TILE * inputs;
    for (int64_t first = 0; first < rows; first += TILE) {
        int64_t here = rows - first < TILE ? rows - first : TILE;
        gather(x + first * inputs, here, inputs, xt);
        for (int64_t k = 0; k < outputs; k++)
            for (int l = 0; l < TILE; l++)
                yt[k * TILE + l] = bias ? bias[k] : 0;
        (n == 2 ? grouped_2_4 : m == 4 ? grouped_1_4 : grouped_1_8)(g, inputs / size, size, outputs / m, column, value, xt, yt);
        scatter(yt, here, outputs, y + first * outputs);
    }
}
