# %% [markdown]
# # 04 A tape in 150 lines
#
# *Write automatic differentiation in plain NumPy, check it, and ask it for a derivative that does not exist.*
#
# **Run time**: 3 s on two cores. **Before this**: [01](01_affine_quantization.md).
#
# ## What you'll do
#
# Networks are trained, and roundings are learned, by derivatives. You write the machine that makes them: arrays that
# remember how they were made, and one walk backwards over them. You check it by finite differences and against
# `refquant.autograd`, to the last bit, and learn weights of 3 bits with it.
#
# ## What you'll learn
#
# - What a vector-Jacobian product is, and why an operation needs to know nothing else.
# - Why the walk counts children, and what broadcasting means for a gradient.
# - Why the library's operations are coarse.
# - What the straight-through estimator is, and why finite differences cannot check it.
#
# ## What you'll need
#
# NumPy and the chain rule. No data set.

# %%
from functools import partial

import matplotlib.pyplot as plt
import numpy as np

from refquant.autograd import GradientError, Tensor, check_gradients, nnops, ops
from refquant.autograd import gradients as library_gradients
from refquant.quant.affine import QParams, QSpec, fake_quantize
from refquant.quant.fakequant import fake_quant as library_fake_quant
from refquant.viz import PALETTE

plt.style.use("refquant.assets.tutorial")

# %% [markdown]
# ## Equations and functions
#
# | equation | function |
# |---|---|
# | $\bar a = \bar y \cdot \partial y / \partial a$, a vjp for each operation | `refquant.autograd.ops` |
# | the walk: children before parents | `refquant.autograd.gradients` |
# | $(f(x + hv) - f(x - hv)) / 2h$ | `refquant.autograd.check_gradients` |
# | $\gamma (x - \mu) / \sqrt{v + \epsilon} + \beta$ (Wu & He 2018, eq. 1) | `refquant.autograd.nnops.group_norm` |
# | straight-through estimator (Bengio et al. 2013) | `refquant.quant.fakequant.fake_quant` |
#
# ## One derivative by hand
#
# Take a layer and a loss: $h = xW + b$, then $y = h\sigma(h)$ (SiLU), then $L = \mathrm{mean}((y - y^\ast)^2)$. Read
# from the loss backwards, the chain rule asks one thing of each step: *given the gradient with respect to your
# output, what is the gradient with respect to your input?* That map is the step's **vector-Jacobian product**, vjp
# for short. The Jacobian itself, here $512 \times 128$ numbers for the product alone, is never needed.

# %%
rng = np.random.default_rng(0)
x, target = rng.standard_normal((64, 16)), rng.standard_normal((64, 8))
W, b = rng.standard_normal((16, 8)) / 4, np.zeros(8)

h = x @ W + b  # forward
s = 1 / (1 + np.exp(-h))
y = h * s
loss = np.mean((y - target) ** 2)

dy = 2 * (y - target) / y.size  # backward: each line is the vjp of one line above, in reverse order
dh = dy * (s + y * (1 - s))
dW, db = x.T @ dh, dh.sum(axis=0)

# %% [markdown]
# Is it right? Move the weights by a little along some direction $v$ and look at the loss. One random direction checks
# all 128 numbers at once: a wrong gradient would go unnoticed only if its error were orthogonal to $v$.


# %%
def slope(f, at, v, step):
    """Directional derivative of f along v, by a central difference."""
    return (f(at + step * v) - f(at - step * v)) / (2 * step)


def loss_of(W, x=x, b=b, target=target):
    h = x @ W + b
    return np.mean((h / (1 + np.exp(-h)) - target) ** 2)


v = rng.standard_normal(W.shape)
analytic, numeric = (dW * v).sum(), slope(loss_of, W, v, 1e-5)
print(f"analytic {analytic:.10f}   numeric {numeric:.10f}")
assert abs(analytic - numeric) < 1e-7 * abs(analytic)

# %% [markdown]
# ## The tape
#
# By hand, forward and backward are written twice, and drift apart. Instead, let each operation write down its vjp
# while it computes its value. A `Node` holds the value, the nodes it was computed from, and that function.
#
# The walk back must not leave a node before *all* gradients have arrived there, and in a network with shortcuts they
# arrive by several ways. So it counts for every node how many were computed from it, its children, and releases it
# when the last of them has reported. There is no recursion: a graph may be deeper than Python's stack.


