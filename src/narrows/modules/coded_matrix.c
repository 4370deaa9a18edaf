/* Matrices kept as codes, decoded row by row in the nearest cache: multiplied there, or written out.

   W[n, k] = sum over planes p of scale[p, n / scale_rows, k / scale_group] x table[n / table_rows, code[p, n, k]]. A table holds
   the bits of bf16 numbers. With AVX-512 VBMI 64 codes are read at once, elsewhere one by one. */
#include <stdint.h>
#include <string.h>
#if defined __AVX512VBMI__ && !defined ONE_BY_ONE
#include <immintrin.h>
#define AT_ONCE 1
#else
#define AT_ONCE 0
#endif

#define LANES 16
#define BLOCK 64 /* codes read at a time: rows in the cache are padded to it */
#define CODES 256
#define AHEAD 4096 /* bytes of codes that are asked for before they are needed */
#define AT_MOST 4 /* rows of the input that are multiplied at a time */

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint8_t bytes __attribute__((vector_size(BLOCK), aligned(1)));

int64_t codes_at_once(void) { return AT_ONCE ? BLOCK : 1; }

struct coded {
    int64_t inputs, outputs, planes;
    int64_t bits;            /* of a code; 0: trits, five a byte */
    const uint8_t *codes[4]; /* segments of 8, 4, 2 and 1 bits, or the trits in the first: [planes, outputs, bytes of a row] */
    const uint16_t *table;
    int64_t table_rows;
    const void *scales; /* bf16 numbers; or `powers` signed powers of two, a byte each, that add up; none: all are 1 */
    int64_t scale_rows, scale_group, powers;
};

static int64_t padded(int64_t inputs) { return (inputs + BLOCK - 1) / BLOCK * BLOCK; }

/* what each call works in */
struct room {
    int64_t size, count, tabled, scaled; /* of a row, padded; of a table; which table and which scales are read */
    float *row, *scales, *spread;        /* [size]; [planes, groups]; [planes, size] */
    uint8_t *code, *more;                /* [size] each */
    float table[CODES], levels[4][LANES];
#if AT_ONCE
    __m512i low[4], high[4], order; /* the two bytes of each number's bits, and the order that their joining undoes */
#endif
};

int64_t room_bytes(const struct coded *w)
{
    return padded(w->inputs) * (2 + (1 + w->planes) * sizeof(float)) + w->planes * w->inputs / w->scale_group * sizeof(float);
}

static void begin(const struct coded *w, void *memory, struct room *r)
{
    memset(memory, 0, room_bytes(w));
    r->size = padded(w->inputs);
    r->count = w->bits ? 1 << w->bits : 3;
    r->tabled = r->scaled = -1;
    r->code = memory;
    r->more = r->code + r->size;
    r->row = (float *)(r->more + r->size);
    r->spread = r->row + r->size;
    r->scales = r->spread + w->planes * r->size;
}

static float wide(uint16_t bits)
{
    uint32_t whole = (uint32_t)bits << 16;
    float number;
    memcpy(&number, &whole, sizeof number);
    return number;
}

static uint16_t narrow(float number)
{
    uint32_t whole;
    memcpy(&whole, &number, sizeof whole);
    return (whole + 0x7fff + (whole >> 16 & 1)) >> 16; /* to the nearest, ties to even */
}

/* --- codes --- */

#if AT_ONCE
/* of codes of 8, 4, 2 and 1 bits: which bytes every eight codes take theirs from, and at what bit each begins; of trits in
   five blocks: which byte each is in, and which of them are its first digit, its second.. */
static uint8_t pick[4][BLOCK], shift[4][BLOCK], which[5][BLOCK];
static uint64_t whose[5][5];

__attribute__((constructor)) static void lay_out(void)
{
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < BLOCK; j++) {
            pick[i][j] = j / 8 * (8 >> i) + j % 8;
            shift[i][j] = j % 8 * (8 >> i);
        }
    for (int i = 0; i < 5 * BLOCK; i++) {
        which[i / BLOCK][i % BLOCK] = i / 5;
        whose[i / BLOCK][i % 5] |= 1ull << i % BLOCK;
    }
}

