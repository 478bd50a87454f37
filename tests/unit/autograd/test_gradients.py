"""Every operation's vjp against finite differences, its corners by hand; the checker against wrong vjps."""

import numpy as np
import pytest
from op_examples import EXAMPLES, EXEMPT

from refquant.autograd import OPS, GradientError, Tensor, check_gradients, gradients, nnops, ops
from refquant.errors import RefquantError, ShapeError


def vjp(y, g):
    """The gradients that an operation's result hands to its parents."""
    return y._vjp(np.asarray(g, float))


def test_every_op_has_an_example():
    """registered = having examples + exempt for a stated reason."""
    assert {e.op for e in EXAMPLES} | set(EXEMPT) == set(OPS)
    assert all(EXEMPT.values())


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_gradient_is_the_finite_difference(example):
    """|a - n| <= 1e-6 max(|a|, |n|, 1e-4 Σ|c y| / m), along every axis and one random direction."""
    assert all(x.size <= 200 for x in example.inputs), "per-index checks are for small inputs"
    check_gradients(example, *example.inputs, name=str(example))


@pytest.mark.parametrize(
    "example, constant",
    [(e, i) for e in EXAMPLES if len(e.inputs) > 1 for i in range(len(e.inputs))],
    ids=str,
)
def test_a_constant_input_changes_no_other_gradient(example, constant):
    """df/dx_i does not depend on whether x_j is differentiated, too (conv2d takes another way then)."""
    leaves = [Tensor(x, requires_grad=True) for x in example.inputs]
    some = [Tensor(x, requires_grad=i != constant) for i, x in enumerate(example.inputs)]
    y = example(*leaves)
    c = np.random.default_rng(0).standard_normal(y.shape)
    want = gradients(ops.sum_all(ops.mul(y, c)), leaves)
    got = gradients(ops.sum_all(ops.mul(example(*some), c)), some)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        np.testing.assert_allclose(g, 0 * w if i == constant else w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_float32_stays_float32(example):
    """float32 in: value and gradients are float32, and close to the float64 ones."""
    leaves = [Tensor(x.astype(np.float32), requires_grad=True) for x in example.inputs]
    y = example(*leaves)
    assert y.dtype == np.float32
    y64 = example(*(Tensor(x, requires_grad=True) for x in example.inputs))
    np.testing.assert_allclose(y.data, y64.data, rtol=1e-4, atol=1e-4)
    for got, want in zip(y._vjp(np.ones_like(y.data)), y64._vjp(np.ones_like(y64.data)), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_mse():
    """mean((p - t)²), a composition."""
    rng = np.random.default_rng(0)
    check_gradients(ops.mse, rng.standard_normal((3, 4)), rng.standard_normal((3, 4)))


# ---------------------------------------------------------------- corners, where no finite difference helps


def test_relu_at_zero():
    """The derivative at 0, of either sign, is taken as 0."""
    (g,) = vjp(ops.relu(Tensor([-1.0, -0.0, 0.0, 2.0], requires_grad=True)), [5, 5, 5, 5])
    np.testing.assert_array_equal(g, [0, 0, 0, 5])


@pytest.mark.parametrize("window", [[[1, 1], [0, 0]], [[2, 1], [2, 2]], [[3, 3], [3, 3]], [[0, 1], [0, 0]]])
def test_max_pool_ties_share_the_gradient(window):
    """k elements that attain the maximum receive g / k each: nothing is lost, nothing counted twice."""
    x = np.array(window, float).reshape(1, 2, 2, 1)
    (dx,) = vjp(nnops.max_pool(Tensor(x, requires_grad=True)), [[[[6.0]]]])
    hit = x == x.max()
    np.testing.assert_array_equal(dx, 6 * hit / hit.sum())


def test_silu_overflows_to_its_limits():
    """x σ(x) -> 0 with slope 0 on the left, -> x with slope 1 on the right; no warning in float32."""
    x = Tensor(np.array([-1e4, -200, 200, 1e4], np.float32), requires_grad=True)
    y = ops.silu(x)
    np.testing.assert_array_equal(y.data, [0, 0, 200, 1e4])
    np.testing.assert_array_equal(vjp(y, np.ones(4))[0], [0, 0, 1, 1])


def test_attention_of_large_scores_is_finite():
    """softmax subtracts the maximum: scores of 1e8 select one value."""
    q = np.full((1, 2, 4), 1e4, np.float32)
    k = np.stack([q[0, 0], -q[0, 0]])[None]
    v = np.arange(8, dtype=np.float32).reshape(1, 2, 4)
    np.testing.assert_array_equal(nnops.attention(Tensor(q), Tensor(k), Tensor(v)).data, v[:, [0, 0]])


def test_dropout_keeps_the_mean():
    """E[y] = x: what is kept is divided by 1 - rate; 100,000 draws are within 5 standard deviations."""
    y = nnops.dropout(Tensor(np.ones(100_000)), 0.25, np.random.default_rng(0)).data
    np.testing.assert_allclose(np.unique(y), [0, 4 / 3])
    assert abs(y.mean() - 1) < 5 * np.sqrt(0.25 / 0.75 / y.size)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: nnops.conv2d(x, np.ones((2, 3, 3, 3)), np.ones(2)),  # 3 input channels, x has 4
        lambda x: nnops.conv2d(x, np.ones((2, 5, 5, 4)), np.ones(2)),  # 5x5 does not fit 2x3 with padding 1
        lambda x: nnops.conv2d(x, np.ones((2, 1, 1, 4)), np.ones(2), 1, (1, 0, 0, 0)),  # too wide a padding
        lambda x: nnops.conv2d(x, np.ones((2, 3, 3, 4)), np.ones(2), 1, (1, 1, 1, -1)),
        lambda x: nnops.linear(x, np.ones((2, 3)), np.ones(2)),
        lambda x: nnops.group_norm(x, np.ones(4), np.ones(4), 3),
        lambda x: nnops.max_pool(x),  # W is odd
    ],
)
def test_wrong_shapes_are_refused(call):
    """One ShapeError that names the shapes."""
    with pytest.raises(ShapeError, match=r"\d"):
        call(Tensor(np.ones((1, 2, 3, 4)), requires_grad=True))


