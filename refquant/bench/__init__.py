"""Benchmarks: each checks that its engines compute the same, then times them in one run."""
