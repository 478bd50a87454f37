"""Exercise, after tutorial 04: the derivative of x * x is x.

Property: the tape's derivative is that of the function, however often a value is used.
"""

import numpy as np


class Value:
    """A number on a tape, with the values it was made of and its derivative by each."""

    def __init__(self, data, parents=()):
        self.data, self.parents, self.grad = data, parents, 0.0

    def __mul__(self, other):
        return Value(self.data * other.data, ((self, other.data), (other, self.data)))

    def __add__(self, other):
        return Value(self.data + other.data, ((self, 1.0), (other, 1.0)))

    def backward(self):
        """Derivative of this value by all that it was made of."""
        order, seen = [], set()

        def visit(value):
            if id(value) not in seen:
                seen.add(id(value))
                for parent, _ in value.parents:
                    visit(parent)
                order.append(value)

        visit(self)
        self.grad = 1.0
        for value in reversed(order):
            for parent, slope in value.parents:
                parent.grad = slope * value.grad


# --- the property: leave it as it is ---


def function(x, y):
    """A value used once, twice, and along two ways."""
    return x * x + x * y + y


for at in ((2.0, 3.0), (-1.0, 0.5)):
    x, y = map(Value, at)
    function(x, y).backward()
    step, (a, b) = 1e-6, at
    numeric = [
        (function(Value(a + step), Value(b)).data - function(Value(a - step), Value(b)).data) / (2 * step),
        (function(Value(a), Value(b + step)).data - function(Value(a), Value(b - step)).data) / (2 * step),
    ]
    assert np.allclose([x.grad, y.grad], numeric, atol=1e-6), (
        f"gradients do not add up: at {at} the tape says {x.grad}, {y.grad}; differences say {np.round(numeric, 6)}"
    )
print("holds: gradients add up")
