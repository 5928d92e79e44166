/* What torchvision's ColorJitter, RandomGrayscale, ToTensor and Normalize make of an RGB image of Pillow's: the same
 * numbers to the last bit, in a tenth of the time.
 *
 * Every step computes what Pillow does (blending in single precision, luma in 16-bit fixed point, hue as in Python's
 * colorsys), in the same order and the same precision, but over planes and without branches, so that a compiler can use
 * vector instructions. `pixels.py` compiles this file, and compares it with Pillow before it is used.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FAST __attribute__((target_clones("avx2", "default"))) /* chosen on the machine where it runs */
#else
#define FAST
#endif

typedef uint8_t byte;

enum { BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAYSCALE }; /* the first four as torchvision numbers them */

FAST static void make_planes(const byte *restrict packed, byte *restrict planes, long n) {
    for (long i = 0; i < n; i++)
        for (int c = 0; c < 3; c++) planes[i + c * n] = packed[3 * i + c];
}

FAST static void make_luma(const byte *restrict reds, const byte *restrict greens, const byte *restrict blues,
                           byte *restrict luma, long n) {
    for (long i = 0; i < n; i++) luma[i] = (reds[i] * 19595 + greens[i] * 38470 + blues[i] * 7471 + 0x8000) >> 16;
}

FAST static int find_mean(const byte *plane, long n) {
    int64_t sum = 0;
    for (long i = 0; i < n; i++) sum += plane[i];
    return (int)((double)sum / n + 0.5);
}

static inline byte mix(int from, byte to, float by) {
    float mixed = from + by * (to - from);
    return (byte)(mixed < 0 ? 0 : mixed > 255 ? 255 : mixed); /* a factor above 1 leads beyond the range */
}

FAST static void blend_with_gray(int gray, byte *plane, float by, long n) {
    for (long i = 0; i < n; i++) plane[i] = mix(gray, plane[i], by);
}

FAST static void blend(const byte *restrict from, byte *restrict plane, float by, long n) {
    for (long i = 0; i < n; i++) plane[i] = mix(from[i], plane[i], by);
}

static inline int pick(int condition, int a, int b) { return (-condition & a) | ((condition - 1) & b); }

/* To hue, saturation and value of eight bits each, `by` 255ths of a turn of the hue, and back. */
FAST static void turn_hue(byte *restrict reds, byte *restrict greens, byte *restrict blues, int by, long n) {
    for (long i = 0; i < n; i++) {
        int r = reds[i], g = greens[i], b = blues[i];
        int max = r > g ? r : g, min = r < g ? r : g;
        max = max > b ? max : b, min = min < b ? min : b;
        int is_gray = max == min, is_red = r == max, is_green = !is_red & (g == max);
        float range = max - min + is_gray;
        float plus = (max - pick(is_red, b, pick(is_green, r, g))) / range;
        float minus = (max - pick(is_red, g, pick(is_green, b, r))) / range;
        float hue = pick(is_red, 0, 4 - 2 * is_green) + (double)plus - (double)minus; /* in sixths of a turn */
        double turns = hue / 6.0 + 1.0;
        hue = turns - (turns >= 1);
        float saturation = range / (max + !max);
        int h = (!is_gray * (int)(hue * 255.0) + by) & 255, s = !is_gray * (int)(saturation * 255.0);

        int sector = (int)(h * 6.0 / 255.0), is_odd = sector & 1;
        float rest = h * 6.0 / 255.0 - sector, part = s / 255.0, falling = part * rest;
        double missing = is_odd * (double)falling + !is_odd * (part * (1.0 - rest));
        int low = (int)(max * (1.0 - part) + 0.5), mid = (int)(max * (1.0 - missing) + 0.5);
        sector *= sector < 6;
        reds[i] = pick((sector == 0) | (sector == 5), max, pick((sector == 1) | (sector == 4), mid, low));
        greens[i] = pick((sector == 1) | (sector == 2), max, pick((sector == 0) | (sector == 3), mid, low));
        blues[i] = pick((sector == 3) | (sector == 4), max, pick((sector == 2) | (sector == 5), mid, low));
    }
}

FAST static void look_up(const byte *plane, const float *table, int height, int width, int is_mirrored, float *out) {
    for (int y = 0; y < height; y++, plane += width, out += width)
        if (is_mirrored)
            for (int x = 0; x < width; x++) out[x] = table[plane[width - 1 - x]];
        else
            for (int x = 0; x < width; x++) out[x] = table[plane[x]];
}

/* Take steps, each by so much (a factor, or 255ths of a turn), then look the pixels up; 1 where memory is short, else 0.
 *
 * image: [height, width, 3]; table: [3, 256]; out: [3, height, width].
 */
int transform(const byte *image, int height, int width, int is_mirrored, int n_steps, const int *steps, const float *by,
              const float *table, float *out) {
    long n = (long)height * width;
    byte *r = malloc(4 * n), *g = r + n, *b = g + n, *luma = b + n;
    if (!r) return 1;
    make_planes(image, r, n);
    for (int i = 0; i < n_steps; i++) {
        if (steps[i] != BRIGHTNESS && steps[i] != HUE) make_luma(r, g, b, luma, n);
        if (steps[i] == BRIGHTNESS) blend_with_gray(0, r, by[i], 3 * n);
        if (steps[i] == CONTRAST) blend_with_gray(find_mean(luma, n), r, by[i], 3 * n);
        if (steps[i] == HUE) turn_hue(r, g, b, (int)by[i], n);
        for (byte *plane = r; plane < luma; plane += n) {
            if (steps[i] == SATURATION) blend(luma, plane, by[i], n);
            if (steps[i] == GRAYSCALE) memcpy(plane, luma, n);
        }
    }
    for (int c = 0; c < 3; c++) look_up(r + c * n, table + 256 * c, height, width, is_mirrored, out + c * n);
    free(r);
    return 0;
}
