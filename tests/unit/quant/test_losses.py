"""Reconstruction losses against the authors' formulas written for NCHW in float64; layouts, corners, mutants."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refquant.autograd import Tensor, gradients, ops
from refquant.errors import RangeError, ShapeError
from refquant.quant import losses

SHAPES = [(2, 3, 4, 5), (1, 1, 1, 1), (6, 7), (3, 1), (2, 4, 3)]
LOSSES = ["reconstruction_loss", "fisher_diag", "fisher_full"]


def channels_second(x):
    """(N, ..., C) -> (N, C, ...): the authors' layout of images and features."""
    return np.moveaxis(x.astype(np.float64), -1, 1)


def released(name, y, target, grad, p=2):
    """The released formulas, for arrays (N, C, ...) in float64: sum over axis 1, then the mean of the rest."""
    e = np.abs(y - target)
    if name == "reconstruction_loss":
        return (e**p).sum(axis=1).mean()
    if name == "fisher_diag":
        return (e**2 * grad**2).sum(axis=1).mean()
    product = e * np.abs(grad)
    dot = product.reshape(len(y), -1).sum(axis=1).reshape(-1, *[1] * (y.ndim - 1))
    return (dot * product).mean() / 100


def evaluate(name, y, target, grad, **options):
    arguments = (y, target) if name == "reconstruction_loss" else (y, target, grad)
    return getattr(losses, name)(*arguments, **options)


def drawn(shape, seed):
    return np.random.default_rng(seed).standard_normal((3, *shape)).astype(np.float32)


# ---------------------------------------------------------------- laws


def agrees_with_the_released_loss(shape, seed):
    """Images (N, H, W, C) and features (N, C): the released value of the same numbers in (N, C, H, W)."""
    arrays = drawn(shape, seed)
    for name in LOSSES:
        got = evaluate(name, *arrays)
        assert got.shape == () and got.dtype == np.float32
        np.testing.assert_allclose(got.data, released(name, *map(channels_second, arrays)), rtol=1e-5)
    for p in (1, 2.4, 3):
        got = losses.reconstruction_loss(*arrays[:2], p)
        want = released("reconstruction_loss", *map(channels_second, arrays), p)
        np.testing.assert_allclose(got.data, want, rtol=1e-5)


def slope_is_the_formula(shape, seed):
    """dL/dy by hand, with e = y - target: 2e, p |e|^(p-1) sign e, 2 e g², 2 D_b |g| sign e, each over its count."""
    y, target, grad = drawn(shape, seed).astype(np.float64)
    e, weight = y - target, np.abs(grad)
    places = y.size / shape[-1]
    dot = (np.abs(e) * weight).sum(axis=tuple(range(1, e.ndim)), keepdims=True)
    want = {
        "reconstruction_loss": 2 * e / places,
        "fisher_diag": 2 * e * grad**2 / places,
        "fisher_full": 2 * dot * weight * np.sign(e) / (100 * y.size),
    }
    for name in LOSSES:
        leaf = Tensor(y, requires_grad=True)
        (got,) = gradients(evaluate(name, leaf, target, grad), [leaf])
        np.testing.assert_allclose(got, want[name], rtol=1e-12)
    leaf = Tensor(y, requires_grad=True)
    (got,) = gradients(losses.reconstruction_loss(leaf, target, 2.4), [leaf])
    np.testing.assert_allclose(got, 2.4 * np.abs(e) ** 1.4 * np.sign(e) / places, rtol=1e-12)


LAWS = [agrees_with_the_released_loss, slope_is_the_formula]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 2**32 - 1))
def test_law(law, shape, seed):
    law(shape, seed)


# ---------------------------------------------------------------- by hand


def test_values_by_hand():
    """Two places of two channels, e = (1, -2), (0, 3): p = 2 gives (5 + 9) / 2; p = 1 gives (3 + 3) / 2.

    With g = (1, 1), (5, -2): e² g² sums to 5 and 36; |e g| = 1, 2, 0, 6, so D = 9 and D² / 400.
    """
    e = np.array([[[1.0, -2], [0, 3]]])
    g = np.array([[[1.0, 1], [5, -2]]])
    zero = np.zeros_like(e)
    assert losses.reconstruction_loss(Tensor(e), zero).item() == 7
    assert losses.reconstruction_loss(Tensor(e), zero, 1).item() == 3
    assert losses.fisher_diag(Tensor(e), zero, g).item() == 20.5
    assert losses.fisher_full(Tensor(e), zero, g).item() == pytest.approx(81 / 400, rel=1e-15)


def test_of_tokens_the_released_code_sums_over_the_other_axis():
    """(N, tokens, C): their loss is ours times tokens / C, because they divide by N C and we by N tokens."""
    y, target, _ = drawn((2, 12, 3), 0).astype(np.float64)
    theirs = (np.abs(y - target) ** 2).sum(axis=1).mean()
    np.testing.assert_allclose(theirs, losses.reconstruction_loss(Tensor(y), target).item() * 12 / 3, rtol=1e-12)


