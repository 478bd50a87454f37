"""The C core compiled by hand: with another compiler, with sanitizers, with a mistake in it, or to look at.

Not optimized, except where the machine code matters: gcc 12 compiles the core in 2.9 s instead of 6.4 s with -O1, with
AddressSanitizer in 9.5 s instead of 23 s, and the vectors then run for 0.4 s instead of 0.3 s. The optimized core is
what all other tests of the kernels call.
"""

import importlib.util
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CEXT = ROOT / "cext"


def build_ext():
    """Return the module build_ext.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("build_ext", ROOT / "build_ext.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Core:
    """The objects of the C core. Programs with them compile nothing twice, wrong variants one file."""

    def __init__(self, folder, compiler, *options, emulator=()):
        self._folder, self._emulator = folder, emulator
        self._cc = [compiler, *build_ext().FLAGS, "-Werror", "-I", CEXT, *options]
        self._objects = {source.name: self._compile(source, source.stem) for source in sorted(CEXT.glob("*.c"))}

    def replace(self, name, source):
        """Return what `program` takes as `other`: the object of another file in the place of cext/`name`."""
        return {name: self._compile(source, f"other {name}")}

    def mutate(self, name, *changes):
        """Return what `program` takes as `other`: cext/`name` with pairs (old, new) of text exchanged."""
        text = (CEXT / name).read_text(encoding="utf-8")
        for old, new in changes:
            assert old in text, f"{name} no longer has {old!r}: choose another mutant"
            text = text.replace(old, new)
        source = self._folder / f"mutant of {name}"
        source.write_text(text, encoding="utf-8")
        return self.replace(name, source)

    def program(self, driver, other=None, options=()):
        """Compile a driver, link it with the core, and return a function that runs it."""
        objects = self._objects | (other or {}) | {"driver": self._compile(driver, driver.stem, *options)}
        path = self._folder / f"{driver.stem}.program"
        self._call(*self._cc, *objects.values(), "-o", path)

        def run(*arguments, emulator_options=(), **keywords):
            command = [*self._emulator, *emulator_options, path, *arguments]
            return subprocess.run(command, capture_output=True, text=True, **keywords)

        return run

    def _compile(self, source, stem, *options):
        target = self._folder / f"{stem}.o"
        self._call(*self._cc, *options, "-x", "c", "-c", source, "-o", target)
        return target

    def _call(self, *command):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


class Library:
    """The C core as a shared library that Python opens beside the module: what mutants are linked with.

    Compiled once; a variant compiles the files that its change is in, and is a library of its own.
    """

    def __init__(self, folder, compiler):
        self._folder = folder
        self._cc = [compiler, *build_ext().FLAGS, "-O0", "-fPIC"]  # of two levels the last one counts
        for path in CEXT.glob("*.[ch]"):
            (folder / path.name).write_bytes(path.read_bytes())
        self._objects = {path.name: self._compile(path) for path in sorted(folder.glob("*.c"))}

    def open(self, file=None, *changes, compiled=()):
        """Return (ffi, lib) of the core with pairs (old, new) of text exchanged in `file`, which `compiled` include."""
        objects = dict(self._objects)
        if file is not None:
            path = self._folder / file
            text = changed = path.read_text(encoding="utf-8")
            for old, new in changes:
                assert old in changed, f"{file} no longer has {old!r}: choose another mutant"
                changed = changed.replace(old, new)
            path.write_text(changed, encoding="utf-8")
            objects |= {name: self._compile(self._folder / name, "mutant ") for name in compiled or (file,)}
            path.write_text(text, encoding="utf-8")
        library = self._folder / f"{len(list(self._folder.glob('*.so')))}.so"  # an opened one must not change
        self._call(*self._cc, "-shared", *objects.values(), "-o", library)
        from cffi import FFI

        ffi = FFI()
        ffi.cdef(build_ext().cdef((CEXT / "refquant.h").read_text(encoding="utf-8")))
        # Never unloaded: its team still sleeps in its code when Python forgets the library, at exit at the latest.
        return ffi, ffi.dlopen(str(library), ffi.RTLD_NOW | ffi.RTLD_NODELETE)

    def _compile(self, source, prefix=""):
        target = self._folder / f"{prefix}{source.stem}.o"
        self._call(*self._cc, "-c", source, "-o", target)
        return target

    def _call(self, *command):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