static inline __m512i loaded(const uint8_t *from, int64_t left)
{
    __builtin_prefetch(from + AHEAD);
    return _mm512_maskz_loadu_epi8(~0ull >> (left < BLOCK ? BLOCK - left : 0), from);
}
#endif

/* codes of 8 >> i bits, the first in a byte's lowest; behind the bits that are there if `after` */
static void read_bits(const uint8_t *from, int64_t inputs, int i, int after, uint8_t *code)
{
    int width = 8 >> i;
#if AT_ONCE
    const __m512i picks = _mm512_loadu_si512(pick[i]), shifts = _mm512_loadu_si512(shift[i]);
    const __m512i mask = _mm512_set1_epi8((1 << width) - 1);
    for (int64_t k = 0; k < inputs; k += BLOCK) {
        __m512i here = _mm512_permutexvar_epi8(picks, loaded(from + (k >> i), (inputs - k) >> i));
        here = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, here), mask);
        if (after)
            here = _mm512_or_si512((__m512i)(*(bytes *)(code + k) << width), here);
        _mm512_storeu_si512(code + k, here);
    }
#else
    for (int64_t j = 0, k = 0; k < inputs; j++)
        for (int s = 0; s < 8; s += width, k++)
            code[k] = (after ? code[k] << width : 0) | (from[j] >> s & ((1 << width) - 1));
#endif
}

/* trits: a byte is a fraction of 256, and what three times it carries is the first one */
static void read_trits(const uint8_t *from, int64_t inputs, uint8_t *code)
{
#if AT_ONCE
    for (int64_t k = 0; k < inputs; k += 5 * BLOCK) {
        bytes digit[5], here = (bytes)loaded(from + k / 5, (inputs - k + 4) / 5);
        for (int s = 0; s < 5; s++, here += here + here)
            digit[s] = -(bytes)(here > 85) - (bytes)(here > 170);
        for (int64_t b = 0; b < 5 && k + b * BLOCK < inputs; b++) {
            __m512i found = _mm512_setzero_si512(), places = _mm512_loadu_si512(which[b]);
            for (int s = 0; s < 5; s++)
                found = _mm512_mask_permutexvar_epi8(found, whose[b][s], places, (__m512i)digit[s]);
            _mm512_storeu_si512(code + k + b * BLOCK, found);
        }
    }
#else
    for (int64_t j = 0, k = 0; k < inputs; j++) {
        uint8_t here = from[j];
        for (int s = 0; s < 5 && k < inputs; s++, k++, here *= 3)
            code[k] = here * 3 >> 8;
    }
#endif
}

static void read_codes(const struct coded *w, int64_t plane, int64_t n, uint8_t *code)
{
    int64_t row = plane * w->outputs + n;
    if (!w->bits)
        read_trits(w->codes[0] + row * ((w->inputs + 4) / 5), w->inputs, code);
    for (int i = 0, after = 0; i < 4; i++)
        if (w->bits & 8 >> i)
            read_bits(w->codes[i] + row * (w->inputs >> i), w->inputs, i, after++, code);
}

/* --- numbers --- */

static void read_table(const struct coded *w, int64_t of, struct room *r)
{
    const uint16_t *table = w->table + of * r->count;
    uint8_t low[CODES] = {0}, high[CODES] = {0};
    for (int64_t i = 0; i < r->count; i++) {
        r->table[i] = wide(table[i]);
        low[i] = table[i];
        high[i] = table[i] >> 8;
    }
#if AT_ONCE
    uint8_t order[BLOCK];
    for (int i = 0; i < BLOCK; i++)
        order[i] = (i / 8 % 2 * 2 + i % 2) * LANES + i / 16 * 4 + i % 8 / 2;
    r->order = _mm512_loadu_si512(order);
    for (int i = 0; i < 4; i++) {
        r->low[i] = _mm512_loadu_si512(low + i * BLOCK);
        r->high[i] = _mm512_loadu_si512(high + i * BLOCK);
    }
#endif
}

