"""Split quantizers: each part as if it were alone, and together as one tensor."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strategies import qspecs, tensors

from refquant.autograd import Tensor, nnops
from refquant.errors import ShapeError
from refquant.quant.affine import QSpec, fake_quantize
from refquant.quant.observers import minmax
from refquant.quant.split import fake_quantize_split, observe_split

concatenated = tensors(shape=hnp.array_shapes(min_dims=1, max_dims=4, min_side=2, max_side=5))


@given(concatenated, st.data(), qspecs())
def test_parts_are_quantized_each_by_itself(x, data, spec):
    """split(x) = concat(fq(x[..., :c]), fq(x[..., c:])), with the quantizers of the parts."""
    c = data.draw(st.integers(1, x.shape[-1] - 1))
    got = fake_quantize_split(x, c, observe_split(x, c, lambda part: minmax(part, spec)))
    for part, same in ((x[..., :c], got[..., :c]), (x[..., c:], got[..., c:])):
        np.testing.assert_array_equal(same, fake_quantize(part, minmax(part, spec)))


@given(concatenated, st.data(), qspecs())
def test_equal_quantizers_are_no_split(x, data, spec):
    """q_0 = q_1 gives fq(x)."""
    c, q = data.draw(st.integers(1, x.shape[-1] - 1)), minmax(x, spec)
    np.testing.assert_array_equal(fake_quantize_split(x, c, (q, q)), fake_quantize(x, q))


@given(st.integers(1, 5), st.integers(0, 2**31))
def test_the_convolution_is_two_convolutions_added(c, seed):
    """conv(x^, w^) = conv(x^[..., :c], w^[..., :c]) + conv(x^[..., c:], w^[..., c:]): one scale for each sum."""
    rng = np.random.default_rng(seed)
    x, w = 30 * rng.standard_normal((2, 3, 3, 6)), rng.standard_normal((4, 1, 1, 6))
    x[..., c:] /= 40
    q_x = observe_split(x, c, lambda part: minmax(part, QSpec(8)))
    q_w = observe_split(w, c, lambda part: minmax(part, QSpec(4, axis=0)))
    x_hat, w_hat = (fake_quantize_split(a, c, q).astype(np.float64) for a, q in ((x, q_x), (w, q_w)))

    def conv(x, w):
        return nnops.conv2d(Tensor(x), Tensor(w), Tensor(np.zeros(4)), 1, (0, 0, 0, 0)).data

    parts = conv(x_hat[..., :c], w_hat[..., :c]) + conv(x_hat[..., c:], w_hat[..., c:])
    np.testing.assert_allclose(conv(x_hat, w_hat), parts, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("shape", "channels"), [((2, 4), 0), ((2, 4), 4), ((2, 4), -1), ((), 1), ((3, 1), 1)])
def test_both_parts_need_a_channel(shape, channels):
    with pytest.raises(ShapeError, match="both parts need a channel"):
        observe_split(np.zeros(shape), channels, lambda part: minmax(part, QSpec()))
    with pytest.raises(ShapeError, match="both parts need a channel"):
        fake_quantize_split(np.zeros(shape), channels, (minmax([1.0], QSpec()),) * 2)
