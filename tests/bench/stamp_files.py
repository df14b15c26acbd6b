# SPDX-License-Identifier: Apache-2.0
"""Named photographs with alpha, as Debian's `tuxpaint-stamps-default` has them, and which are held out.

A stamp is CATEGORY/.../NAME.png with NAME.txt beside it, whose first line is its English name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from digseg_jax.errors import UserError

FOLDER = Path("usr/share/tuxpaint/stamps")
MIN_SIDE = 48  # pixels of a stamp
OPAQUE = (0.05, 0.97)  # share of a stamp's pixels: less is a line, more is no cut-out
MAX_WORDS = 4
# words that count or point, and do not tell what a thing is
_NO_CONTENT = frozenset(["a", "an", "another", "of", "our", "pair", "some", "the", "two", "very"])


@dataclasses.dataclass(frozen=True)
class Stamp:
    """A named photograph with alpha, uint8 [h, w, 4], and the folder it is from."""

    name: str
    category: str
    rgba: np.ndarray


def read_stamps(root: Path) -> list[Stamp]:
    """All photographs with a short name, in the order of their paths.

    Raises:
      UserError: no stamps there, or a file that is no image or no text.
    """
    root = root / FOLDER if (root / FOLDER).is_dir() else root
    if not root.is_dir():
        raise UserError(f"--stamps={root}: no such folder")
    found = [stamp for path in sorted(root.rglob("*.png")) if (stamp := _stamp(root, path))]
    if not found:
        raise UserError(f"--stamps={root}: no PNG files with a name in a .txt file beside them")
    return found


def _stamp(root: Path, path: Path) -> Stamp | None:
    folders = path.relative_to(root).parts[:-1]
    text = path.with_suffix(".txt")
    drawn = {"cartoon", "symbols"} & set(folders) or path.stem.endswith("_mirror")
    if drawn or not folders or not text.is_file():
        return None
    name = _name(text)
    # classes.txt separates synonyms by commas, and values by colons
    if not name or len(name.split()) > MAX_WORDS or re.search(r"[,:]", name):
        return None
    try:
        rgba = np.asarray(Image.open(path).convert("RGBA"))
    except (OSError, SyntaxError) as error:  # Pillow's word for a PNG that breaks its own rules
        raise UserError(f"{path}: no readable image ({error})") from error
    opaque = (rgba[..., 3] > 127).mean()
    if min(rgba.shape[:2]) < MIN_SIDE or not OPAQUE[0] < opaque < OPAQUE[1]:
        return None
    return Stamp(name, folders[0], rgba)


def _name(path: Path) -> str:
    try:
        lines = path.read_text("utf-8").splitlines() or [""]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from error
    return re.sub(r"^(a|an|the)\s+", "", lines[0].strip().rstrip(".!").lower())


def held_out(stamps: list[Stamp], share: float, seed: int) -> set[str]:
    """Names for the unseen set: that share of every category; a plural goes where its singular goes."""
    rng = np.random.default_rng([seed, 0])
    names = {s.name for s in stamps}
    first = {name: name[:-1] if name[-1] == "s" and name[:-1] in names else name for name in names}
    categories: dict[str, list[str]] = {}
    for stamp in stamps:  # a name's category is that of its first image
        known = [n for group in categories.values() for n in group]
        if first[stamp.name] == stamp.name and stamp.name not in known:
            categories.setdefault(stamp.category, []).append(stamp.name)
    unseen: set[str] = set()
    for _, group in sorted(categories.items()):
        unseen |= set(rng.permutation(sorted(group))[: round(share * len(group))].tolist())
    return {name for name in names if first[name] in unseen}


def content(name: str) -> frozenset[str]:
    """The words that tell what it is, in the singular: "some flowers" -> {"flower"}."""
    words = re.findall(r"\w+", name.lower())
    return frozenset(w[:-1] if len(w) > 3 and w.endswith("s") else w for w in words) - _NO_CONTENT


def near_duplicates(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """{name: the known one that it nearly is}: the same words, or two and more of them and others."""
    found = {}
    words = [(k, content(k)) for k in sorted(known)]
    for name in sorted(names):
        own = content(name)
        for other, theirs in words:
            fewer = min(own, theirs, key=len)
            if own == theirs or (len(fewer) > 1 and fewer == own & theirs):
                found[name] = other
                break
    return found


def unrelated(names: Iterable[str], known: Iterable[str]) -> set[str]:
    """Those names that have no word in common with any known one."""
    heard = frozenset().union(*(content(k) for k in known))
    return {name for name in names if not content(name) & heard}