/* the scales of row n, [planes, groups] */
static void read_scales(const struct coded *w, int64_t n, float *to)
{
    int64_t groups = w->inputs / w->scale_group, each = w->outputs / w->scale_rows * groups;
    for (int64_t p = 0; p < w->planes; p++, to += groups) {
        int64_t at = p * each + n / w->scale_rows * groups;
        for (int64_t g = 0; g < groups; g++)
            to[g] = w->powers ? 0 : w->scales ? wide(((const uint16_t *)w->scales)[at + g]) : 1;
        for (int64_t i = 0; i < w->powers; i++) {
            const int8_t *power = (const int8_t *)w->scales + i * w->planes * each + at;
            for (int64_t g = 0; g < groups; g++) { /* sign x (exponent + 64); 0 is none */
                uint32_t size = power[g] < 0 ? -power[g] : power[g], sign = power[g] < 0 ? 0x8000 : 0;
                to[g] += wide(power[g] ? sign | (size + 63) << 7 : 0);
            }
        }
    }
}

#if AT_ONCE
static inline __m512i byte_of(const __m512i *table, __m512i code, int few)
{
    if (few)
        return _mm512_permutexvar_epi8(code, table[0]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), _mm512_permutex2var_epi8(table[0], code, table[1]),
                                  _mm512_permutex2var_epi8(table[2], code, table[3]));
}
#endif

enum how { PLAIN, SCALED, ADDED };

/* the numbers that codes stand for, `scale` times each, added to what is there */
static inline void look_up(const struct room *r, int64_t inputs, const float *scale, int few, enum how how)
{
    float *to = r->row;
#if AT_ONCE
    const __m512i upper = _mm512_set1_epi32(0xffff0000);
    for (int64_t k = 0; k < inputs; k += BLOCK) {
        __m512i code = _mm512_permutexvar_epi8(r->order, _mm512_loadu_si512(r->code + k));
        __m512i low = byte_of(r->low, code, few), high = byte_of(r->high, code, few);
        __m512i first = _mm512_unpacklo_epi8(low, high), last = _mm512_unpackhi_epi8(low, high);
        lanes four[] = {(lanes)_mm512_slli_epi32(first, 16), (lanes)_mm512_and_si512(first, upper),
                        (lanes)_mm512_slli_epi32(last, 16), (lanes)_mm512_and_si512(last, upper)};
        for (int i = 0; i < BLOCK / LANES; i++) {
            lanes *at = (lanes *)(to + k) + i, number = four[i];
            if (how != PLAIN)
                number *= ((const lanes *)(scale + k))[i];
            *at = how == ADDED ? *at + number : number;
        }
    }
#else
    (void)few;
    for (int64_t k = 0; k < inputs; k++) {
        float number = r->table[r->code[k]] * (how == PLAIN ? 1 : scale[k]);
        to[k] = how == ADDED ? to[k] + number : number;
    }
#endif
}

/* the same for all planes at once, where together they have few levels and a group is whole registers */
static void look_up_levels(const struct coded *w, struct room *r)
{
    int64_t groups = w->inputs / w->scale_group;
    for (int64_t g = 0; g < groups; g++) {
        lanes level = {0};
        for (int64_t p = 0; p < w->planes; p++)
            level += r->scales[p * groups + g] * *(const lanes *)r->levels[p];
        for (int64_t k = g * w->scale_group; k < (g + 1) * w->scale_group; k += LANES) {
#if AT_ONCE
            __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(r->code + k)));
            *(lanes *)(r->row + k) = (lanes)_mm512_permutexvar_ps(code, (__m512)level);
#else
            for (int i = 0; i < LANES; i++)
                r->row[k + i] = ((const float *)&level)[r->code[k + i]];
#endif
        }
    }
}

