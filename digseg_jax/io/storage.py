# SPDX-License-Identifier: Apache-2.0
"""Files of a run on a disk or in a bucket (gs://): whole files, each there completely or not at all.

A bucket knows neither appending nor renaming, so what is written in pieces (weights, galleries, event
files) is made in a local folder first and uploaded when it is whole. The client, gcsfs, tries each
request six times with growing pauses (about half a minute) before it gives up.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# gcsfs would otherwise ask each bucket for its type through another service; we use plain objects
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

import fsspec  # noqa: E402
from etils import epath  # noqa: E402

from digseg_jax.errors import UserError  # noqa: E402

# other processes write too: a listing that was true once must not be remembered
fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False

AnyPath = Path | epath.Path  # a Path on a disk, an epath.Path in a bucket
SCHEMES = ("gs://",)


def as_path(place: str | os.PathLike) -> AnyPath:
    """A path of the kind that fits `place`.

    Raises:
      UserError: another URL scheme than gs://, no bucket, or gcsfs is not installed.
    """
    text = os.fspath(place)
    if not is_remote(text):
        if "://" in text:
            raise UserError(f"{text}: legal are a folder on a disk and gs://BUCKET/FOLDER")
        return Path(text)
    if not text.split("://", 1)[1].strip("/"):
        raise UserError(f"{text}: names no bucket; legal is gs://BUCKET/FOLDER")
    try:
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise UserError(f"{text}: gs:// needs the package gcsfs: pip install gcsfs") from error
    return epath.Path(text)


def is_remote(place: str | os.PathLike) -> bool:
    """Whether `place` is in a bucket."""
    return os.fspath(place).startswith(SCHEMES)


@contextlib.contextmanager
def explained(path: str | os.PathLike, what: str) -> Iterator[None]:
    """Turns a disk's or a bucket's refusal inside the block into one line: "PATH: WHAT (reason)".

    Raises:
      UserError: for any error that is not one already.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{path}: {what} ({reason})") from error
    except Exception as error:  # the clients of buckets raise errors of many packages
        if not is_remote(path):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{path}: {what} ({reason})") from error


def read_text(path: AnyPath) -> str:
    """Raises UserError if the file cannot be read."""
    with explained(path, "cannot be read"):
        return path.read_bytes().decode("utf-8")


def write_bytes(path: AnyPath, data: bytes) -> None:
    """Writes the whole file, so that a reader sees the old one or the new one; makes its folder.

    Raises:
      UserError: the disk or the bucket refuses.
    """
    with explained(path, "cannot be written"):
        if is_remote(path):
            path.write_bytes(data)  # one request: an object appears when it is complete
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(path.name + ".tmp")
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)


def write_json(path: AnyPath, value: Any) -> None:
    """Indented JSON with a final newline; see `write_bytes`."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


@contextlib.contextmanager
def filled_locally(folder: AnyPath, *, replace: bool = False) -> Iterator[Path]:
    """A local folder to fill, which is `folder` itself or, at the end of the block, uploaded to it.

    replace: what lies there already goes away first (in a bucket; on a disk the filler sees it).

    Raises:
      UserError: the disk or the bucket refuses.
    """
    if not is_remote(folder):
        with explained(folder, "cannot be written"):
            yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="digseg_jax_") as scratch:
        yield Path(scratch)
        with explained(folder, "cannot be written"):
            if replace and folder.exists():
                folder.rmtree()
            upload(Path(scratch), folder)


def upload(local: Path, folder: epath.Path) -> None:
    """Every file below `local`, under the same name below `folder`."""
    for file in sorted(p for p in local.rglob("*") if p.is_file()):
        (folder / file.relative_to(local).as_posix()).write_bytes(file.read_bytes())


def download(folder: epath.Path, local: Path, names: tuple[str, ...]) -> None:
    """The files and folders `names` of `folder` to the same place below `local`; absent ones are left.

    Raises:
      UserError: the bucket refuses.
    """
    with explained(folder, "cannot be read"):
        for name in names:
            source = folder / name
            if source.is_dir():
                download(source, local / name, tuple(p.name for p in source.iterdir()))
            elif source.exists():
                (local / name).parent.mkdir(parents=True, exist_ok=True)
                (local / name).write_bytes(source.read_bytes())


def local_copy(folder: AnyPath) -> Path:
    """`folder` itself, or a copy of the bucket's folder that lasts as long as this process.

    Raises:
      UserError: no such folder in the bucket, or it cannot be read.
    """
    if not is_remote(folder):
        return Path(folder)
    with explained(folder, "cannot be read"):
        if not folder.is_dir():
            raise UserError(f"no such folder: {folder}")
        names = tuple(p.name for p in folder.iterdir())
    scratch = Path(tempfile.mkdtemp(prefix="digseg_jax_"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    local = scratch / folder.name
    download(folder, local, names)
    return local
