/* callers.c - several threads of a program convolve at once, each with a team of three.
 *
 * One of them gets the team, the others work alone; who it is changes all the time. Every result must be
 * that of one thread. Made for ThreadSanitizer, which reports what two threads touch without order.
 */
#define _POSIX_C_SOURCE 200809L

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "refquant.h"

enum { CALLERS = 4, CALLS = 30, SIDE = 15, C = 32, O = 40, OUT = SIDE * SIDE * O }; /* 2.6 million multiplications */

static uint8_t x[SIDE * SIDE * C];
static int8_t codes[O * 9 * C];
static int32_t sums[4 * 4 * O], zeros[O], want[OUT];
static struct rq_weights w = {O, 3, 3, C, 8, NULL, sums, zeros};
static atomic_int wrong;

static int convolve(int row, int threads, int32_t *out)
{
    const struct rq_input in = {x, 1, SIDE, SIDE, C, SIDE * SIDE * C, SIDE * C, 7};
    const struct rq_output y = {.kind = RQ_INT32, .data = out, .ld = O};
    return rq_conv2d(row, threads, &in, &w, 1, 1, &y);
}

static void *caller(void *number)
{
    int32_t *out = malloc(sizeof want);
    for (int i = 0; i < CALLS; i++) {
        int row = rq_kernel_count() - 1;
        while (rq_kernel_needs(row) & ~rq_cpu_features())
            row--;
        memset(out, 0, sizeof want);
        if (convolve(i % 20 ? row : 0, 3, out) != RQ_OK || memcmp(out, want, sizeof want))
            atomic_fetch_add(&wrong, 1);
        if (i % 10 == *(int *)number) /* long enough for the team to fall asleep */
            nanosleep(&(struct timespec){.tv_nsec = 3000000}, NULL);
    }
    free(out);
    return NULL;
}

int main(void)
{
    uint32_t random = 1;
    for (size_t i = 0; i < sizeof x; i++)
        x[i] = (uint8_t)((random = random * 1664525u + 1013904223u) >> 24);
    for (size_t i = 0; i < sizeof codes; i++)
        codes[i] = (int8_t)((random = random * 1664525u + 1013904223u) >> 24);
    for (int o = 0; o < O; o++)
        zeros[o] = o % 5 - 2;
    void *panels = aligned_alloc(64, (size_t)rq_packed_bytes(O, 3, 3, C, 8));
    if (!panels || rq_pack(codes, O, 3, 3, C, 8, panels, sums) != RQ_OK)
        return 2;
    w.panels = panels;
    if (convolve(0, 1, want) != RQ_OK)
        return 2;

    pthread_t threads[CALLERS];
    int numbers[CALLERS];
    for (int i = 0; i < CALLERS; i++) {
        numbers[i] = i;
        if (pthread_create(&threads[i], NULL, caller, &numbers[i]))
            return 2;
    }
    for (int i = 0; i < CALLERS; i++)
        pthread_join(threads[i], NULL);
    free(panels);
    printf("%d of %d results are wrong\n", atomic_load(&wrong), CALLERS * CALLS);
    return atomic_load(&wrong) != 0;
}
