"""The fake-quantization op: forward equals the integer round trip bit for bit, backward equals its surrogate."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refquant.autograd import Tensor, gradients, ops
from refquant.errors import ShapeError
from refquant.quant.affine import QParams, QSpec, fake_quantize
from refquant.quant.fakequant import fake_quant

FLOATS = st.floats(-100, 100, width=32)
SPECS = st.builds(QSpec, bits=st.integers(2, 8), signed=st.booleans())


@st.composite
def qparams(draw):
    spec = draw(SPECS)
    scale = np.float32(draw(st.floats(2**-12, 4, width=32)))
    return QParams(scale, draw(st.integers(spec.qmin, spec.qmax)), spec)


@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=4, max_side=6), elements=FLOATS), qparams())
def test_forward_is_dequantize_of_quantize(x, q):
    """fake_quant(x) = s (clamp(round(x/s) + z) - z), the very bits of the round trip through bytes."""
    np.testing.assert_array_equal(fake_quant(Tensor(x), q).data, fake_quantize(x, q))


@given(hnp.arrays(np.float32, st.integers(1, 20), elements=FLOATS), qparams())
def test_backward_is_the_derivative_of_the_clip(x, q):
    """dx^/dx = 1 where qmin <= round(x/s) + z <= qmax, both ends inside, else 0; exactly."""
    t = Tensor(x, requires_grad=True)
    weight = np.arange(1, len(x) + 1, dtype=np.float32)
    (g,) = gradients(ops.sum_all(ops.mul(fake_quant(t, q), weight)), [t])
    code = np.rint(x / q.scale) + q.zero_point
    np.testing.assert_array_equal(g, weight * ((code >= q.spec.qmin) & (code <= q.spec.qmax)))


def test_ends_count_as_inside():
    """Codes 0 and 15 of a 4-bit quantizer pass the gradient; -1 and 16 do not."""
    q = QParams(np.float32(1), 0, QSpec(4))
    t = Tensor(np.array([-1, -0.5, 0, 15, 15.5, 16], np.float32), requires_grad=True)
    (g,) = gradients(ops.sum_all(fake_quant(t, q)), [t])
    np.testing.assert_array_equal(g, [0, 1, 1, 1, 0, 0])


def test_per_channel_is_refused():
    """One scale for the tensor: an integer product needs one input scale per output."""
    q = QParams(np.ones(3, np.float32), np.zeros(3, np.int32), QSpec(axis=0))
    with pytest.raises(ShapeError, match="axis=0"):
        fake_quant(Tensor(np.zeros((3, 2), np.float32)), q)
