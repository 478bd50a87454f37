"""Example inputs for every differentiable operation: the gradient and the tape tests run over this one table.

An operation registers itself by ``@op``; one without an entry here fails ``test_every_op_has_an_example``.
"""

import copy
from dataclasses import dataclass, field

import numpy as np

import refquant.autograd.nnops
import refquant.autograd.ops
import refquant.autograd.tokenops
import refquant.quant.adaround
import refquant.quant.fakequant
import refquant.quant.losses
import refquant.quant.lsq  # noqa: F401  importing a module registers its operations
from refquant.autograd import OPS
from refquant.quant.affine import QParams, QSpec

#: Operations whose derivative is a *surrogate*, not the derivative of their value, so that no finite
#: difference can agree: name -> where they are tested instead.
EXEMPT = {
    "fake_quant": "straight-through: tests/unit/quant/test_fakequant.py holds it to the slope of the clip",
    "lsq": "straight-through: tests/unit/quant/test_lsq.py holds it to rounding as the addition of a constant",
}


@dataclass(frozen=True)
class Example:
    """One call: arrays that become differentiable tensors, and the rest of the arguments."""

    op: str
    label: str
    inputs: tuple[np.ndarray, ...]
    rest: dict = field(default_factory=dict)

    def __call__(self, *tensors):
        return OPS[self.op](*tensors, **copy.deepcopy(self.rest))  # a copied generator draws the same again

    def __str__(self):
        return f"{self.op}-{self.label}"


_rng = np.random.default_rng(20)


def _n(*shape):
    """A standard normal array; the generator is shared, so no two are equal."""
    return _rng.standard_normal(shape)


def _off_zero(*shape):
    """Values at least 0.1 away from 0, where relu has a corner."""
    x = _n(*shape)
    return x + 0.1 * np.sign(x)


def _distinct(*shape):
    """Values 0.1 apart in random order: no two elements of a pooling window tie."""
    return 0.1 * _rng.permutation(np.prod(shape)).reshape(shape)


def _conv(label, x, w, stride, pads):
    return Example("conv2d", label, (_n(*x), _n(*w), _n(w[0])), {"stride": stride, "pads": pads})


def _soft_weight(label, weight, spec, scale, zero_point):
    """Alphas on both sides of the rectified sigmoid's corners at +-2.398, none within 0.1 of them."""
    alpha = np.resize([-3.0, -2.2, -1, -0.1, 0.2, 1.1, 2.2, 2.6, 5], weight.shape)
    return Example("soft_weight", label, (alpha,), {"weight": weight, "qparams": QParams(scale, zero_point, spec)})