# %%
class Node:
    """An array that remembers how it was made."""

    def __init__(self, data, parents=(), vjp=None):
        self.data, self.parents, self.vjp = np.asarray(data), parents, vjp


def children_first(root):
    """Yield every node under `root` once, after everything that was computed from it."""
    children, stack = {}, [root]
    while stack:
        node = stack.pop()
        children[node] = children.get(node, 0) + 1
        if children[node] == 1:  # met for the first time: go on to its parents
            stack.extend(node.parents)
    ready = [root]
    while ready:
        node = ready.pop()
        yield node
        for parent in node.parents:
            children[parent] -= 1
            if children[parent] == 0:
                ready.append(parent)


def gradients(loss, wrt):
    """Gradients of a scalar with respect to the nodes of `wrt`."""
    found = {loss: np.ones_like(loss.data)}
    for node in children_first(loss):
        if node.vjp is not None:
            for parent, g in zip(node.parents, node.vjp(found[node]), strict=True):
                found[parent] = found[parent] + g if parent in found else g  # ways that meet are added
    return [found[node] for node in wrt]


# %% [markdown]
# That is the machine. The rest is a table of operations. One of them hides in plain sight: **broadcasting**.
# `x @ W + b` uses each entry of `b` 64 times, so 64 gradients flow back to it and are added. What NumPy copied on the
# way forward is summed on the way back.


# %%
def unbroadcast(g, shape):
    """Sum over the axes that broadcasting added in front, and over those that it stretched from 1."""
    g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    return g.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)


def add(a, b):
    return Node(a.data + b.data, (a, b), lambda g: (unbroadcast(g, a.data.shape), unbroadcast(g, b.data.shape)))


def mul(a, b):
    def vjp(g):
        return unbroadcast(g * b.data, a.data.shape), unbroadcast(g * a.data, b.data.shape)

    return Node(a.data * b.data, (a, b), vjp)


def scale(a, c):
    return Node(a.data * c, (a,), lambda g: (g * c,))


def power(a, p):
    return Node(a.data**p, (a,), lambda g: (g * p * a.data ** (p - 1),))


def matmul(a, b):
    return Node(a.data @ b.data, (a, b), lambda g: (g @ b.data.T, a.data.T @ g))


def silu(a):
    s = 1 / (1 + np.exp(-a.data))
    y = a.data * s
    return Node(y, (a,), lambda g: (g * (s + y * (1 - s)),))


def reshape(a, shape):
    return Node(a.data.reshape(shape), (a,), lambda g: (g.reshape(a.data.shape),))


def total(a, axes=None):
    """Sum over some axes, which stay with length 1, or over all of them to a scalar."""
    value = a.data.sum(axis=axes, keepdims=axes is not None)
    return Node(value, (a,), lambda g: (np.broadcast_to(g, a.data.shape),))


def mean_square(a):
    return scale(total(mul(a, a)), 1 / a.data.size)


# %% [markdown]
# The layer again. Forward is the formula, backward is one call, and it gives what we derived by hand.

# %%
W_node, b_node = Node(W), Node(b)
loss_node = mean_square(add(silu(add(matmul(Node(x), W_node), b_node)), Node(-target)))
for found, by_hand in zip(gradients(loss_node, [W_node, b_node]), (dW, db), strict=True):
    np.testing.assert_allclose(found, by_hand, rtol=1e-12, atol=1e-15)  # sums in another order

# %% [markdown]
# Why count? In $x_{k+1} = x_k + x_k$ every node is used twice. A recursion that goes to each parent with whatever
# gradient has just arrived is right, too, but it walks every *path*, and there are $2^n$. A residual network is such
# a chain.


# %%
def visits_by_recursion(node):
    return 1 + sum(visits_by_recursion(parent) for parent in node.parents)


start = node = Node(1.0)
for _ in range(14):
    node = add(node, node)
by_recursion, by_counting = visits_by_recursion(node), len(list(children_first(node)))
print(f"14 additions: {by_recursion} visits by recursion, {by_counting} by counting")
assert (by_recursion, by_counting) == (2**15 - 1, 15) and gradients(node, [start])[0] == 2**14

# %% [markdown]
# ## The library's tape gives the same numbers
#
# `refquant.autograd` is this machine with a few more habits: it forgets a gradient once it has been passed on, leaves
# out what leads to constants only, and records nothing inside of `no_grad()`. As its operations are the same NumPy
# calls in the same order, the gradients of a network of two layers are not close, they are equal.

