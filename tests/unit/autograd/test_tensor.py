"""The tape: what is recorded, in which order it is walked, and that nothing on it is changed."""

import threading

import numpy as np
import pytest
from op_examples import EXAMPLES

from refquant.autograd import Tensor, as_tensor, gradients, is_recording, no_grad, ops
from refquant.errors import RefquantError, ShapeError


def leaf(values):
    return Tensor(np.array(values, float), requires_grad=True)


# ---------------------------------------------------------------- recording


def test_no_grad_builds_no_graph():
    """Within no_grad a result has no parents and no vjp; the blocks nest, and an exception ends them."""
    x = leaf([1, 2])
    with no_grad():
        with no_grad():
            pass
        y = ops.silu(ops.add(x, x))
        assert not is_recording()
    assert y._parents == () and y._vjp is None and not y.requires_grad
    with pytest.raises(ZeroDivisionError), no_grad():
        raise ZeroDivisionError
    assert is_recording() and ops.silu(x).requires_grad


def test_constants_build_no_graph():
    """An operation on arrays only is arithmetic."""
    y = ops.mul(np.ones(2), Tensor(np.ones(2)))
    assert y._parents == () and y._vjp is None and not y.requires_grad


def test_no_grad_is_per_thread():
    """A thread that is started inside another thread's no_grad records."""
    seen = {}

    def other():
        seen["recording"] = is_recording()
        seen["grad"] = gradients(ops.sum_all(ops.square(x)), [x])[0]

    x = leaf([3.0])
    with no_grad():
        worker = threading.Thread(target=other)
        worker.start()
        worker.join()
        assert not is_recording()
    assert seen["recording"] and seen["grad"] == 6


def test_as_tensor():
    """A Tensor is returned as it is, anything else becomes a constant."""
    x = leaf([1.0])
    assert as_tensor(x) is x
    assert not as_tensor([1.0]).requires_grad


# ---------------------------------------------------------------- the chain rule


def test_shared_subexpressions():
    """L = Σ (x y + x)² with u = x y used through two paths: dL/dx = 2 (x y + x)(y + 1)."""
    x, y = leaf([1.0, -2, 3]), leaf([0.5, 4, -1])
    s = ops.add(ops.mul(x, y), x)
    dx, dy = gradients(ops.sum_all(ops.mul(s, s)), [x, y])  # s is both factors
    np.testing.assert_allclose(dx, 2 * s.data * (y.data + 1), rtol=1e-15)
    np.testing.assert_allclose(dy, 2 * s.data * x.data, rtol=1e-15)


def test_a_long_and_a_short_path_meet():
    """L = Σ (e^(x²) + x): x must wait for its longest path; dL/dx = 2 x e^(x²) + 1."""
    x = leaf([0.3, -1])
    (dx,) = gradients(ops.sum_all(ops.add(x, ops.exp(ops.square(x)))), [x])
    np.testing.assert_allclose(dx, 2 * x.data * np.exp(x.data**2) + 1, rtol=1e-15)


def test_doubling_sixty_times_visits_each_node_once():
    """x -> x + x, 60 times: 2^60 paths, 60 nodes, dL/dx = 2^60."""
    x = y = leaf([1.0])
    for _ in range(60):
        y = ops.add(y, y)
    assert gradients(ops.sum_all(y), [x])[0] == 2.0**60


def test_deep_graph_does_not_recurse():
    """20,000 nodes in a chain, x -> x + b: dL/dx = 1, dL/db = 20,000."""
    x, b = leaf([1.0]), leaf([0.5])
    y = x
    for _ in range(20_000):
        y = ops.add(y, b)
    dx, db = gradients(ops.sum_all(y), [x, b])
    assert dx == 1 and db == 20_000
    del y  # releasing the chain does not recurse, either


def test_intermediate_tensors_and_the_loss_itself():
    """u = x², L = Σ u e: dL/du = e, dL/dL = 1; asking twice gives twice."""
    x = leaf([1.0, 2])
    u = ops.square(x)
    loss = ops.sum_all(ops.scale(u, 3.0))
    du, dx, dl, du2 = gradients(loss, [u, x, loss, u])
    np.testing.assert_array_equal(du, [3, 3])
    np.testing.assert_array_equal(dx, [6, 12])
    np.testing.assert_array_equal(du2, du)
    assert dl == 1


