"""The build: what cffi is given, and what happens without a compiler."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def build_ext():
    spec = importlib.util.spec_from_file_location("build_ext", ROOT / "build_ext.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cdef_is_the_text_between_the_marks(build_ext):
    header = "#if\n/* cffi: begin */\nint f(void);\n/* cffi: end */\n#endif"
    assert build_ext.cdef(header) == "\nint f(void);\n"


@pytest.mark.parametrize("header", ["", "/* cffi: begin */ int f();", "/* cffi: end */ /* cffi: begin */"])
def test_missing_marks_are_an_error(build_ext, header):
    with pytest.raises(build_ext.BuildError, match="must hold the marks"):
        build_ext.cdef(header)


def test_the_real_header_gives_every_prototype_and_no_directive_cffi_cannot_read(build_ext):
    declarations = build_ext.cdef((ROOT / "cext" / "refquant.h").read_text(encoding="utf-8"))
    assert "rq_abi_version" in declarations and "rq_conv2d" in declarations
    assert "#include" not in declarations and "#if" not in declarations


def test_no_flag_ties_the_module_to_this_machine(build_ext):
    assert not [flag for flag in build_ext.FLAGS if flag.startswith("-m") or flag == "-Ofast"]


@pytest.mark.parametrize("value", ["", "0"])
def test_extension_is_optional(build_ext, monkeypatch, value):
    monkeypatch.setenv("REFQUANT_REQUIRE_EXT", value)
    assert not build_ext.required()
    monkeypatch.setenv("REFQUANT_REQUIRE_EXT", "1")
    assert build_ext.required()


def build_without_compiler(out_dir, required):
    code = (
        "import sys, pathlib, build_ext\n"
        f"print(build_ext.build(pathlib.Path(sys.argv[1]), required={required}))\n"
    )
    environment = {**os.environ, "CC": str(out_dir / "no-such-compiler")}
    command = [sys.executable, "-c", code, str(out_dir)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_without_compiler_one_line_says_what_to_do(tmp_path):
    run = build_without_compiler(tmp_path, required=False)
    assert (run.returncode, run.stdout) == (0, "None\n")
    [line] = run.stderr.splitlines()
    assert "install a C compiler" in line and "python build_ext.py" in line
    assert list(tmp_path.iterdir()) == []


def test_without_compiler_fatal_where_required(tmp_path):
    run = build_without_compiler(tmp_path, required=True)
    assert run.returncode == 1
    assert "BuildError: the C core could not be compiled" in run.stderr
    assert list(tmp_path.iterdir()) == []
