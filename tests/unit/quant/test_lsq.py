"""The learned step: forward is the quantizer, backward is rounding taken for the addition of a constant; mutants."""

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from strategies import affine_cases

from refquant import intmath
from refquant.autograd import Tensor, check_gradients, gradients, ops
from refquant.errors import RangeError, ShapeError
from refquant.nn.optim import Adam
from refquant.quant import lsq as module
from refquant.quant.affine import QParams, QSpec, fake_quantize


def run(x, q, g=None):
    """y, dL/dx and dL/ds of L = <g, y> for one case."""
    g = np.arange(1, x.size + 1, dtype=np.float32).reshape(x.shape) if g is None else g
    leaves = Tensor(x, requires_grad=True), Tensor(q.scale, requires_grad=True)
    y = module.lsq(*leaves, q.zero_point, q.spec)
    return y, *gradients(ops.sum_all(ops.mul(y, g)), leaves)


# ---------------------------------------------------------------- laws


def forward_is_the_quantizer(case):
    """y = s (clamp(round_half_even(x/s) + z) - z), bit for bit, in float32."""
    x, q = case
    with np.errstate(over="ignore"):
        codes = np.clip(np.rint(x / q.scale) + q.zero_point.astype(np.float32), q.spec.qmin, q.spec.qmax)
        want = (codes - q.zero_point.astype(np.float32)) * q.scale
        y, *_ = run(x, q)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y.data, want)
    np.testing.assert_array_equal(y.data, fake_quantize(x, q))


def backward_is_the_surrogate(case):
    """dy/dx = 1 inside, else 0; dy/ds = round(x/s) - x/s inside, else (the end it is clipped to) - z. Exactly.

    Inside: qmin <= round(x/s) + z <= qmax. The sum over elements is taken one element at a time.
    """
    x, q = case
    _, dx, ds = run(x, q)
    with np.errstate(over="ignore"):
        v = x / q.scale
    code = np.rint(v) + q.zero_point
    inside = (q.spec.qmin <= code) & (code <= q.spec.qmax)
    np.testing.assert_array_equal(dx, np.arange(1, x.size + 1).reshape(x.shape) * inside)
    end = np.where(code < q.spec.qmin, q.spec.qmin, q.spec.qmax) - q.zero_point
    with np.errstate(invalid="ignore"):  # inf - inf, where clipped
        slope = np.where(inside, np.rint(v) - v, end).astype(np.float32)
    assert ds.shape == () and ds.dtype == np.float32
    for index in np.ndindex(x.shape):
        g = np.zeros_like(x)
        g[index] = 3
        np.testing.assert_array_equal(run(x, q, g)[2], 3 * slope[index])


LAWS = [forward_is_the_quantizer, backward_is_the_surrogate]
CASES = affine_cases(per_channel=(False,))


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law):
    given(CASES)(law)()


# ---------------------------------------------------------------- by hand


def test_the_surrogate_is_a_derivative():
    """c = round(x/s) - x/s held fixed, s (clip(x/s + c + z) - z) has these gradients, by finite differences."""
    x = np.array([-3.0, -1.9, -0.6, 0.2, 0.7, 1.4, 4.4, 6.0])  # codes -3, -1, 2, 3, 4, 6, 12, 15: on no corner
    s, z, qmin, qmax = 0.5, 3, 0, 7
    c = np.rint(x / s) - x / s
    ours = module.lsq(Tensor(x, requires_grad=True), Tensor(s, requires_grad=True), z, QSpec(3))

    def surrogate(x_t, s_t):
        y = s_t.data * (np.clip(x_t.data / s_t.data + c + z, qmin, qmax) - z)
        return Tensor(y, (x_t, s_t), ours._vjp)

    check_gradients(surrogate, x, s)


def test_ends_count_as_inside():
    """Codes 0 and 15 of 4 bits pass the gradient; x/s = 15.3 has slope -0.3, x/s = 15.7 is clipped, slope 15."""
    x = np.array([-1, -0.4, 0, 15, 15.25, 15.75, 99], np.float32)
    q = QParams(1.0, 0, QSpec(4))
    np.testing.assert_array_equal(run(x, q)[1], [0, 2, 3, 4, 5, 0, 0])
    each = [run(x, q, np.eye(7, dtype=np.float32)[i])[2] for i in range(7)]
    np.testing.assert_allclose(each, [0, 0.4, 0, 0, -0.25, 15, 15], rtol=1e-6)


def test_infinite_values_are_clipped():
    """x = ±inf saturates, with slopes qmin - z and qmax - z: no NaN from inf - inf."""
    q = QParams(0.5, 3, QSpec(4))
    y, dx, ds = run(np.array([-np.inf, np.inf], np.float32), q, np.ones(2, np.float32))
    np.testing.assert_array_equal(y.data, [-1.5, 6])
    np.testing.assert_array_equal(dx, 0)
    assert ds == -3 + 12


def test_nan_passes_through():
    y = module.lsq(Tensor(np.array([np.nan, 1], np.float32)), Tensor(np.float32(1)), 0, QSpec(4))
    np.testing.assert_array_equal(y.data, [np.nan, 1])


def test_constant_step_is_fake_quantization_in_float64_too():
    x, s = np.linspace(-3, 3, 50), 0.3
    y = module.lsq(Tensor(x), Tensor(np.float64(s)), 4, QSpec(3))
    np.testing.assert_array_equal(y.data, s * (np.clip(np.rint(x / s) + 4, 0, 7) - 4))