# ---------------------------------------------------------------- the checker itself


def broken(wrong):
    """x², whose vjp is `wrong`."""

    def square(x):
        return Tensor(x.data**2, (x,), lambda g: (wrong(g, x.data),))

    return square


X = np.random.default_rng(3).standard_normal((3, 4))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda g, x: g * x,  # a factor
        lambda g, x: -2 * g * x,  # a sign
        lambda g, x: 2 * g * x * (1 + 3e-6),  # a little
        lambda g, x: 2 * g * x + 1e-4 * (x == x.max()),  # one element
        lambda g, x: 2 * g * x[::-1],  # an order
        lambda g, x: np.nan * x,
        lambda g, x: 0 * x,
    ],
)
@pytest.mark.parametrize("limit", [0, 200])
def test_wrong_vjps_are_caught(wrong, limit):
    """A wrong vjp is seen by the directional check alone, and by the per-index check."""
    with pytest.raises(GradientError, match="analytic .*, numeric "):
        check_gradients(broken(wrong), X, per_index_limit=limit)
    check_gradients(broken(lambda g, x: 2 * g * x), X, per_index_limit=limit)


def test_the_message_says_where():
    """Name, input number, index, and both values; the error is ours, and an assertion."""

    def product(a, b):
        return Tensor(a.data * b.data, (a, b), lambda g: (g * b.data, g * np.where([0, 0, 1], 9, a.data)))

    with pytest.raises(GradientError) as caught:
        check_gradients(product, [1.0, 2, 3], [4.0, 5, 6])
    message = str(caught.value)
    assert message.startswith("product: the gradient with respect to input 1 (3,) is wrong at index (2,): a")
    assert isinstance(caught.value, RefquantError) and isinstance(caught.value, AssertionError)


def test_inputs_are_left_as_they_were():
    """Tensors are moved by rebinding their data: afterwards it is the same array, even if f raises."""
    p = Tensor(np.arange(3.0), requires_grad=True)
    before = p.data
    before.flags.writeable = False
    check_gradients(ops.square, p)
    assert p.data is before
    calls = []

    def fails_later(x):
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError
        return ops.square(x)

    with pytest.raises(ZeroDivisionError):
        check_gradients(fails_later, p)
    assert p.data is before


@pytest.mark.parametrize("tensor", [Tensor(np.ones(2)), Tensor(np.ones(2, np.float32), requires_grad=True)])
def test_only_float64_leaves_are_checked(tensor):
    with pytest.raises(ShapeError, match="input 0"):
        check_gradients(ops.square, tensor)
