"""The README keeps its promises: its Python blocks run, and print what it says they print.

For authors: every fenced block marked `python` is executed, from top to bottom, in one
namespace and in an empty folder. A block marked `text` directly under it (blank lines at most
between) is its output, compared exactly; `...` stands for anything, such as a time, and runs of
blanks count as one.
"""

import contextlib
import doctest
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OUTPUT = re.compile(r"\s*^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def python_blocks(text):
    """Yield (code, output or None) of every Python block; the code keeps its line numbers."""
    for block in FENCED.finditer(text):
        if block[1] == "python":
            output = OUTPUT.match(text, block.end())
            yield "\n" * text.count("\n", 0, block.start(2)) + block[2], output and output[1]


def run(text):
    namespace = {"__name__": "__main__"}
    same = doctest.OutputChecker().check_output
    for code, want in python_blocks(text):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), namespace)
        got = printed.getvalue()
        if want is not None and not same(want, got, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE):
            raise AssertionError(f"README.md shows\n\n{want}\nfor\n{code.strip()}\n\nwhich prints\n\n{got}")


def test_readme_blocks(tmp_path, monkeypatch):
    text = README.read_text(encoding="utf-8")
    assert list(python_blocks(text)), "README.md holds no ```python block; is the fence written so?"
    monkeypatch.chdir(tmp_path)
    run(text)


EXAMPLE = """
```python
x = 6
```

```sh
false
```

```python
print(x * 7, "in 0.03 s")
```

```text
42 in ... s
```
"""


def test_the_test_itself():
    """A test of documents that cannot fail is decoration."""
    run(EXAMPLE)
    with pytest.raises(AssertionError, match="README.md shows"):
        run(EXAMPLE.replace("42", "43"))
    with pytest.raises(ZeroDivisionError):
        run(EXAMPLE.replace("x = 6", "x = 1 / 0"))
