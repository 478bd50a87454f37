/* pack.c - weights in the order in which a micro-kernel reads them.
 *
 * A weight w (O, kh, kw, C) is, for each output, kh segments of L = kw * C codes. Outputs are cut into
 * panels of 16, segments into steps of 8 codes (the last one filled up with zeros, and so is the last
 * panel). A step of a panel is two groups of 4 k, 64 bytes each:
 *
 *     8 bits:   group 0: o0 k0..k3 | o1 k0..k3 | ... | o15 k0..k3      64 bytes, one 512-bit register:
 *               group 1: o0 k4..k7 | o1 k4..k7 | ... | o15 k4..k7      the operand of one vpdpbusd
 *
 *     4 bits:   byte i of 64: low half = byte i of group 0, high half = byte i of group 1
 *
 * Why halves of different groups share a byte, not neighbours: both registers then come out of one
 * load with a mask and a shift. The high half, masked in place, is a signed byte worth 16 times the
 * code; the low half is brought there by a shift of 4. So a kernel sums 16 times the product and
 * shifts the sum right by 4, which is exact, instead of repairing the sign of every weight.
 *
 * Zero points need sums of the codes, over the window or a part of it (conv.c). Stored beside the panels
 * is, for each p and q, the sum over window lines 0 .. p-1 and columns 0 .. q-1: that over any rectangle
 * follows from four of them.
 */
#include <stddef.h>
#include <string.h>

#include "conv.h"

struct rq_layout rq_layout_of(int64_t outputs, int64_t segments, int64_t length, int bits)
{
    struct rq_layout l = {.segments = segments, .length = length};
    l.steps = rq_ceil_div(length, RQ_STEP);
    l.panels = rq_ceil_div(outputs, RQ_PANEL);
    l.panel_bytes = segments * l.steps * RQ_STEP * RQ_PANEL * bits / 8;
    return l;
}

int64_t rq_packed_bytes(int64_t outputs, int64_t kh, int64_t kw, int64_t c, int bits)
{
    if (bits != 8 && bits != 4)
        return RQ_ERR_RANGE;
    const int64_t most_k = bits == 4 ? RQ_MAX_K_INT4 : RQ_MAX_K;
    if (outputs < 0 || outputs > INT32_MAX || kh < 1 || kw < 1 || c < 0)
        return RQ_ERR_SIZE;
    if (outputs == 0)
        return 0; /* no sum, hence none that could overflow */
    if (kh > most_k || kw > most_k || c > most_k || kh * kw > most_k || kh * kw * c > most_k)
        return RQ_ERR_RANGE;
    const struct rq_layout l = rq_layout_of(outputs, kh, kw * c, bits);
    return l.panels * l.panel_bytes;
}

/* sums[p][q][o] = sum of w[o][0 .. p-1][0 .. q-1][all c]: (kh + 1, kw + 1, O). */
static void sum_corners(const int8_t *w, int64_t outputs, int64_t kh, int64_t kw, int64_t c, int32_t *sums)
{
    const int64_t line = (kw + 1) * outputs;
    memset(sums, 0, sizeof *sums * (size_t)line);
    for (int64_t p = 0; p < kh; p++)
        for (int64_t o = 0; o < outputs; o++) {
            int32_t along = 0; /* this line of the window, up to q */
            sums[(p + 1) * line + o] = 0;
            for (int64_t q = 0; q < kw; q++) {
                for (int64_t i = 0; i < c; i++)
                    along += w[((o * kh + p) * kw + q) * c + i];
                sums[(p + 1) * line + (q + 1) * outputs + o] = sums[p * line + (q + 1) * outputs + o] + along;
            }
        }
}

int rq_pack(const int8_t *w, int64_t outputs, int64_t kh, int64_t kw, int64_t c, int bits,
            void *panels, int32_t *sums)
{
    const int64_t bytes = rq_packed_bytes(outputs, kh, kw, c, bits);
    if (bytes < 0 || outputs == 0)
        return (int)bytes;
    if (!sums || (bytes > 0 && (!w || !panels)))
        return RQ_ERR_NULL;

    const struct rq_layout l = rq_layout_of(outputs, kh, kw * c, bits);
    uint8_t *const packed = panels;
    if (bytes > 0)
        memset(packed, 0, (size_t)bytes);
    for (int64_t o = 0; o < outputs; o++) {
        uint8_t *const panel = packed + o / RQ_PANEL * l.panel_bytes;
        const int64_t column = o % RQ_PANEL * 4;
        for (int64_t s = 0; s < l.segments; s++) {
            for (int64_t k = 0; k < l.length; k++) {
                const int8_t code = w[(o * l.segments + s) * l.length + k];
                if (bits == 4 && (code < -8 || code > 7))
                    return RQ_ERR_RANGE; /* cut to 4 bits it would be another code */
                const int64_t step = s * l.steps + k / RQ_STEP, group = k / 4 % 2, at = column + k % 4;
                if (bits == 8)
                    panel[(step * 2 + group) * 64 + at] = (uint8_t)code;
                else
                    panel[step * 64 + at] |= (uint8_t)((code & 15) << 4 * group);
            }
        }
    }
    sum_corners(w, outputs, kh, kw, c, sums);
    return RQ_OK;
}
