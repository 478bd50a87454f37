"""Where each value lives: values that are never alive at the same time share memory.

A value is alive from the operation that writes it to the last one that reads it. They are placed one after the other,
largest first, each at the lowest address at which it overlaps no value that is alive with it: greedy, and good to a
few per cent of the least that is possible for networks like these.
"""

from __future__ import annotations

from .program import Program, reads

ALIGN = 64  # a cache line, and the widest vector


def plan(program: Program, images: int) -> tuple[list[int], int]:
    """Return the offset of each value in bytes, and the size of the whole block."""
    first, last = {0: -1}, {0: -1}
    for i, operation in enumerate(program.operations):
        first[operation.out] = last[operation.out] = i
        for value in reads(operation):
            last[value] = i
    last[program.operations[-1].out] = len(program.operations)  # the answer outlives the program

    sizes = [-(-images * value.bytes // ALIGN) * ALIGN for value in program.values]
    offsets = [0] * len(sizes)
    placed: list[int] = []
    for v in sorted(range(len(sizes)), key=lambda v: -sizes[v]):
        together = [w for w in placed if first[w] <= last[v] and first[v] <= last[w]]
        start = 0
        for w in sorted(together, key=lambda w: offsets[w]):
            if start + sizes[v] <= offsets[w]:
                break
            start = max(start, offsets[w] + sizes[w])
        offsets[v] = start
        placed.append(v)
    return offsets, max(o + s for o, s in zip(offsets, sizes, strict=True))