static int64_t levels_of(const struct coded *w, const struct room *r)
{
    int64_t levels = 1;
    for (int64_t p = 0; p < w->planes && levels <= LANES; p++)
        levels *= r->count;
    return levels;
}

/* codes of all planes as the digits of one number, the first plane's the highest, and what each digit stands for */
static void join(const struct coded *w, int64_t n, struct room *r)
{
    read_codes(w, 0, n, r->code);
    for (int64_t p = 1; p < w->planes; p++) {
        read_codes(w, p, n, r->more);
        for (int64_t k = 0; k < w->inputs; k += BLOCK)
            *(bytes *)(r->code + k) = *(bytes *)(r->code + k) * (uint8_t)r->count + *(bytes *)(r->more + k);
    }
}

static void read_levels(const struct coded *w, struct room *r)
{
    int64_t step = 1;
    for (int64_t p = w->planes - 1; p >= 0; p--, step *= r->count)
        for (int64_t i = 0; i < LANES; i++)
            r->levels[p][i] = r->table[i / step % r->count];
}

/* each number `group` times */
static void spread(const float *from, int64_t count, int64_t group, float *to)
{
    if (group == 1)
        memcpy(to, from, count * sizeof *to);
    else
        for (int64_t g = 0; g < count; g++)
            for (int64_t i = 0; i < group; i++)
                *to++ = from[g];
}

/* row n of the matrix; gives what it is still to be multiplied by */
static float decode(const struct coded *w, int64_t n, struct room *r)
{
    int64_t k = w->inputs, group = w->scale_group, groups = k / group;
    int one = w->planes == 1 && groups == 1, few = r->count <= BLOCK;
    int levels = !one && group % LANES == 0 && levels_of(w, r) <= LANES;
    if (n / w->table_rows != r->tabled) {
        read_table(w, r->tabled = n / w->table_rows, r);
        if (levels)
            read_levels(w, r);
    }
    if (n / w->scale_rows != r->scaled) {
        r->scaled = n / w->scale_rows;
        read_scales(w, n, r->scales);
        if (!one && !levels)
            for (int64_t p = 0; p < w->planes; p++)
                spread(r->scales + p * groups, groups, group, r->spread + p * r->size);
    }
    if (levels) {
        join(w, n, r);
        look_up_levels(w, r);
    } else
        for (int64_t p = 0; p < w->planes; p++) {
            const float *scale = r->spread + p * r->size;
            read_codes(w, p, n, r->code);
            if (one && few)
                look_up(r, k, scale, 1, PLAIN);
            else if (one)
                look_up(r, k, scale, 0, PLAIN);
            else if (few && p)
                look_up(r, k, scale, 1, ADDED);
            else if (few)
                look_up(r, k, scale, 1, SCALED);
            else
                look_up(r, k, scale, 0, p ? ADDED : SCALED);
        }
    for (int64_t i = k; i < r->size; i++)
        r->row[i] = 0;
    return one ? r->scales[0] : 1;
}

/* --- what is asked for --- */

static inline void dots(const float *row, const float *x, int64_t size, int count, float *sums)
{
    lanes sum[AT_MOST][BLOCK / LANES] = {0};
    for (int64_t k = 0; k < size; k += BLOCK)
        for (int i = 0; i < BLOCK / LANES; i++)
            for (int m = 0; m < count; m++)
                sum[m][i] += ((const lanes *)(row + k))[i] * ((const lanes *)(x + m * size + k))[i];
    for (int m = 0; m < count; m++) {
        lanes all = (sum[m][0] + sum[m][1]) + (sum[m][2] + sum[m][3]);
        float part[LANES];
        memcpy(part, &all, sizeof part);
        for (int half = LANES / 2; half; half /= 2)
            for (int i = 0; i < half; i++)
                part[i] += part[i + half];
        sums[m] = part[0];
    }
}

