# SPDX-License-Identifier: Apache-2.0
"""Reads and writes a run's files on a disk or in a bucket (gs://), each complete or absent.

A bucket can neither append nor rename, so what is written in pieces (weights, galleries, event files)
is made in a local folder first and uploaded when it is complete. The client, gcsfs, tries each request
six times with growing pauses (about half a minute) before it gives up.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

# Set before gcsfs is imported: otherwise it asks another service for the type of each bucket. Only
# plain objects are used here.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

import fsspec  # noqa: E402
from etils import epath  # noqa: E402

from digseg_jax.errors import UserError, refusal  # noqa: E402
from digseg_jax.io.files import expanded  # noqa: E402

# No cached listings: other processes write to the bucket too.
fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False

AnyPath: TypeAlias = Path | epath.Path  # a Path on a disk, an epath.Path in a bucket
SomePath = TypeVar("SomePath", Path, epath.Path)
SCHEMES = ("gs://",)


def as_path(place: str | os.PathLike) -> AnyPath:
    """The path for a folder on a disk (`Path`, absolute, ~ expanded) or in a bucket (`epath.Path`).

    Raises:
      UserError: another URL scheme than gs://, no bucket, or gcsfs is not installed.
    """
    text = os.fspath(place)
    if not is_remote(text):
        # gs:/BUCKET is what a path makes of gs://BUCKET; no folder has such a name.
        if "://" in text or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
            raise UserError(f"{text}: legal are a folder on a disk and gs://BUCKET/FOLDER")
        return expanded(text).absolute()

    if not text.split("://", 1)[1].partition("/")[0]:
        raise UserError(f"{text}: names no bucket; legal is gs://BUCKET/FOLDER")

    try:
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise UserError(f"{text}: gs:// needs the package gcsfs: pip install gcsfs") from error
    return epath.Path(text)


def is_remote(place: str | os.PathLike) -> bool:
    """True for a path in a bucket."""
    return os.fspath(place).startswith(SCHEMES)


@contextlib.contextmanager
def explained(path: str | os.PathLike, what: str) -> Iterator[None]:
    """Turns an error of a disk or bucket inside the block into one line: "PATH: WHAT (reason)".

    On a disk only `OSError` is turned; anything else is a defect of the program, and passes.

    Raises:
      UserError: for every error that is turned; `Transient` for one that passes by itself.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())[:300] or type(error).__name__
        raise refusal(f"{path}: {what} ({reason})", error) from error
    except Exception as error:  # bucket clients raise errors of many packages
        if not is_remote(path):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise refusal(f"{path}: {what} ({reason})", error) from error


def read_text(path: AnyPath) -> str:
    """Reads a UTF-8 file; raises UserError if it cannot be read."""
    with explained(path, "cannot be read"):
        return path.read_bytes().decode("utf-8")


def inside(folder: SomePath, name: str) -> SomePath:
    """Joins a folder and a name that came with the files, such as one in a bucket or a manifest.

    Somebody else chose such names: one that climbs out of the folder could reach any file of the user.

    Raises:
      UserError: the name is empty, absolute, or has a part "..".
    """
    parts = name.split("/")
    if not name or "\0" in name or "\\" in name or {"", "..", "."} & set(parts):
        raise UserError(f"{folder}: the name {name[:200]!r} in it does not stay inside that folder")
    return folder / name


def write_bytes(path: AnyPath, data: bytes) -> None:
    """Writes a whole file, so that a reader sees the old one or the new one; makes its folder.

    Raises:
      UserError: the disk or the bucket refuses.
    """
    with explained(path, "cannot be written"):
        if is_remote(path):
            path.write_bytes(data)  # one request: an object appears when it is complete
            return

        # On a disk: write beside it, flush to the disk, then rename, which is atomic.
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(path.name + ".tmp")
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)


def check_writable(folder: AnyPath) -> None:
    """Makes a folder, and checks by a small file that it can be written: a bucket has no folders.

    Raises:
      UserError: the disk or the bucket refuses.
    """
    probe = folder / f".writable-{socket.gethostname()}-{os.getpid()}"
    write_bytes(probe, b"")
    with explained(folder, "cannot be written"):
        probe.unlink(missing_ok=True)


def write_json(path: AnyPath, value: Any) -> None:
    """Writes indented JSON with a final newline, as `write_bytes` does; nan and inf become null."""
    write_bytes(path, (json.dumps(_finite(value), indent=2, allow_nan=False) + "\n").encode())