EXAMPLES = [
    *(
        Example(op, label, (_n(*a), _n(*b)))
        for op in ("add", "sub", "mul")
        for label, a, b in (
            ("same shape", (2, 3), (2, 3)),
            ("row", (2, 3, 4), (4,)),
            ("column", (2, 3), (2, 1)),
            ("both stretched", (2, 1, 3), (4, 1)),
            ("scalar", (), (2, 2)),
        )
    ),
    Example("scale", "matrix", (_n(3, 4),), {"c": -0.7}),
    Example("scale", "scalar", (_n(),), {"c": 3.0}),
    Example("square", "matrix", (_n(3, 4),)),
    Example("exp", "matrix", (_n(3, 4),)),
    Example("matmul", "2-d", (_n(3, 4), _n(4, 2))),
    Example("matmul", "batches", (_n(2, 3, 3, 4), _n(2, 3, 4, 2))),
    Example("reshape", "split", (_n(2, 6),), {"shape": (3, 2, 2)}),
    Example("reshape", "unknown axis", (_n(2, 6),), {"shape": (4, -1)}),
    Example("transpose", "cycle", (_n(2, 3, 4),), {"axes": (2, 0, 1)}),
    Example("transpose", "swap", (_n(2, 3, 4, 2),), {"axes": (0, 2, 1, 3)}),
    Example("concat", "nhwc", (_n(2, 2, 3, 4), _n(2, 2, 3, 1))),
    Example("channels", "middle", (_n(2, 2, 3, 5),), {"start": 1, "stop": 4}),
    Example("concat", "vectors", (_n(3), _n(2))),
    Example("sum_all", "matrix", (_n(3, 4),)),
    Example("mean_all", "matrix", (_n(3, 4),)),
    Example("relu", "both sides", (_off_zero(4, 5),)),
    Example("silu", "matrix", (3 * _n(4, 5),)),
    Example("silu", "zero and its minimum", (np.array([-6.0, -1.278, -0.0, 0, 1e-8, 6]),)),
    Example("softmax", "matrix", (_n(4, 5),)),
    Example("softmax", "3-d, one column", (_n(2, 3, 1),)),
    Example("linear", "1-d", (_n(4), _n(3, 4), _n(3))),
    Example("linear", "2-d", (_n(5, 4), _n(3, 4), _n(3))),
    Example("linear", "4-d", (_n(2, 2, 3, 4), _n(5, 4), _n(5))),
    _conv("1x1", (2, 3, 4, 3), (2, 1, 1, 3), 1, (0, 0, 0, 0)),
    _conv("1x1 stride 2", (1, 5, 4, 3), (2, 1, 1, 3), 2, (0, 0, 0, 0)),
    _conv("2x2", (2, 3, 4, 2), (3, 2, 2, 2), 1, (0, 0, 0, 0)),
    _conv("2x2 pads 1", (1, 3, 4, 2), (3, 2, 2, 2), 2, (1, 1, 1, 1)),
    _conv("3x3", (2, 4, 5, 3), (2, 3, 3, 3), 1, (1, 1, 1, 1)),
    _conv("3x3 no padding", (1, 4, 5, 2), (2, 3, 3, 2), 1, (0, 0, 0, 0)),
    _conv("3x3 full padding", (1, 2, 3, 2), (2, 3, 3, 2), 1, (2, 2, 2, 2)),
    _conv("3x3 stride 2, downsample", (2, 4, 6, 2), (2, 3, 3, 2), 2, (0, 1, 0, 1)),
    _conv("3x3 stride 2, odd", (1, 5, 7, 2), (3, 3, 3, 2), 2, (1, 1, 1, 1)),
    _conv("3x3 stride 2, rest", (1, 6, 5, 2), (3, 3, 3, 2), 2, (0, 0, 0, 0)),
    _conv("3x3 stride 3, rest 1 and 2", (1, 7, 8, 2), (2, 3, 3, 2), 3, (0, 0, 0, 0)),
    _conv("3x3 four pads", (1, 4, 3, 2), (2, 3, 3, 2), 1, (0, 2, 1, 0)),
    _conv("5x5", (1, 5, 4, 2), (2, 5, 5, 2), 1, (2, 2, 2, 2)),
    _conv("5x5 stride 3, four pads", (1, 6, 7, 2), (2, 5, 5, 2), 3, (1, 2, 4, 0)),
    _conv("2x3", (1, 4, 5, 2), (3, 2, 3, 2), 1, (0, 1, 2, 0)),
    _conv("window as large as x", (2, 3, 3, 2), (2, 3, 3, 2), 1, (0, 0, 0, 0)),
    _conv("one pixel", (2, 1, 1, 2), (3, 3, 3, 2), 1, (1, 1, 1, 1)),
    Example("add_channels", "nhwc", (_n(2, 3, 4, 2), _n(2, 2))),
    Example("group_norm", "one group", (_n(2, 2, 3, 4), _n(4), _n(4)), {"groups": 1}),
    Example("group_norm", "two groups", (_n(2, 3, 2, 4), _n(4), _n(4)), {"groups": 2}),
    Example("group_norm", "a group per channel", (_n(2, 3, 3, 3), _n(3), _n(3)), {"groups": 3}),
    Example("group_norm", "shifted", (5 + 0.5 * _n(1, 3, 3, 4), _n(4), _n(4)), {"groups": 2}),
    Example("group_norm", "eps matters", (_n(1, 2, 3, 4), _n(4), _n(4)), {"groups": 2, "eps": 0.5}),
    Example("attention", "self", (_n(2, 4, 3), _n(2, 4, 3), _n(2, 4, 3))),
    Example("attention", "keys fewer than queries", (_n(2, 4, 3), _n(2, 2, 3), _n(2, 2, 5))),
    Example("attention", "one token", (_n(2, 1, 3), _n(2, 1, 3), _n(2, 1, 3))),
    Example("layer_norm", "tokens", (_n(2, 3, 4),)),
    Example("layer_norm", "shifted", (5 + 0.5 * _n(3, 6),)),
    Example("layer_norm", "eps matters", (_n(2, 2, 3),), {"eps": 0.5}),
    Example("modulate", "tokens", (_n(2, 3, 4), _n(2, 4), _n(2, 4))),
    Example("modulate", "one token", (_n(3, 1, 2), _n(3, 2), _n(3, 2))),
    Example("gated_add", "tokens", (_n(2, 3, 4), _n(2, 4), _n(2, 3, 4))),
    Example("gelu", "matrix", (3 * _n(4, 5),)),
    Example("gelu", "zero and its minimum", (np.array([-6.0, -0.752, -0.0, 0, 1e-8, 6]),)),
    *(Example("split_heads", f"part {i}", (_n(2, 3, 12),), {"part": i, "parts": 3, "heads": 2}) for i in range(3)),
    Example("split_heads", "one part, one head", (_n(2, 3, 4),), {"part": 0, "parts": 1, "heads": 1}),
    Example("merge_heads", "two heads", (_n(4, 3, 2),), {"heads": 2}),
    Example("merge_heads", "three heads", (_n(6, 2, 2),), {"heads": 3}),
    Example("embedding", "a row twice, one never", (_n(4, 3),), {"index": np.array([2, 0, 2])}),
    Example("upsample_nearest", "nhwc", (_n(2, 2, 3, 2),)),
    Example("max_pool", "no ties", (_distinct(2, 4, 6, 2),)),
    Example("dropout", "rate 0.3", (_n(4, 5),), {"rate": 0.3, "rng": np.random.default_rng(1)}),
    Example("cross_entropy", "4 classes", (_n(5, 4),), {"labels": np.array([0, 3, 1, 1, 2])}),
    Example("cross_entropy", "large logits", (5 * _n(3, 4),), {"labels": np.array([0, 3, 1])}),
    _soft_weight("linear, asymmetric", _n(3, 6), QSpec(4, axis=0), [0.1, 0.2, 0.3], [7, 0, 15]),
    _soft_weight("conv, signed", _n(2, 2, 2, 3), QSpec(3, signed=True, axis=0), [0.3, 0.5], [1, -4]),
    _soft_weight("symmetric, one scale", _n(4, 5), QSpec(2, signed=True, symmetric=True), 0.5, 0),
    *(
        Example("rounding_regulariser", f"beta {beta}", (np.array([[-5, -2.3, -1], [0.3, 1.2, 2.5]]),), {"beta": beta})
        for beta in (20, 7.3, 2, 1.5)
    ),
    *(
        Example("reconstruction_loss", f"{label}, p {p}", (_n(*shape),), {"target": _n(*shape), "p": p})
        for label, shape in (("nhwc", (2, 3, 2, 4)), ("features", (3, 5)), ("tokens", (2, 4, 3)))
        for p in (2, 2.4, 3)
    ),
    *(
        Example(op, label, (_n(*shape),), {"target": _n(*shape), "grad": _n(*shape)})
        for op in ("fisher_diag", "fisher_full")
        for label, shape in (("nhwc", (2, 3, 2, 4)), ("features", (3, 5)), ("tokens", (2, 4, 3)))
    ),
]
