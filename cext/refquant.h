/* refquant.h - the whole interface of the C core.
 *
 * The text between the two marks is also what Python sees: build_ext.py hands it to cffi
 * unchanged, so that every prototype is written once. It may hold only what cffi's parser
 * reads: declarations, enums and integer #defines.
 *
 * How the pieces fit, in reading order:
 *
 *     gemm_scalar.c      the sentence: what a tile of an integer matrix product is, in plain C
 *     impl.h             the picture: rows, segments, panels, tiles; the form of a micro-kernel
 *     gemm_avx2.c ...    the sentence in wider registers, one file for each instruction set
 *     pack.c             weights in the order in which a kernel reads them
 *     slab.c             the pixels of a unit of work, and which part of the window each of them needs
 *     conv.c             convolution and matrix product: cut into units, units into tiles
 *     output.c           what becomes of a sum: int32, float32, or uint8 by fixed point
 *     products.c         activations times activations: attention, for all images and heads in one call
 *     islands.c ...      what is computed in real numbers between two integer layers
 *     threads.c          the thread team
 *     cpu.c, dispatch.c  what this processor can execute; one table of kernels
 *
 * Habits kept everywhere: no function prints, aborts, allocates for its caller or keeps a
 * pointer after it returns. A function that can be misused returns RQ_OK or a negative code.
 */
#ifndef REFQUANT_H
#define REFQUANT_H

#include <stdint.h>

/* cffi: begin */

/* Raised whenever a declaration below changes its meaning, so that Python refuses a compiled
 * module that is older than its sources. */
#define RQ_ABI_VERSION 6
int rq_abi_version(void);

/* With which compiler and flags this module was built: the first question of a bug report. */
const char *rq_compiler(void);
const char *rq_compiler_flags(void);

enum rq_status {
    RQ_OK = 0,
    RQ_ERR_KERNEL = -1,  /* no such row in the kernel table, or not for this processor */
    RQ_ERR_SIZE = -2,    /* a size, stride or count that describes no operation */
    RQ_ERR_RANGE = -3,   /* a number outside of its range: k, bits, a code, a shift */
    RQ_ERR_NULL = -4,    /* a null pointer where elements are to be read or written */
    RQ_ERR_MEMORY = -5   /* no memory for the scratch space */
};

/* One bit for each instruction set that a kernel may need. A bit says that the processor
 * has the instructions and that the operating system saves the registers. */
enum rq_cpu {
    RQ_CPU_AVX2 = 1,        /* with FMA */
    RQ_CPU_AVXVNNI = 2,
    RQ_CPU_AVX512VNNI = 4,  /* with AVX-512 F, BW, DQ and VL */
    RQ_CPU_NEONDOT = 8
};
uint32_t rq_cpu_features(void);

/* The kernel table, slowest row first: row 0 is `scalar`. Kernel `row` may be run when
 * (rq_kernel_needs(row) & ~rq_cpu_features()) == 0. */
int rq_kernel_count(void);
const char *rq_kernel_name(int row);   /* NULL: no such row */
uint32_t rq_kernel_needs(int row);     /* UINT32_MAX: no such row */

/* Run the multiplying instruction of kernel `row` on registers alone for a while that grows with
 * `rounds`; return how many multiplications that were. Timed by the caller, it is the speed that no
 * kernel of this instruction set can exceed. 0: this kernel has no such instruction; or a status. */
int64_t rq_peak(int row, int64_t rounds);

/* A product of codes lies in [-255*128, 255*127], so that k <= (2^31 - 1) / (255*128) = 65793
 * terms fit int32 whatever the data. With zero points the limit is another (at most 131071);
 * sums wrap modulo 2^32 on the way, hence the result is exact whenever it fits. Python checks that. */
#define RQ_MAX_K 131071
#define RQ_MAX_K_INT4 65793

/* Weights, packed once and used many times: w (outputs, kh, kw, c), signed codes of 8 or 4 bits.
 * `panels` holds rq_packed_bytes(...) bytes at a multiple of 64, and `sums` (kh + 1, kw + 1, outputs) the
 * sum of w over window lines before p and columns before q; rq_pack fills both from a C-contiguous array
 * of int8. `zero_points` may be NULL: all 0. */
struct rq_weights {
    int64_t outputs, kh, kw, c;
    int bits;
    const void *panels;
    const int32_t *sums;
    const int32_t *zero_points;
};
int64_t rq_packed_bytes(int64_t outputs, int64_t kh, int64_t kw, int64_t c, int bits);  /* or a status */
int rq_pack(const int8_t *w, int64_t outputs, int64_t kh, int64_t kw, int64_t c, int bits,
            void *panels, int32_t *sums);

/* Activations x (n, h, w, c), uint8: the pixels of a line and the bytes of a pixel lie together,
 * lines and images may lie apart (bytes from one to the next). A matrix (m, k) is n = w = 1, h = m. */
struct rq_input {
    const uint8_t *data;
    int64_t n, h, w, c;
    int64_t image_stride, line_stride;
    int32_t zero_point;  /* the code that means 0, 0 to 255; pixels outside of the image have it */
};

/* What becomes of sum + bias, and where it is stored: row m of the result, outputs 0 .. O-1, begins
 * at element m * ld of `data`.
 *     RQ_INT32     sum + int_bias[o]
 *     RQ_FLOAT32   (float)(sum + int_bias[o]) * scale[o] + bias[o] + residual[m * residual_ld + o],
 *                  rounded after each operation, in this order
 *     RQ_UINT8     round((sum + int_bias[o]) * mantissa[o] / 2^shift[o]) + zero_point, ties to even,
 *                  limited to qmin .. qmax
 * bias, residual and int_bias may be NULL: nothing is added. */