# %%
data, goal = rng.standard_normal((64, 16)), rng.standard_normal((64, 4))
weights = [rng.standard_normal((16, 32)) / 4, rng.standard_normal(32), rng.standard_normal((32, 4)) / 6]

w1, b1, w2 = mine = [Node(w) for w in weights]
out = matmul(silu(add(matmul(Node(data), w1), b1)), w2)
on_page = gradients(mean_square(add(out, Node(-goal))), mine)

w1, b1, w2 = theirs = [Tensor(w, requires_grad=True) for w in weights]
out = ops.matmul(ops.silu(ops.add(ops.matmul(Tensor(data), w1), b1)), w2)
in_library = library_gradients(ops.mse(out, goal), theirs)

for a, c in zip(on_page, in_library, strict=True):
    np.testing.assert_array_equal(a, c)  # to the bit: 64 * 4 is a power of two, so 1/256 and / 256 are the same

# %% [markdown]
# ## How sharply does a finite difference see?
#
# We moved by $10^{-5}$. A smaller step is not a better one. The difference is off by about $h^2$, as the loss is no
# parabola, and by about $\epsilon / h$, as the loss is rounded to a relative $\epsilon$. The first falls with $h$ and
# the second grows; they meet near $\sqrt[3]{\epsilon}$. If rounding did not matter, the curves below would fall to
# the left for ever.

# %% Figure: Error of the central difference over its step. Both curves turn near the cube root of epsilon (dotted).
steps = 10.0 ** np.arange(-12, 0.01, 0.25)
figure, axes = plt.subplots()
best = {}
for name, colour, style in (("float64", PALETTE[0], "-"), ("float32", PALETTE[1], "--")):
    W_, v_, x_, b_, target_ = (a.astype(name) for a in (W, v, x, b, target))
    found = [slope(partial(loss_of, x=x_, b=b_, target=target_), W_, v_, np.dtype(name).type(h)) for h in steps]
    error = np.abs(np.array(found, np.float64) / analytic - 1)
    best[name] = error.min()
    axes.loglog(steps, error, style, color=colour, label=name)
    axes.axvline(np.cbrt(np.finfo(name).eps), color=colour, linestyle=":")
axes.set(xlabel="step h", ylabel="relative error")
axes.legend()
print({name: f"{e:.0e}" for name, e in best.items()})
assert best["float64"] < 1e-8 and best["float32"] > 1e-7  # why gradients are checked in float64
plt.show()

# %% [markdown]
# `check_gradients` does this for any function on the tape, at that step, along every axis of small inputs and a
# random direction of all. The derivative below lacks a term. Training works with it, only worse, so nobody would
# notice; the check does.


# %%
def forgetful_silu(x):
    s = 1 / (1 + np.exp(-x.data))
    return Tensor(x.data * s, (x,), lambda g: (g * s,))  # lacks y (1 - s)


def complaint(f, at):
    """What check_gradients has to say against f."""
    try:
        check_gradients(f, at)
    except GradientError as error:
        return str(error).split(": ", 1)[1].split(";")[0]
    return ""


point = rng.standard_normal((3, 4))
print(complaint(forgetful_silu, point))
assert complaint(forgetful_silu, point) and not complaint(ops.silu, point)

# %% [markdown]
# ## Coarse operations, or fine ones?
#
# With `add`, `mul` and `power` we can build group normalisation without deriving anything: the tape does it.


