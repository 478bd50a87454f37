"""What must hold between results of a kernel, without asking the reference: one line of mathematics each."""

import numpy as np
from asserts import assert_same_integers
from guards import every_kernel
from hypothesis import given
from hypothesis import strategies as st
from strategies import convolutions, noise

from refquant import kernels, ref
from refquant.kernels import pack_weights

int8_convolutions = convolutions(bits=(8,))


def zero_points_of(case):
    """One weight zero point for each output."""
    return np.broadcast_to(case.w_zero_point, len(case.w)).astype(int)


@given(convolutions(windows=((1, 1),), paddings=(0,)))
def test_a_1x1_convolution_is_a_matrix_product(case):
    """conv(x, w) = gemm(pixels of x, w), for stride 1."""
    pixels = case.x.reshape(int(np.prod(case.x.shape[:3])), case.x.shape[3])
    options = case.options | {"stride": 1}
    packed = pack_weights(case.w, bits=case.bits, zero_point=case.w_zero_point)
    matrix = pack_weights(case.w[:, 0, 0], bits=case.bits, zero_point=case.w_zero_point)
    for isa in every_kernel(ref=False):
        got = kernels.conv2d(case.x, packed, **options)
        want = kernels.gemm(pixels, matrix, a_zero_point=case.options["x_zero_point"])
        assert_same_integers(got, want.reshape(got.shape), isa=isa)


@given(int8_convolutions, st.integers(0, 130))
def test_channels_split_and_added(case, cut):
    """conv over all channels = conv over the first ones + conv over the others."""
    cut = min(cut, case.x.shape[3])
    for isa in every_kernel(ref=False):
        parts = [
            kernels.conv2d(case.x[..., part], case.w[..., part], **case.all_options)
            for part in (slice(cut), slice(cut, None))
        ]
        assert_same_integers(sum(parts), kernels.conv2d(case.x, case.w, **case.all_options), isa=isa)


@given(int8_convolutions, st.integers(0, 2**32 - 1))
def test_permutations(case, seed):
    """conv(x[n, :, :, c], w[o, :, :, c], zw[o]) = conv(x, w, zw)[n, :, :, o] for permutations n, c, o."""
    zw, rng = zero_points_of(case), np.random.default_rng(seed)
    images, channels, outputs = (rng.permutation(size) for size in (len(case.x), case.x.shape[3], len(case.w)))
    x, w = case.x[images][..., channels], case.w[outputs][..., channels]
    for isa in every_kernel(ref=False):
        got = kernels.conv2d(x, w, w_zero_point=zw[outputs], **case.options)
        want = kernels.conv2d(case.x, case.w, w_zero_point=zw, **case.options)
        assert_same_integers(got, want[images][..., outputs], isa=isa)


@given(int8_convolutions)
def test_the_border_is_pixels_that_mean_zero(case):
    """conv(x, padding = p) = conv(x surrounded by p pixels of the code zx, padding = 0)."""
    options = case.all_options
    padding = options.pop("padding")
    surrounded = ref.pad(case.x, padding, options["x_zero_point"])
    for isa in every_kernel(ref=False):
        got = kernels.conv2d(case.x, case.w, padding=padding, **options)
        assert_same_integers(got, kernels.conv2d(surrounded, case.w, **options), isa=isa)


@given(int8_convolutions)
def test_stride_leaves_pixels_out(case):
    """conv(stride = s) = conv(stride = 1)[:, ::s, ::s]."""
    s = case.options["stride"]
    for isa in every_kernel(ref=False):
        want = kernels.conv2d(case.x, case.w, **case.all_options | {"stride": 1})[:, ::s, ::s]
        assert_same_integers(kernels.conv2d(case.x, case.w, **case.all_options), want, isa=isa)


@given(int8_convolutions)
def test_an_image_of_zero_point_gives_zero(case):
    """x = zx everywhere gives 0, and so does w = zw."""
    nothing = np.full_like(case.x, case.options["x_zero_point"])
    no_weights = np.broadcast_to(zero_points_of(case)[:, None, None, None], case.w.shape).astype(np.int8)
    for isa in every_kernel(ref=False):
        for x, w in ((nothing, case.w), (case.x, no_weights)):
            got = kernels.conv2d(x, w, **case.all_options)
            assert_same_integers(got, np.zeros_like(got), isa=isa)


@given(int8_convolutions)
def test_the_zero_point_of_the_weights_counts_windows(case):
    """conv(x, w, zw) = conv(x, w, 0) - zw conv(x, ones): the sum over the window is that of ones."""
    ones = np.ones((1, *case.w.shape[1:]), np.int8)
    for isa in every_kernel(ref=False):
        windows = kernels.conv2d(case.x, ones, **case.options)
        plain = kernels.conv2d(case.x, case.w, **case.options)
        got = kernels.conv2d(case.x, case.w, **case.all_options)
        assert_same_integers(got, plain - windows * zero_points_of(case).astype(np.int32), isa=isa)


@st.composite
def two_factors(draw):
    m, n, k = draw(st.integers(1, 27)), draw(st.integers(1, 40)), draw(st.integers(0, 70))
    a, d = (draw(noise(np.uint8, (m, k), 0, 127)) for _ in range(2))
    return a, d, draw(noise(np.int8, (n, k)))


@given(two_factors())
def test_the_product_is_linear_in_a(case):
    """(a + d) b = a b + d b, and (a + d - d) b = a b where d is the zero point."""
    a, d, b = case
    for isa in every_kernel(ref=False):
        both = kernels.gemm(a + d, b)
        assert_same_integers(both, kernels.gemm(a, b) + kernels.gemm(d, b), isa=isa)
        assert_same_integers(kernels.gemm(a + np.uint8(100), b, a_zero_point=100), kernels.gemm(a, b), isa=isa)
