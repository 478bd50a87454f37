"""The C core under sanitizers: no byte beside an array, no undefined operation, no race; and what fuzzing found.

The vectors compare with NumPy; the corpora of fuzz/fuzz_conv.c and fuzz/fuzz_islands.c compare kernels with the scalar
one, in arrays of exactly their size and with numbers that describe nothing; how to fuzz on is said there.
"""

import subprocess
from pathlib import Path

import pytest
import vectors
from cbuild import Core

from refquant import kernels

FUZZ = Path(__file__).parent / "fuzz"
CORPUS = FUZZ / "corpus"

pytestmark = pytest.mark.slow


def sanitized(folder, compiler, *options):
    """The core with a sanitizer, or a skip where the compiler has none."""
    options = ("-O0", "-g", *options)
    program, link = "int main(void) { return 0; }", [compiler, *options, "-x", "c", "-", "-o", folder / "probe"]
    if subprocess.run(link, input=program, text=True, capture_output=True).returncode:
        pytest.skip(f"the compiler has no {options[-1]}")
    return Core(folder, compiler, *options)


@pytest.fixture(scope="module")
def checked(tmp_path_factory, compiler):
    """AddressSanitizer and UndefinedBehaviorSanitizer: the first finding ends the program."""
    folder = tmp_path_factory.mktemp("checked")
    return sanitized(folder, compiler, "-fno-sanitize-recover=all", "-fsanitize=address,undefined")


def test_the_vectors(checked, corners):
    """Every kernel of this machine, every output stage, arrays that end where their page ends."""
    path, count = corners
    done = checked.program(vectors.DRIVER)(path)
    names = " ".join(kernels.supported()[1:])
    assert (done.returncode, done.stdout) == (0, f"checked {count} cases on {names}\n"), done.stderr


def corpus(target):
    """The kept inputs of a fuzzing target."""
    return sorted((CORPUS / target.removeprefix("fuzz_")).iterdir())


@pytest.mark.parametrize("target", ["fuzz_conv", "fuzz_islands"])
def test_the_corpus(checked, target):
    """Every input that fuzzing has kept: good calls and spoilt ones, on one to three threads."""
    files = corpus(target)
    assert 0 < sum(file.stat().st_size for file in files) < 100_000
    done = checked.program(FUZZ / f"{target}.c", options=("-DREPLAY",))(*files, timeout=300)
    assert (done.returncode, done.stdout) == (0, f"replayed {len(files)} files\n"), done.stderr


MUTANTS = {  # what of the target's source is changed, and what it says then
    "a k too many": ("fuzz_conv", "gemm_scalar.c", "k < t->steps * RQ_STEP", "k <= t->steps * RQ_STEP",
                     "heap-buffer-overflow"),
    "a token too many": ("fuzz_islands", "islands_tokens.c", "*count = rest < TOKENS ? rest : TOKENS",
                         "*count = rest < 0 ? rest : TOKENS", "heap-buffer-overflow"),
    "a row too many": ("fuzz_islands", "products.c", "begin = p->m * cut / j->cuts, count = p->m",
                       "begin = p->m * cut / j->cuts, count = 1 + p->m", "heap-buffer-overflow"),
    "a stride not checked": ("fuzz_islands", "islands_tokens.c", "|| stride < d ||", "||", "but not refused"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mistake_is_seen(checked, mutant):
    """Of memory: a byte too many; of the door: a call that should be refused."""
    target, file, old, new, said = MUTANTS[mutant]
    other = checked.mutate(file, (old, new))
    done = checked.program(FUZZ / f"{target}.c", other, options=("-DREPLAY",))(*corpus(target), timeout=300)
    assert done.returncode != 0 and said in done.stderr


@pytest.fixture(scope="module")
def raced(tmp_path_factory, compiler):
    """ThreadSanitizer."""
    return sanitized(tmp_path_factory.mktemp("raced"), compiler, "-fsanitize=thread")


def test_no_race_in_the_team(raced):
    """Four callers at once, each with a team of three."""
    done = raced.program(FUZZ / "callers.c")(timeout=300)
    assert (done.returncode, done.stdout) == (0, "0 of 120 results are wrong\n"), done.stderr


def test_a_race_is_seen(raced):
    """Two callers have the team at once; the first report ends the program, which might hang otherwise."""
    mutant = raced.mutate("threads.c", ("threads < 2 || atomic_flag_test_and_set(&team.taken)", "threads < 2"))
    done = raced.program(FUZZ / "callers.c", mutant)(timeout=300, env={"TSAN_OPTIONS": "halt_on_error=1"})
    assert done.returncode != 0 and "data race" in done.stderr