def test_what_the_loss_does_not_see_has_gradient_zero():
    """A leaf without a path to the loss: zeros of its shape and dtype."""
    x, other = leaf([1.0]), Tensor(np.ones((2, 3), np.float32), requires_grad=True)
    g = gradients(ops.sum_all(x), [other])[0]
    assert g.shape == (2, 3) and g.dtype == np.float32 and not g.any()


def test_gradients_do_not_accumulate():
    """gradients() stores nothing: the second call returns the same."""
    x = leaf([1.0, 2])
    loss = ops.sum_all(ops.exp(x))
    np.testing.assert_array_equal(gradients(loss, [x]), gradients(loss, [x]))
    assert set(Tensor.__slots__) == {"_parents", "_vjp", "data", "requires_grad"}


def test_an_operation_called_twice_keeps_two_states():
    """f(x1) + f(x2), differentiated in either order: the state lives in the graph, not in the operation."""
    x1, x2 = leaf([1.0, 2]), leaf([-3.0, 0.5])
    y1, y2 = ops.softmax(x1), ops.softmax(x2)
    c = np.array([1.0, 5])
    (alone,) = gradients(ops.sum_all(ops.mul(ops.softmax(x1), c)), [x1])
    both = gradients(ops.sum_all(ops.mul(ops.add(y1, y2), c)), [x1, x2])
    np.testing.assert_array_equal(both[0], alone)


# ---------------------------------------------------------------- errors


def test_loss_must_be_a_scalar():
    with pytest.raises(ShapeError, match=r"\(2,\)"):
        gradients(ops.square(leaf([1, 2])), [leaf([1])])


def test_loss_must_have_been_recorded():
    x = leaf([1.0])
    with no_grad():
        loss = ops.sum_all(x)
    for not_recorded in (loss, ops.sum_all(Tensor([1.0]))):
        with pytest.raises(RefquantError, match="no_grad"):
            gradients(not_recorded, [x])


# ---------------------------------------------------------------- every operation: pure, blind to layout


def frozen(x):
    """A copy that cannot be written to."""
    x = x.copy()
    x.flags.writeable = False
    return x


def strided(x):
    """The same values, every second element of a wider array, axes in reverse order in memory."""
    if x.ndim == 0:
        return x
    wide = np.full((*x.shape[::-1], 2), np.nan)
    view = wide[..., 0].T
    view[...] = x
    return view


def run(example, prepare):
    """Value and vjp of one example, inputs and incoming gradient made by `prepare`."""
    y = example(*(Tensor(prepare(x), requires_grad=True) for x in example.inputs))
    g = np.random.default_rng(5).standard_normal(y.shape)
    return y, prepare(g)


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_no_operation_changes_its_arrays(example):
    """Inputs, value and incoming gradient are read-only here; the vjp gives the same bits a second time."""
    y, g = run(example, frozen)
    y.data.flags.writeable = False
    first = [d.copy() for d in y._vjp(g)]
    for a, b, x in zip(first, y._vjp(g), example.inputs, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.shape == x.shape


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_memory_layout_does_not_matter(example):
    """Strided, reversed-order inputs and gradients: the same numbers up to BLAS' rounding."""
    y, g = run(example, np.copy)
    y2, g2 = run(example, strided)
    assert not any(t.data.flags.c_contiguous for t in y2._parents if t.data.size > 1)
    np.testing.assert_allclose(y2.data, y.data, rtol=1e-12, atol=1e-13)
    for a, b in zip(y._vjp(g), y2._vjp(g2), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------- threads


def test_two_threads_share_parameters():
    """Each thread differentiates its own loss with respect to the same w, 50 times: 2 xᵀ (x w)."""
    w = leaf(np.random.default_rng(0).standard_normal((8, 8)))
    inputs = np.random.default_rng(1).standard_normal((2, 8, 8))
    results = [[], []]
    start = threading.Barrier(2)

    def work(i):
        start.wait()
        for _ in range(50):
            results[i].append(gradients(ops.sum_all(ops.square(ops.matmul(inputs[i], w))), [w])[0])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for x, got in zip(inputs, results, strict=True):
        assert len(got) == 50
        for g in got:
            np.testing.assert_array_equal(g, got[0])
        np.testing.assert_allclose(got[0], 2 * x.T @ (x @ w.data), rtol=1e-12)