def test_a_step_that_is_too_large_is_learned_back():
    """From 3 times the step of the best 4-bit grid, 300 steps of Adam reach 1.1 times its squared error or less."""
    x = np.random.default_rng(0).standard_normal(2000).astype(np.float32)

    def error(step):
        return float(np.square(fake_quantize(x, QParams(step, 8, QSpec(4))) - x).mean())

    best = min(error(step) for step in np.linspace(0.1, 0.8, 200))
    step, adam = np.full(1, 1.0, np.float32), Adam.zeros(1)
    assert error(step[0]) > 5 * best
    for k in range(300):
        s = Tensor(step[0].copy(), requires_grad=True)
        (g,) = gradients(ops.mse(module.lsq(Tensor(x), s, 8, QSpec(4)), x), [s])
        adam.update(step, g.reshape(1).copy(), 5e-3, k)
    assert error(step[0]) < 1.1 * best


# ---------------------------------------------------------------- bad input

X = np.ones(3, np.float32)


@pytest.mark.parametrize("step", [0.0, -0.1, np.nan])
def test_a_step_that_left_the_positive_numbers_is_refused(step):
    with pytest.raises(RangeError, match="lower its learning rate"):
        module.lsq(Tensor(X), Tensor(np.float32(step)), 0, QSpec(4))


@pytest.mark.parametrize(
    ("step", "zero_point", "spec"),
    [(np.inf, 0, QSpec(4)), (1e-40, 0, QSpec(4)), (1, 0.5, QSpec(4)), (1, 3, QSpec(4, symmetric=True))],
)
def test_pairs_that_qparams_refuses_are_refused(step, zero_point, spec):
    with pytest.raises(RangeError):
        module.lsq(Tensor(X), Tensor(np.float32(step)), zero_point, spec)


@pytest.mark.parametrize(
    ("scale", "spec"), [(np.float32([1, 1, 1]), QSpec(4, axis=0)), (np.float32([1]), QSpec(4)), (1.0, QSpec(4, axis=0))]
)
def test_one_step_for_the_tensor(scale, spec):
    with pytest.raises(ShapeError, match="one learned step"):
        module.lsq(Tensor(X), Tensor(scale), 0, spec)


# ---------------------------------------------------------------- mutants

lsq = module.lsq


def half_up(x):
    return np.floor(x + np.asarray(x).dtype.type(0.5))


def with_slopes(slopes):
    """The right value with the slopes dy/dx and dy/ds that `slopes(v, code, zero_point, spec)` returns."""

    def mutant(x, scale, zero_point, spec):
        v = x.data / scale.data
        zero = np.asarray(zero_point.data if isinstance(zero_point, Tensor) else zero_point).astype(np.float32)
        dx, ds = (np.asarray(d, np.float32) for d in slopes(v, np.rint(v) + zero, zero, spec))
        y = lsq(x, scale, zero_point, spec)
        return Tensor(y.data, (x, scale), lambda g: (g * dx, (g * ds).sum()))

    return mutant


def clamp_ignored(v, code, zero, spec):
    return np.ones_like(v), np.rint(v) - v


def ends_are_outside(v, code, zero, spec):
    inside = (code > spec.qmin) & (code < spec.qmax)
    return inside, np.where(inside, np.rint(v) - v, np.clip(code, spec.qmin, spec.qmax) - zero)


def inside_by_the_real_value(v, code, zero, spec):
    inside = (v + zero >= spec.qmin) & (v + zero <= spec.qmax)
    return inside, np.where(inside, np.rint(v) - v, np.clip(code, spec.qmin, spec.qmax) - zero)


def clipped_values_have_no_say(v, code, zero, spec):
    inside = (code >= spec.qmin) & (code <= spec.qmax)
    return inside, np.where(inside, np.rint(v) - v, 0)


def zero_point_forgotten(v, code, zero, spec):
    inside = (code >= spec.qmin) & (code <= spec.qmax)
    return inside, np.where(inside, np.rint(v) - v, np.clip(code, spec.qmin, spec.qmax))


def derivative_of_the_staircase(v, code, zero, spec):
    inside = (code >= spec.qmin) & (code <= spec.qmax)
    return inside, np.clip(code, spec.qmin, spec.qmax) - zero


def with_the_papers_factor(v, code, zero, spec):
    inside = (code >= spec.qmin) & (code <= spec.qmax)
    slope = np.where(inside, np.rint(v) - v, np.clip(code, spec.qmin, spec.qmax) - zero)
    return inside, slope / np.sqrt(v.size * (spec.qmax - spec.qmin))


SLOPES = [
    clamp_ignored,
    ends_are_outside,
    inside_by_the_real_value,
    clipped_values_have_no_say,
    zero_point_forgotten,
    derivative_of_the_staircase,
    with_the_papers_factor,
]


def killed(law):
    search = settings(max_examples=1000, derandomize=True, database=None, phases=[Phase.generate])(given(CASES)(law))
    with pytest.raises(AssertionError):
        search()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # mutants do not silence overflow
@pytest.mark.parametrize("slopes", SLOPES, ids=lambda s: s.__name__)
def test_wrong_slopes_are_caught(slopes, monkeypatch):
    monkeypatch.setattr(module, "lsq", with_slopes(slopes))
    killed(backward_is_the_surrogate)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_rounding_half_up_is_caught(law, monkeypatch):
    monkeypatch.setattr(intmath, "round_half_even", half_up)
    killed(law)


def test_zero_point_before_rounding_is_caught(monkeypatch):
    def zero_point_first(x, scale, zero_point, qmin, qmax):
        return np.clip(np.rint(x / scale + zero_point.astype(x.dtype)), qmin, qmax)

    monkeypatch.setattr(intmath, "grid_codes", zero_point_first)
    killed(forward_is_the_quantizer)