def test_fisher_of_equal_gradients_is_the_plain_loss():
    """g = 1 everywhere: Σ e² g² = Σ e²; the sign of g never counts."""
    y, target, grad = drawn((2, 3, 3, 4), 1)
    plain = losses.reconstruction_loss(Tensor(y), target).item()
    assert losses.fisher_diag(Tensor(y), target, np.ones_like(y)).item() == plain
    for loss in (losses.fisher_diag, losses.fisher_full):
        assert loss(Tensor(y), target, grad).item() == loss(Tensor(y), target, -grad).item()


@pytest.mark.parametrize("p", [1, 1.5, 2, 2.4])
def test_no_error_no_slope(p):
    """At e = 0 value and slope are 0, for the corner of p = 1 too."""
    y = Tensor(np.ones((2, 3), np.float32), requires_grad=True)
    loss = losses.reconstruction_loss(y, y.data, p)
    assert loss.item() == 0
    np.testing.assert_array_equal(gradients(loss, [y])[0], 0)


@pytest.mark.parametrize("name", LOSSES)
def test_target_and_gradient_are_constants(name):
    """Given as Tensors that want gradients, they get none."""
    leaves = [Tensor(a, requires_grad=True) for a in drawn((2, 3), 2)]
    dy, dtarget, dgrad = gradients(evaluate(name, *leaves), leaves)
    assert dy.any() and not dtarget.any() and not dgrad.any()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("target", [(2, 3, 4), (2, 4, 3, 5), (1, 3, 4, 5), ()])
def test_nothing_is_broadcast(name, target):
    y = np.ones((2, 3, 4, 5), np.float32)
    with pytest.raises(ShapeError, match="target has shape"):
        evaluate(name, Tensor(y), np.ones(target, np.float32), y)
    if name != "reconstruction_loss":
        with pytest.raises(ShapeError, match="grad has shape"):
            evaluate(name, Tensor(y), y, np.ones(target, np.float32))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (2, 0)])
def test_a_mean_over_nothing_is_refused(name, shape):
    empty = np.ones(shape, np.float32)
    with pytest.raises(ShapeError, match=r"\(N, ..., C\)"):
        evaluate(name, Tensor(empty), empty, empty)


@pytest.mark.parametrize("p", [0.5, 0, -1, np.nan, np.inf])
def test_powers_below_one_are_refused(p):
    with pytest.raises(RangeError, match="p="):
        losses.reconstruction_loss(Tensor(np.ones((2, 3))), np.zeros((2, 3)), p)


# ---------------------------------------------------------------- mutants

plain, diag, full = losses.reconstruction_loss, losses.fisher_diag, losses.fisher_full


def mean_over_channels_too(y, target, p=2):
    return ops.scale(plain(y, target, p), 1 / y.shape[-1])


def sum_over_axis_one(y, target, p=2):
    return ops.scale(plain(y, target, p), y.shape[1] / y.shape[-1])


def square_whatever_p(y, target, p=2):
    return plain(y, target)


def sign_lost_in_the_slope(y, target, p=2):
    loss = plain(y, target, p)
    return Tensor(loss.data, (y,), lambda g: (np.abs(loss._vjp(g)[0]),))


def gradient_not_squared(y, target, grad):
    return diag(y, target, np.sqrt(np.abs(grad)))


def one_product_for_the_batch(y, target, grad):
    loss = full(y, target, grad)
    e = (y.data if isinstance(y, Tensor) else y) - target
    return Tensor(np.square(np.abs(e * grad).sum()) / (100 * e.size), (y,) if isinstance(y, Tensor) else (), loss._vjp)


def product_taken_for_a_constant(y, target, grad):
    loss = full(y, target, grad)
    return Tensor(loss.data, (y,), lambda g: (loss._vjp(g)[0] / 2,))


MUTANTS = [
    ("reconstruction_loss", mean_over_channels_too, agrees_with_the_released_loss),
    ("reconstruction_loss", sum_over_axis_one, agrees_with_the_released_loss),
    ("reconstruction_loss", square_whatever_p, agrees_with_the_released_loss),
    ("reconstruction_loss", sign_lost_in_the_slope, slope_is_the_formula),
    ("fisher_diag", gradient_not_squared, agrees_with_the_released_loss),
    ("fisher_full", one_product_for_the_batch, agrees_with_the_released_loss),
    ("fisher_full", product_taken_for_a_constant, slope_is_the_formula),
]


@pytest.mark.parametrize(
    ("name", "mutant", "law"), [pytest.param(*m, id=f"{m[1].__name__}-{m[2].__name__}") for m in MUTANTS]
)
def test_law_kills_mutant(name, mutant, law, monkeypatch):
    monkeypatch.setattr(losses, name, mutant)
    with pytest.raises(AssertionError):
        law((2, 3, 4, 5), 0)