# %%
def group_norm_fine(x, gamma, beta, groups, eps=1e-6):
    """gamma (x - mu) / sqrt(v + eps) + beta, with mu and v over the pixels and channels of a group."""
    n, h, w, c = x.data.shape
    m = h * w * c // groups
    grouped = reshape(x, (n, h * w, groups, c // groups))
    centred = add(grouped, scale(total(grouped, (1, 3)), -1 / m))
    variance = scale(total(mul(centred, centred), (1, 3)), 1 / m)
    normed = mul(centred, power(add(variance, Node(eps)), -0.5))
    return add(mul(reshape(normed, x.data.shape), gamma), beta)


arrays = rng.standard_normal((8, 14, 14, 32)), rng.standard_normal(32), rng.standard_normal(32)
c = rng.standard_normal(arrays[0].shape)  # makes a scalar of the result
mine, theirs = [Node(a) for a in arrays], [Tensor(a, requires_grad=True) for a in arrays]
fine, coarse = group_norm_fine(*mine, groups=8), nnops.group_norm(*theirs, groups=8)
fine_gradients = gradients(total(mul(fine, Node(c))), mine)
coarse_gradients = library_gradients(ops.sum_all(ops.mul(coarse, Tensor(c))), theirs)
for a, b in zip((fine.data, *fine_gradients), (coarse.data, *coarse_gradients), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)

made = [node for node in children_first(fine) if node.parents]
kept = sum(node.data.nbytes for node in made if node.data.base is None) / arrays[0].nbytes
print(f"fine: {len(made)} operations, which keep {kept:.1f} arrays of the input's size for the walk back")
assert len(made) == 13 and kept > 4

# %% [markdown]
# Both are right. The library takes the coarse way, one node with a vjp derived by hand: it keeps one such array, and
# its derivative stands three lines below the formula, where it can be read. If the derivation is wrong, the check
# says so; every operation of the library is checked for the mere fact of being in its table, `refquant.autograd.OPS`.
#
# ## A derivative that does not exist
#
# A quantizer rounds to a grid of step $s$ and clips to the codes there are:
#
# ```math
# \hat x = s (q - z), \qquad q = \mathrm{clamp}(\mathrm{round}(x / s) + z, q_{min}, q_{max})
# ```
#
# It is a staircase: its derivative is 0 between the jumps and undefined on them. Whoever learns through it goes
# forward on the staircase and backward on something else, the **surrogate**. The usual one leaves out the rounding
# and keeps the clipping: 1 for what lands on a code, 0 for what is clipped. This is the *straight-through estimator*.


# %%
def fake_quant(x, step, zero, qmin, qmax):
    code = np.rint(x.data / step) + zero
    inside = (qmin <= code) & (code <= qmax)
    return Node(step * (np.clip(code, qmin, qmax) - zero), (x,), lambda g: (g * inside,))


q = QParams(0.25, 3, QSpec(bits=3))  # codes 0 .. 7 mean -0.75 .. 1
grid = (np.arange(-1200.5, 1400) / 800).astype(np.float32)  # in steps of 1/800, and none of them a tie

leaf = Node(grid)
stairs = fake_quant(leaf, q.scale, q.zero_point, q.spec.qmin, q.spec.qmax)
(surrogate,) = gradients(total(stairs), [leaf])
tensor = Tensor(grid, requires_grad=True)
on_tape = library_fake_quant(tensor, q)

np.testing.assert_array_equal(stairs.data, fake_quantize(grid, q))  # forward: the quantizer, exactly
np.testing.assert_array_equal(on_tape.data, fake_quantize(grid, q))
np.testing.assert_array_equal(library_gradients(ops.sum_all(on_tape), [tensor])[0], surrogate)  # backward, too

# %% [markdown]
# These are the tests that there are: forward is the quantizer, backward is the surrogate, both exactly. A finite
# difference is none. It measures the staircase, and what it finds depends on its step.

# %% Figure: Slopes of the quantizer. Only a window of exactly one step sees a box of height 1, as the surrogate is.
figure, axes = plt.subplots(figsize=(8, 3.6))
axes.plot(grid, surrogate, color=PALETTE[1], linewidth=4, alpha=0.6, label="surrogate")
for h, colour, style in ((0.01, "#AAAAAA", "-"), (0.125, "black", "--"), (0.6, PALETTE[2], "-.")):
    difference = (fake_quantize(grid + h, q) - fake_quantize(grid - h, q)) / (2 * h)
    axes.plot(grid, difference, style, color=colour, linewidth=1, label=f"difference, h = {h}")
axes.set(ylim=(-0.1, 2.4), xlabel="x", ylabel="slope (peaks of 12.5 cut off)")
axes.legend(loc="upper right")
plt.show()

# %%
print(complaint(lambda t: library_fake_quant(t, q), grid[::100]))
assert complaint(lambda t: library_fake_quant(t, q), grid[::100])

# %% [markdown]
# So the surrogate is not arbitrary: it is the slope of the staircase seen through a window of one step. But compare
# the ends. The dashed box ends at the outermost codes, -0.75 and 1, like the derivative of $\mathrm{clip}(x)$ that
# papers write. Ours reaches half a step further, as a value that *rounds* to the outermost code is not clipped. And
# on the very end the tie decides: -3.5 steps go to the even -4, which has no code; 4.5 go to the even 4, which has
# one.

# %%
ends = np.array([-3.504, -3.5, -3.496, 4.496, 4.5, 4.504], np.float32) * q.scale
tensor = Tensor(ends, requires_grad=True)
(at_ends,) = library_gradients(ops.sum_all(library_fake_quant(tensor, q)), [tensor])
np.testing.assert_array_equal(at_ends, [0, 0, 1, 1, 1, 0])

# %% [markdown]
# ## Does it help?
#
# A layer of 16 weights rounded to 3 bits, with correlated inputs. Is there a better rounding than the nearest? The
# true derivative is 0 and changes nothing. With the surrogate, gradient descent moves the float weights, and some of
# them come to round to other codes. One lucky problem would prove nothing, so we take twenty.


# %%
def learn(seed, factor, iterations=300, rate=0.005):
    """Error of the rounded layer at each iteration; `factor` is the slope between the jumps."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((16, 16)) + rng.standard_normal((16, 1))  # inputs that rise and fall together
    inputs, w = rng.standard_normal((256, 16)) @ mix.T / 6, rng.uniform(-0.8, 1.05, (16, 1))
    answers, errors = Node(-inputs @ w), []
    for _ in range(iterations):
        leaf = Node(w)
        rounded = fake_quant(leaf, 0.25, 3, 0, 7)
        loss = mean_square(add(matmul(Node(inputs), rounded), answers))
        errors.append(float(loss.data))
        w = w - rate * factor * gradients(loss, [leaf])[0]
    return np.array(errors) / errors[0]  # in units of nearest rounding, where it begins


assert (learn(seed=0, factor=0) == 1).all()  # the true derivative: nothing moves
error = np.array([learn(seed, factor=1) for seed in range(20)])
best = np.minimum.accumulate(error, axis=1)
print(f"median error / that of nearest rounding: at best {np.median(best[:, -1]):.2f}, ", end="")
print(f"at the end {np.median(error[:, -50:]):.2f}")
assert np.median(best[:, -1]) < 0.7 < np.median(error[:, -50:])

# %% Figure: Straight-through learning of 20 layers. It passes better roundings than the nearest, and leaves them again.
figure, axes = plt.subplots()
low, middle, high = np.quantile(error, [0.25, 0.5, 0.75], axis=0)
axes.fill_between(range(300), low, high, color=PALETTE[1], alpha=0.25, label="half of the layers")
axes.semilogy(middle, color=PALETTE[1], label="median")
axes.semilogy(np.median(best, axis=0), "--", color=PALETTE[0], label="median of the best so far")
axes.axhline(1, color="black", linewidth=1, linestyle=":")
axes.set(xlabel="iteration", ylabel="error / that of nearest rounding")
axes.legend(loc="upper left")
plt.show()

# %% [markdown]
# It finds better roundings, and does not stay there: a weight near a jump is pushed to and fro, for the surrogate
# does not know of the jump, and its correlated neighbours with it. If it did rest, the two curves would meet.
# Tutorial [09](09_adaround_and_blocks.md) learns roundings with a derivative that is true, and comes to rest.
#
# ## Where this differs from the authors' code
#
# - micrograd works on scalars and sorts by recursion, which ends at Python's recursion limit; HIPS autograd boxes
#   arrays and traces NumPy itself. Here nothing is traced.
# - TFMQ-DM and its relatives write `(round(x) - x).detach() + x` (`quant/quant_layer.py:159-160`). That this is
#   `round(x)` to the bit is no luck: both operations are exact (Sterbenz' lemma). The cell below tries it. Gradients
#   are those of ours.
# - LSQ (Esser et al. 2020, eq. 3) clips before it rounds; the released code and this library after, see the ends
#   above.

# %%
many = np.concatenate([rng.uniform(-300, 300, 1_000_000), np.arange(-300, 300, 0.5)]).astype(np.float32)
np.testing.assert_array_equal((np.rint(many) - many) + many, np.rint(many))

# %% [markdown]
# ## On your own
#
# 1. Release nodes without counting: in `children_first`, append every parent to `ready` at once. Which assertion
#    fails first? Which ones never notice, and why?
# 2. Make the ends of the surrogate those of $\mathrm{clip}(x)$. Which assertions notice? Does the last section learn
#    worse?
# 3. The step $s$ is a parameter, too. Derive $\partial \hat x / \partial s$, taking rounding for the addition of a
#    constant, and compare with [`lsq.py`](../../refquant/quant/lsq.py).
