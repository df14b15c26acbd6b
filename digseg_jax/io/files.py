# SPDX-License-Identifier: Apache-2.0
"""Reads files from other sources: regular files of a bounded size, as bytes or lines of text."""

from __future__ import annotations

import codecs
import os
import re
import stat
from pathlib import Path

from digseg_jax.errors import UserError

MAX_BYTES = 512 * 2**20
# gs://BUCKET, and gs:/BUCKET, which a path makes of it.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
LFS_POINTER = b"version https://git-lfs"  # begins what a clone without git-LFS has in place of files
MAX_TEXT = 16 * 2**20  # bytes; for lists that people write: names, queries, splits
# Byte-order marks of text that is not UTF-8. The longer ones go first: UTF-32's begins like UTF-16's.
_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class UnreadableError(UserError):
    """A file that is missing, damaged, too large or of the wrong kind."""


class TooLargeError(UnreadableError):
    """A file of more bytes than are read."""


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Reads a regular file of at most `limit` bytes.

    Raises:
      UnreadableError: missing, empty, too large (`TooLargeError`), or a folder, pipe or device.
    """
    try:
        # Kind and size first: reading a pipe would wait forever, and /dev/zero has no end.
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UnreadableError(f"{shown(path)}: not a regular file")
        if found.st_size > limit:
            raise TooLargeError(
                f"{shown(path)}: {found.st_size} bytes, more than the {limit} that are read"
            )

        data = path.read_bytes()
    except UnreadableError:
        raise
    except OSError as error:
        raise UnreadableError(f"{shown(path)}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a name that no file can have, such as one with a NUL
        raise UnreadableError(f"{shown(path)}: cannot be read: {error}") from error

    if not data:
        raise UnreadableError(f"{shown(path)}: the file is empty")
    return data


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Reads the lines of a UTF-8 text that are not blank, with or without a byte-order mark.

    Returns:
      (number from 1, text without the white space around it) of each line.

    Raises:
      UnreadableError: for the reasons of `read_bytes`, or another encoding.
    """
    # Editors on Windows offer UTF-16 as "Unicode": name the encoding instead of a strange byte.
    data = read_bytes(path, MAX_TEXT)
    for mark, name in _OTHER_ENCODINGS.items():
        if data.startswith(mark):
            raise UnreadableError(f"{shown(path)}: {name} text; save it as UTF-8")

    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise UnreadableError(
            f"{shown(path)}:{number}: byte 0x{data[error.start]:02x} is not UTF-8 text; save the file "
            "as UTF-8"
        ) from error

    # UTF-16 without a mark, or a binary file: NUL bytes are valid UTF-8.
    if lines and "\0" in lines[0]:
        raise UnreadableError(f"{shown(path)}: not a text file; save it as UTF-8")
    return [(number, text) for number, line in enumerate(lines, start=1) if (text := line.strip())]


def expanded(path: str | os.PathLike) -> Path:
    """The path with ~ and ~NAME replaced; raises UserError if there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{shown(path)}: the home folder of {Path(path).parts[0]} is not known"
        ) from error


def expanded_target(path: str | os.PathLike, what: str) -> Path:
    """`expanded` for a place on a disk that files are written to.

    what: the flag or the argument, for the message.

    Raises:
      UserError: an address such as gs://BUCKET/FOLDER: as a path it would be a folder of that name.
    """
    text = os.fspath(path)
    if isinstance(text, str) and _ADDRESS.match(text):
        raise UserError(
            f"{what}={text}: a folder on this machine's disks, please; `gcloud storage cp -r` or the "
            "like brings it elsewhere afterwards"
        )
    return expanded(path)


def shown(path: str | os.PathLike) -> str:
    """A path as text that can be printed and stored: bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(os.fspath(path)).decode("utf-8", errors="replace")