def _finite(value: Any) -> Any:
    """The value with None in place of nan and infinite floats, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def filled_locally(folder: AnyPath, *, replace: bool = False) -> Iterator[Path]:
    """Yields an empty local folder to fill; after the block its files are moved to `folder`.

    If the block raises, `folder` keeps its contents.

    Args:
      folder: where the files belong.
      replace: delete all earlier contents of `folder`, not only files of the same names.

    Raises:
      UserError: the disk or the bucket refuses.
    """
    if not is_remote(folder):
        with explained(folder, "cannot be written"), _filled_beside(Path(folder), replace) as scratch:
            yield scratch
        return

    with tempfile.TemporaryDirectory(prefix="digseg_jax_") as scratch:
        yield Path(scratch)
        with explained(folder, "cannot be written"):
            bucket = epath.Path(folder)
            if replace and bucket.exists():
                bucket.rmtree()
            upload(Path(scratch), bucket)


@contextlib.contextmanager
def _filled_beside(folder: Path, replace: bool) -> Iterator[Path]:
    """Does the work of `filled_locally` on a disk."""
    # A link stays one: the folder that it names gets the files.
    folder = Path(os.path.realpath(folder))

    # Beside the target, on the same disk: there a file is moved by an atomic rename. The folder above a
    # mounted one is on another disk, or not ours to write.
    scratch = folder.with_name(f".{folder.name}.partial")
    if folder.is_dir() and not _takes_renames(folder.parent, folder):
        scratch = folder / ".partial"
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir(parents=True)
    try:
        yield scratch

        # Only now that all files are complete are the old contents deleted.
        for old in list(folder.iterdir()) if replace and folder.exists() else []:
            if old.is_dir() and not old.is_symlink():
                if old != scratch:
                    shutil.rmtree(old)
            else:
                old.unlink()
        for file in sorted(p for p in scratch.rglob("*") if p.is_file()):
            target = folder / file.relative_to(scratch)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _takes_renames(parent: Path, folder: Path) -> bool:
    """Whether a file can be made in `parent` and moved into `folder`."""
    return parent.stat().st_dev == folder.stat().st_dev and os.access(parent, os.W_OK)


def upload(local: Path, folder: epath.Path) -> None:
    """Uploads every file below `local` under its relative path below `folder`."""
    for file in sorted(p for p in local.rglob("*") if p.is_file()):
        # As a stream: weights may be larger than the memory that is left.
        target = folder / file.relative_to(local).as_posix()
        fsspec.filesystem("gs").put_file(str(file), os.fspath(target))


def download(folder: epath.Path, local: Path, names: tuple[str, ...]) -> None:
    """Downloads the named files and folders of a bucket's folder to `local`; skips absent ones.

    Raises:
      UserError: the bucket refuses, or holds a name that climbs out of its folder.
    """
    with explained(folder, "cannot be read"):
        for name in names:
            source, target = inside(folder, name), inside(local, name)
            if source.is_dir():
                download(source, target, tuple(p.name for p in source.iterdir()))
            elif source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                fsspec.filesystem("gs").get_file(os.fspath(source), str(target))


def local_copy(place: AnyPath, beside: tuple[str, ...] = ()) -> Path:
    """Returns `place` itself, or a local copy of a bucket's folder or file.

    A copy lasts as long as this process.

    Args:
      place: a folder or a file.
      beside: names of files and folders next to it that are copied too, if they are there.

    Raises:
      UserError: nothing of that name in the bucket, or it cannot be read.
    """
    if not is_remote(place):
        return Path(place)

    # A bucket has no folders: they are what the names of objects begin with.
    with explained(place, "cannot be read"):
        if not place.exists():
            raise UserError(f"no such folder or file: {place}")

    # Removed at exit: weights may be loaded from it at any time until then.
    scratch = Path(tempfile.mkdtemp(prefix="digseg_jax_"))
    _copies.append(scratch)
    download(epath.Path(place).parent, scratch, (place.name, *beside))
    return scratch / place.name


_copies: list[Path] = []  # folders of the local copies


@atexit.register
def remove_copies() -> None:
    """Removes all local copies. `os._exit` must be preceded by it: it runs no function at exit."""
    while _copies:
        shutil.rmtree(_copies.pop(), ignore_errors=True)