/* y[rows, outputs] = x W^T for outputs from first to last; x[rows, inputs padded with zeros to whole blocks] */
void coded_product(const struct coded *w, int64_t first, int64_t last, int64_t rows, const float *x, float *y, void *memory)
{
    struct room r;
    begin(w, memory, &r);
    for (int64_t n = first; n < last; n++) {
        float scale = decode(w, n, &r), sums[AT_MOST];
        int64_t m = 0;
        for (; m + AT_MOST <= rows; m += AT_MOST) {
            dots(r.row, x + m * r.size, r.size, AT_MOST, sums);
            for (int i = 0; i < AT_MOST; i++)
                y[(m + i) * w->outputs + n] = scale * sums[i];
        }
        for (; m < rows; m++) {
            dots(r.row, x + m * r.size, r.size, 1, sums);
            y[m * w->outputs + n] = scale * sums[0];
        }
    }
}

static void narrowed(const float *row, int64_t count, float scale, uint16_t *to)
{
    int64_t k = 0;
#if AT_ONCE && defined __AVX512BF16__
    for (; k + LANES <= count; k += LANES) {
        lanes number = scale * *(const lanes *)(row + k);
        _mm256_storeu_si256((__m256i *)(to + k), (__m256i)_mm512_cvtneps_pbh((__m512)number));
    }
#endif
    for (; k < count; k++)
        to[k] = narrow(scale * row[k]);
}

/* outputs from first to last, of those that begin at `origin`: to[.., inputs], as fp32, or as bf16 if `brief` */
void coded_rows(const struct coded *w, int64_t first, int64_t last, int64_t origin, int64_t brief, void *to, void *memory)
{
    struct room r;
    begin(w, memory, &r);
    for (int64_t n = first; n < last; n++) {
        float scale = decode(w, n, &r);
        int64_t at = (n - origin) * w->inputs;
        if (brief)
            narrowed(r.row, w->inputs, scale, (uint16_t *)to + at);
        else
            for (int64_t k = 0; k < w->inputs; k++)
                ((float *)to)[at + k] = scale * r.row[k];
    }
}

/* --- 4-bit weights as torch's own kernel reads them --- */

/* In blocks of at most 64 outputs, input by input: the low half of a byte belongs to output i of a block, the high one to
   i + block / 2. scales[groups, outputs, 2] are scale and scale x (8 - zero): a weight is (code - 8) x the one + the other. */
struct interleaved {
    int64_t inputs, outputs, group, block;
    const uint8_t *packed;
    const uint16_t *scales;
};

/* one half of each byte, less 8; the look-up reads no more than four bits */
static inline lanes nibbles(const uint8_t *from, int shift)
{
#if AT_ONCE
    __m512i codes = _mm512_srli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from)), shift);
    return (lanes)_mm512_permutexvar_ps(codes, (__m512)(lanes){-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7});
#else
    lanes numbers;
    for (int i = 0; i < LANES; i++)
        numbers[i] = (from[i] >> shift & 15) - 8;
    return numbers;
#endif
}

static void read_pairs(const struct interleaved *w, int64_t b, int64_t g, float *scale, float *offset)
{
    const uint16_t *pair = w->scales + 2 * (g * w->outputs + b * w->block);
    for (int64_t i = 0; i < w->block; i++) {
        scale[i] = wide(pair[2 * i]);
        offset[i] = wide(pair[2 * i + 1]);
    }
}

