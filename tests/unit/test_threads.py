"""Threads change the time, never the result."""

import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from refquant import threads
from refquant.errors import RangeError
from refquant.threads import get_threads, parallel_map, set_threads


@pytest.fixture(autouse=True)
def default_setting(monkeypatch):
    monkeypatch.delenv("REFQUANT_NUM_THREADS", raising=False)
    before = threads._threads
    set_threads(None)
    yield
    set_threads(before)


@pytest.fixture
def two_blas_threads():
    """BLAS with two threads, also where a worker of the suite has held it to one."""
    with threadpool_limits(2, user_api="blas"):
        yield


def blas_threads():
    """How many threads each loaded BLAS may use now."""
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 17])
def test_results_come_in_the_order_of_the_items(n, count):
    """parallel_map(f, x) = [f(x_0), f(x_1), ...], for any iterable and even if the first takes longest."""
    set_threads(n)
    release = threading.Event()

    def slow_first(i):
        if i == 0 and count > 1 and n > 1:
            release.wait(10)  # let go by the second item
        release.set()
        return i * i

    assert parallel_map(slow_first, iter(range(count))) == [i * i for i in range(count)]


def test_bits_do_not_depend_on_the_number_of_threads():
    """Chunks are the same and BLAS has one thread: equal bits for 1, 2 and 5 threads."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((90, 70)).astype(np.float32)
    chunks = list(rng.standard_normal((7, 50, 90)).astype(np.float32))
    results = []
    for n in (1, 2, 5):
        set_threads(n)
        results.append(np.stack(parallel_map(lambda x: np.tanh(x @ w), chunks)))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_items_really_run_at_once():
    """Two items on two threads meet at a barrier; in turn they would wait for ever."""
    set_threads(2)
    barrier = threading.Barrier(2, timeout=10)
    parallel_map(lambda _: barrier.wait(), range(2))


def test_blas_is_single_threaded_inside_and_restored_after(two_blas_threads):
    """BLAS has 1 thread inside, for several items and for one; afterwards the 2 that it had before."""
    set_threads(2)
    before = blas_threads()
    if not before:
        pytest.skip("threadpoolctl knows no BLAS of this NumPy")
    assert before == [2] * len(before)
    assert all(n == 1 for inside in parallel_map(lambda _: blas_threads(), range(3)) for n in inside)
    assert parallel_map(lambda _: blas_threads(), [0]) == [[1] * len(before)]
    assert blas_threads() == before


@pytest.mark.parametrize("n", [1, 2])
def test_exceptions_propagate(two_blas_threads, n):
    """The first failing item's exception arrives as it is, and the workers stay usable."""
    set_threads(n)

    def fail_on_three(i):
        if i >= 3:
            raise ValueError(f"item {i}")
        return i

    before = blas_threads()
    with pytest.raises(ValueError, match="item 3"):
        parallel_map(fail_on_three, range(6))
    assert blas_threads() == before
    assert parallel_map(fail_on_three, range(3)) == [0, 1, 2]


def test_the_setting_beats_the_environment_beats_the_cores(monkeypatch):
    assert get_threads() >= 1
    monkeypatch.setenv("REFQUANT_NUM_THREADS", "3")
    assert get_threads() == 3
    set_threads(5)
    assert get_threads() == 5
    set_threads(None)
    assert get_threads() == 3


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "", " ", "²", "1e2"])
def test_nonsense_in_the_environment_is_one_clear_error(monkeypatch, text):
    """The message holds the name of the variable and what it was."""
    monkeypatch.setenv("REFQUANT_NUM_THREADS", text)
    with pytest.raises(RangeError, match="REFQUANT_NUM_THREADS") as caught:
        get_threads()
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("n", [0, -3])
def test_nonsense_in_the_setting_changes_nothing(n):
    set_threads(4)
    with pytest.raises(RangeError, match=str(n)):
        set_threads(n)
    assert get_threads() == 4


def test_overlapping_calls_restore_blas(two_blas_threads):
    """Two user threads inside at once, the first to enter leaves first: BLAS is as before in the end."""
    before = blas_threads()
    inside, leave = threading.Barrier(2, timeout=10), threading.Event()
    first = threading.Thread(target=parallel_map, args=(lambda _: inside.wait(), [0]))

    def second():
        parallel_map(lambda _: (inside.wait(), leave.wait(10)), [0])

    other = threading.Thread(target=second)
    first.start()
    other.start()
    first.join()
    leave.set()
    other.join()
    assert blas_threads() == before


def test_a_nested_call_does_not_deadlock():
    """A worker that maps in turn runs its items itself."""
    set_threads(2)
    assert parallel_map(lambda i: parallel_map(lambda j: 10 * i + j, range(3)), range(4)) == [
        [10 * i + j for j in range(3)] for i in range(4)
    ]
