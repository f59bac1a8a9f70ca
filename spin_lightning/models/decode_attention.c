/* Attention of one query a row to bfloat16 keys and values. Each key is read once for all GROUP heads that share it, and
 * a key that the mask hides is not read at all. Sums are in float32. Built for one HEAD_DIM and GROUP by
 * decode_attention.py, and called from there. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define WIDTH 16 /* numbers in a vector; HEAD_DIM is a multiple */
#define CHUNKS (HEAD_DIM / WIDTH)
#define AHEAD 16 /* keys, and values, that are asked of the memory before they are needed */
#define LOWEST -1e30f
#define UNROLLED _Pragma("GCC unroll 16")

typedef float vector __attribute__((vector_size(4 * WIDTH)));
typedef float half_vector __attribute__((vector_size(2 * WIDTH)));
typedef float quarter_vector __attribute__((vector_size(WIDTH)));
typedef uint32_t wide_bits __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t narrow_bits __attribute__((vector_size(2 * WIDTH)));

static inline vector widen(const uint16_t *from) {
    narrow_bits bits;
    memcpy(&bits, from, sizeof bits);
    return (vector)(__builtin_convertvector(bits, wide_bits) << 16);
}

static inline void narrow(vector values, uint16_t *to) { /* to the nearest, ties to even */
    wide_bits wide = (wide_bits)values;
    narrow_bits bits = __builtin_convertvector((wide + 0x7fff + ((wide >> 16) & 1)) >> 16, narrow_bits);
    memcpy(to, &bits, sizeof bits);
}

static inline float widen_one(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static inline float sum(vector values) {
    half_vector halves[2];
    memcpy(halves, &values, sizeof halves);
    half_vector half = halves[0] + halves[1];
    quarter_vector quarters[2];
    memcpy(quarters, &half, sizeof quarters);
    quarter_vector quarter = quarters[0] + quarters[1];
    return (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
}

static inline void fetch(const uint16_t *states) {
    UNROLLED for (int d = 0; d < HEAD_DIM; d += 32) __builtin_prefetch(states + d);
}

/* Strides count elements. The last dimension of query, key and value has stride 1; the output has no gaps.
 * A row that sees no key
 * gives zeros. Returns 0, or 1 where there is no memory for the scores. */
int attend(const uint16_t *query, int64_t query_row, int64_t query_head,
           const uint16_t *key, int64_t key_row, int64_t key_head, int64_t key_step,
           const uint16_t *value, int64_t value_row, int64_t value_head, int64_t value_step,
           const uint16_t *mask, int64_t mask_row, int64_t mask_step,
           uint16_t *output, int64_t rows, int64_t key_heads, int64_t keys, float scale) {
    int failed = 0;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t head = 0; head < key_heads; head++) {
            const uint16_t *some_keys = key + row * key_row + head * key_head;
            const uint16_t *some_values = value + row * value_row + head * value_head;
            const uint16_t *some_mask = mask + row * mask_row;
            vector queries[GROUP][CHUNKS], sums[GROUP][CHUNKS] = {{{0}}};
            float largest[GROUP], totals[GROUP] = {0};
            int64_t first = 0; /* of the keys that are seen: a row is padded in front, or its window begins there */
            while (first + 1 < keys && widen_one(some_mask[first * mask_step]) < LOWEST) first++;
            float *scores = malloc(sizeof(float[GROUP]) * keys); /* of one head after the other */
            if (scores == NULL) {
#pragma omp atomic write
                failed = 1;
                continue;
            }
            UNROLLED for (int h = 0; h < GROUP; h++) {
                const uint16_t *one = query + row * query_row + (head * GROUP + h) * query_head;
                UNROLLED for (int c = 0; c < CHUNKS; c++) queries[h][c] = widen(one + c * WIDTH) * scale;
                largest[h] = LOWEST;
            }
            for (int64_t k = first; k < keys; k++) {
                float added = widen_one(some_mask[k * mask_step]);
                if (added < LOWEST) {
                    for (int h = 0; h < GROUP; h++) scores[h * keys + k] = 2 * LOWEST;
                    continue;
                }
                const uint16_t *one = some_keys + k * key_step;
                fetch(one + AHEAD * key_step);
                vector dots[GROUP] = {{0}};
                UNROLLED for (int c = 0; c < CHUNKS; c++) {
                    vector part = widen(one + c * WIDTH);
                    UNROLLED for (int h = 0; h < GROUP; h++) dots[h] += part * queries[h][c];
                }
                UNROLLED for (int h = 0; h < GROUP; h++) {
                    float score = sum(dots[h]) + added;
                    scores[h * keys + k] = score;
                    largest[h] = largest[h] < score ? score : largest[h];
                }
            }
            for (int h = 0; h < GROUP; h++) {
                for (int64_t k = first; k < keys; k++) {
                    float weight = expf(scores[h * keys + k] - largest[h]);
                    scores[h * keys + k] = weight;
                    totals[h] += weight;
                }
            }
            for (int64_t k = first; k < keys; k++) {
                if (widen_one(some_mask[k * mask_step]) < LOWEST) continue;
                const uint16_t *one = some_values + k * value_step;
                fetch(one + AHEAD * value_step);
                UNROLLED for (int c = 0; c < CHUNKS; c++) {
                    vector part = widen(one + c * WIDTH);
                    UNROLLED for (int h = 0; h < GROUP; h++) sums[h][c] += part * scores[h * keys + k];
                }
            }
            UNROLLED for (int h = 0; h < GROUP; h++) {
                uint16_t *one = output + ((row * key_heads + head) * GROUP + h) * HEAD_DIM;
                UNROLLED for (int c = 0; c < CHUNKS; c++) narrow(sums[h][c] / (totals[h] > 0 ? totals[h] : 1), one + c * WIDTH);
            }
            free(scores);
        }
    }
    return failed;
}