enum rq_kind { RQ_INT32 = 0, RQ_FLOAT32 = 1, RQ_UINT8 = 2 };
struct rq_output {
    int kind;
    void *data;
    int64_t ld;
    const int32_t *int_bias;
    const float *scale, *bias, *residual;
    int64_t residual_ld;
    const int32_t *mantissa, *shift;
    int32_t zero_point, qmin, qmax;
};

/* y[n,i,j,o] = sum over p,q,c of (x[n, stride i + p - padding, stride j + q - padding, c] - zx)
 *                              * (w[o,p,q,c] - zw[o]),   then the output stage.
 * Runs kernel `row` on the calling thread and, if there is enough to do, up to threads - 1 others. The result may overlap
 * no operand. Its rows are the pixels (n, i, j) in order. */
#define RQ_ALONE_BELOW 1000000  /* multiplications, some 5 microseconds: less than a team gains */
int rq_conv2d(int row, int threads, const struct rq_input *x, const struct rq_weights *w,
              int64_t stride, int64_t padding, const struct rq_output *y);

/* Many products of codes with codes (products.c): y[i,h] = scale * (a[i,h] - za) (b[i,h] - zb), rounded to float32 once
 * before and once after it is scaled. a (images, heads, m, k), b (images, heads, k, n), or (.., n, k) if b_transposed;
 * the codes of a row lie together, a stride is the distance in elements. region_bits: 0, or 2 to 8: codes of a are then
 * a flag and a magnitude, in steps of 2^region_shift where the flag is set, and za is 0. y overlaps no operand. */
struct rq_matrices {
    const uint8_t *data;
    int64_t image_stride, head_stride, row_stride;
    int32_t zero_point;
};
struct rq_products {
    int64_t images, heads, m, n, k;
    struct rq_matrices a, b;
    int b_transposed, region_bits, region_shift;
    float scale;
    float *y;
    int64_t y_image_stride, y_head_stride, y_row_stride;
};
int rq_products(int row, int threads, const struct rq_products *p);

/* The float islands between two integer layers (islands.c). kind is RQ_FLOAT32, or RQ_UINT8: codes
 * limit(round(y / scale) + zero_point, 0, qmax), ties to even. Error bounds: refquant/ref/islands.py.
 * RQ_ERR_RANGE: also where a number is no number; y then has no meaning. y overlaps no operand. */
int rq_group_norm(int row, int threads, const float *x, int64_t n, int64_t pixels, int64_t c, int64_t groups,
                  const float *gamma, const float *beta, double eps, int silu, int kind, float scale,
                  int32_t zero_point, int32_t qmax, void *y);
int rq_quantize(int row, int threads, const float *x, int64_t count, int silu, int kind, float scale,
                int32_t zero_point, int32_t qmax, void *y);
int rq_softmax(int row, int threads, const void *scores, int ints, double factor, int64_t lines, int64_t length,
               int kind, float scale, int32_t qmax, void *y);
/* softmax to the codes of two regions, as rq_products reads them: region_bits = bits, region_shift = shift */
int rq_softmax_regions(int row, int threads, const float *scores, double factor, int64_t lines, int64_t length,
                       int bits, int shift, uint8_t *y);
int rq_upsample_nearest(int threads, const void *x, int64_t lines, int64_t width, int64_t pixel_bytes, void *y);
/* y[p] = a[p], b[p]: `pixels` pixels of ca and cb channels side by side. */
int rq_concat(int threads, const float *a, const float *b, int64_t pixels, int64_t ca, int64_t cb, float *y);

/* The float islands of a transformer (islands_tokens.c). x (n, tokens, d); what is gamma, beta or gate of image i begins
 * at element i * stride. In rq_gated_add, y may be x or h.
 *     rq_layer_norm      (x - mean) / sqrt(variance + eps) (1 + gamma) + beta, over d
 *     rq_gated_add       x + gate h
 *     rq_gelu_signs      GELU of x (rows, width), to codes (rows, 2 width): steps of `positive` of what is not below 0,
 *                        then steps of `negative` of what is, limited to qmax
 *     rq_quantize_parts  codes of x (rows, count, width), each part with its own scale and zero point */
struct rq_part { float scale; int32_t zero_point, qmax; };
int rq_layer_norm(int row, int threads, const float *x, int64_t n, int64_t tokens, int64_t d, const float *gamma,
                  const float *beta, int64_t stride, double eps, int kind, float scale, int32_t zero_point,
                  int32_t qmax, void *y);
int rq_gated_add(int row, int threads, const float *x, const float *gate, int64_t stride, const float *h, int64_t n,
                 int64_t tokens, int64_t d, float *y);
int rq_gelu(int row, int threads, const float *x, int64_t count, int kind, float scale, int32_t zero_point,
            int32_t qmax, void *y);
int rq_gelu_signs(int row, int threads, const float *x, int64_t rows, int64_t width, float positive, float negative,
                  int32_t qmax, uint8_t *y);
int rq_quantize_parts(int row, int threads, const float *x, int64_t rows, int64_t count, int64_t width,
                      const struct rq_part *parts, uint8_t *y);

/* cffi: end */

#endif
