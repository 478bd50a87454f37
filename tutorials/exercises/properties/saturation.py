"""Exercise 4. A matrix product of bytes as AVX2's `vpmaddubsw` computes it.

The instruction multiplies 32 pairs of bytes and adds neighbours: the sums of two products, as 16-bit integers. One more
instruction adds those to 32 bits. That is twice as fast as widening first, and on activations like those of a network,
behind a SiLU, times weights with a bell curve, the result is exact in every trial.

Task: write a property that holds for `refquant.ref.gemm` and fails here. It need not know the right result: what may
one do to the terms of a sum without changing it? After page 02.
"""

import numpy as np

from refquant import ref


def gemm(a, b):
    # a: (M, K) uint8, b: (N, K) int8 -> (M, N) int32; K is even
    products = a[:, None].astype(np.int32) * b[None].astype(np.int32)  # (M, N, K)
    pairs = products[..., 0::2] + products[..., 1::2]
    sixteen_bits = np.clip(pairs, -32768, 32767)  # the instruction saturates
    return sixteen_bits.sum(axis=-1, dtype=np.int32)


def authors_test(implementation):
    rng = np.random.default_rng(0)
    for k in (16, 64, 576):
        x = rng.standard_normal((4, k))
        silu = x / (1 + np.exp(-x))
        a = np.clip(np.rint((silu + 0.28) * 50), 0, 255).astype(np.uint8)
        b = np.clip(np.rint(rng.standard_normal((8, k)) * 32), -128, 127).astype(np.int8)
        np.testing.assert_array_equal(implementation(a, b), ref.gemm(a, b))


def my_property(implementation):
    """Yours: raise AssertionError where `implementation(a, b)` breaks a law."""


if __name__ == "__main__":
    from verdict import verdict

    authors_test(gemm)
    print("the author's test passes")
    verdict(my_property, gemm, ref.gemm)