#if AT_ONCE
/* the weights of a group of whole registers in a block of 64 outputs, into rows `inputs` apart */
static void group_rows(const uint8_t *from, int64_t group, const float *scale, const float *offset, int64_t inputs,
                       int64_t brief, char *to)
{
    const __m512i every = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
    const lanes codes = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    uint8_t order[BLOCK], four[BLOCK];
    for (int i = 0; i < BLOCK; i++)
        order[i] = i % LANES * 4 + i / LANES;
    for (int i = 0; i < BLOCK / 2; i += 4) /* four outputs and those half a block on; sixteen inputs of each in turn */
        for (int64_t k = 0; k < group; k += LANES) {
            __m512i bytes_of_four = _mm512_i32gather_epi32(every, from + k * BLOCK / 2 + i, 4);
            _mm512_storeu_si512(four, _mm512_permutexvar_epi8(_mm512_loadu_si512(order), bytes_of_four));
            for (int j = 0; j < 8; j++) {
                int output = i + j % 4 + j / 4 * (BLOCK / 2);
                __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(four + j % 4 * LANES)));
                code = _mm512_srli_epi32(code, j / 4 * 4); /* the look-up reads no more than four bits */
                lanes level = codes * scale[output] + offset[output];
                lanes number = (lanes)_mm512_permutexvar_ps(code, (__m512)level);
                if (brief)
                    narrowed((float *)&number, LANES, 1, (uint16_t *)to + output * inputs + k);
                else
                    *(lanes *)((float *)to + output * inputs + k) = number;
            }
        }
}
#endif

/* outputs of the blocks from first to last, to[.., inputs], as fp32, or as bf16 if `brief` */
void interleaved_rows(const struct interleaved *w, int64_t first, int64_t last, int64_t brief, void *to)
{
    int64_t block = w->block, half = block / 2, inputs = w->inputs, size = brief ? sizeof(uint16_t) : sizeof(float);
    for (int64_t b = first; b < last; b++)
        for (int64_t g = 0; g < inputs / w->group; g++) {
            float scale[BLOCK], offset[BLOCK];
            const uint8_t *from = w->packed + (b * inputs + g * w->group) * half;
            char *at = (char *)to + ((b - first) * block * inputs + g * w->group) * size;
            read_pairs(w, b, g, scale, offset);
#if AT_ONCE
            if (block == BLOCK && w->group % LANES == 0) {
                group_rows(from, w->group, scale, offset, inputs, brief, at);
                continue;
            }
#endif
            for (int64_t i = 0; i < block; i++)
                for (int64_t k = 0; k < w->group; k++) {
                    int code = i < half ? from[k * half + i] & 15 : from[k * half + i - half] >> 4;
                    float number = (code - 8) * scale[i] + offset[i];
                    if (brief)
                        ((uint16_t *)at)[i * inputs + k] = narrow(number);
                    else
                        ((float *)at)[i * inputs + k] = number;
                }
        }
}

/* y[rows, outputs] = x W^T for blocks from first to last; x[rows, inputs] */
void interleaved_product(const struct interleaved *w, int64_t first, int64_t last, int64_t rows, const float *x, float *y)
{
    int64_t block = w->block, half = block / 2;
    for (int64_t b = first; b < last; b++)
        for (int64_t m = 0; m < rows; m++) {
            float scale[BLOCK], offset[BLOCK], *to = y + m * w->outputs + b * block;
            for (int64_t g = 0; g < w->inputs / w->group; g++) {
                float part[BLOCK] = {0}, all = 0;
                const uint8_t *from = w->packed + (b * w->inputs + g * w->group) * half;
                const float *here = x + m * w->inputs + g * w->group;
                int64_t i = 0;
                for (; i + LANES <= half; i += LANES) {
                    lanes low = {0}, high = {0};
                    for (int64_t k = 0; k < w->group; k++) {
                        const uint8_t *both = from + k * half + i;
                        low += here[k] * nibbles(both, 0);
                        high += here[k] * nibbles(both, 4);
                    }
                    *(lanes *)(part + i) = low;
                    *(lanes *)(part + half + i) = high;
                }
                for (; i < half; i++)
                    for (int64_t k = 0; k < w->group; k++) {
                        part[i] += here[k] * ((from[k * half + i] & 15) - 8);
                        part[half + i] += here[k] * ((from[k * half + i] >> 4) - 8);
                    }
                for (int64_t k = 0; k < w->group; k++)
                    all += here[k];
                read_pairs(w, b, g, scale, offset);
                for (int64_t j = 0; j < block; j++)
                    to[j] = (g ? to[j] : 0) + scale[j] * part[j] + offset[j] * all;
            }
        }
}
