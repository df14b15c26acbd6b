# SPDX-License-Identifier: Apache-2.0
"""python -m digseg_jax.data.stamps --stamps=DIR --out=DIR: named cut-outs on photographs.

DIR holds Debian's `tuxpaint-stamps-default` as `dpkg -x` unpacks it: photographs with an alpha channel
and a name each. Scenes of two or three of them lie on satellite photographs (`data.landcover`): those
for training on its training tiles, the others on its test tiles. Two data sets in the layout of
`readers.folder` come out: OUT/seen (splits train and val) and OUT/unseen (val), whose names training
never hears, not even as queries for something absent. A scene is a pure function of (seed, set,
split, number).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from digseg_jax.data import landcover
from digseg_jax.errors import UserError
from digseg_jax.log import setup
from digseg_jax.writers import Progress

FOLDER = Path("usr/share/tuxpaint/stamps")
MIN_SIDE = 48  # pixels of a stamp
OPAQUE = (0.05, 0.97)  # share of a stamp's pixels: less is a line, more is no cut-out
SCALE = (0.35, 0.65)  # long side of a pasted stamp, as a share of the scene's side
VISIBLE = 0.6  # share of a stamp's pixels that those above it must leave
TRIES = 50
BACKGROUND = "background"


@dataclasses.dataclass(frozen=True)
class Stamp:
    """A named photograph with alpha, uint8 [h, w, 4], and the folder it is from."""

    name: str
    category: str
    rgba: np.ndarray


def read_stamps(root: Path) -> list[Stamp]:
    """All photographs with a short name, in the order of their paths.

    Raises:
      UserError: no stamps there, or a file that is no picture.
    """
    root = root / FOLDER if (root / FOLDER).is_dir() else root
    found = [stamp for path in sorted(root.rglob("*.png")) if (stamp := _stamp(root, path))]
    if not found:
        raise UserError(f"--stamps={root}: no PNG files with a name in a .txt file beside them")
    return found


def _stamp(root: Path, path: Path) -> Stamp | None:
    text = path.with_suffix(".txt")
    drawn = {"cartoon", "symbols"} & set(path.parts) or path.stem.endswith("_mirror")
    if drawn or not text.is_file():
        return None
    lines = text.read_text("utf-8").splitlines() or [""]
    name = re.sub(r"^(a|an|the)\s+", "", lines[0].strip().rstrip(".!").lower())
    if not name or len(name.split()) > 4 or re.search(r"[,:]", name):
        return None
    try:
        rgba = np.asarray(Image.open(path).convert("RGBA"))
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{path}: no readable picture ({error})") from error
    opaque = (rgba[..., 3] > 127).mean()
    if min(rgba.shape[:2]) < MIN_SIDE or not OPAQUE[0] < opaque < OPAQUE[1]:
        return None
    return Stamp(name, path.relative_to(root).parts[0], rgba)


def held_out(stamps: list[Stamp], share: float, seed: int) -> set[str]:
    """Names for the unseen set: that share of every category; a plural goes where its singular goes."""
    rng = np.random.default_rng([seed, 0])
    names = {s.name for s in stamps}
    first = {name: name[:-1] if name[-1] == "s" and name[:-1] in names else name for name in names}
    categories: dict[str, list[str]] = {}
    for stamp in stamps:  # a name's category is that of its first picture
        known = [n for group in categories.values() for n in group]
        if first[stamp.name] == stamp.name and stamp.name not in known:
            categories.setdefault(stamp.category, []).append(stamp.name)
    unseen: set[str] = set()
    for _, group in sorted(categories.items()):
        unseen |= set(rng.permutation(sorted(group))[: round(share * len(group))].tolist())
    return {name for name in names if first[name] in unseen}


class Scenes:
    """Scenes of some stamps on crops of some tiles; `size` pixels a side."""

    def __init__(self, stamps: list[Stamp], split: str, size: int):
        self.names = sorted({s.name for s in stamps})
        self.stamps = {n: [s for s in stamps if s.name == n] for n in self.names}
        self.cover = landcover.load()
        self.tiles = self.cover.tiles(split)
        self.size = size

    def scene(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Picture uint8 [s, s, 3] and label uint16 [s, s]: 0 background, i + 1 for names[i]."""
        count = int(rng.integers(2, 4))
        for _ in range(TRIES):
            picture, label = self._background(rng), np.zeros((self.size, self.size), np.uint16)
            pasted = {}
            for k in rng.permutation(len(self.names))[:count]:
                mask = self._paste(picture, label, int(k), rng)
                pasted[int(k) + 1] = mask.sum()
            left = [(label == k).sum() / max(n, 1) for k, n in pasted.items()]
            if min(left) >= VISIBLE:
                break
        return picture, label

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        tile = self.tiles[int(rng.integers(len(self.tiles)))]
        image = self.cover.window(tile.top, tile.left, landcover.TILE)["image"]
        return cv2.resize(image, (self.size, self.size), interpolation=cv2.INTER_AREA)

    def _paste(
        self, picture: np.ndarray, label: np.ndarray, k: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Draws names[k] somewhere onto both; returns where, bool [s, s]."""
        choice = self.stamps[self.names[k]]
        rgba = choice[int(rng.integers(len(choice)))].rgba
        side = rng.uniform(*SCALE) * self.size / max(rgba.shape[:2])
        h, w = (max(1, round(n * side)) for n in rgba.shape[:2])
        small = cv2.resize(rgba, (w, h), interpolation=cv2.INTER_AREA)
        small = small[:, ::-1] if rng.integers(2) else small
        top, left = (int(rng.integers(self.size - n + 1)) for n in (h, w))
        place = (slice(top, top + h), slice(left, left + w))
        alpha = small[..., 3:].astype(np.float32) / 255
        mixed = alpha * small[..., :3] + (1 - alpha) * picture[place]
        picture[place] = mixed.round().astype(np.uint8)
        inside = np.zeros(label.shape, bool)
        inside[place] = small[..., 3] > 127
        label[inside] = k + 1
        return inside


def write_set(folder: Path, scenes: Scenes, split: str, count: int, key: list[int]) -> None:
    """FOLDER/images/SPLIT/*.png and masks/SPLIT/*.png (16 bits)."""
    for kind in ("images", "masks"):
        (folder / kind / split).mkdir(parents=True, exist_ok=True)
    progress = Progress(count, label=f"{folder.name} {split}", unit="scenes")
    started = time.monotonic()
    for i in range(count):
        picture, label = scenes.scene(np.random.default_rng([*key, i]))
        Image.fromarray(picture).save(folder / "images" / split / f"{i:06d}.png")
        Image.fromarray(label).save(folder / "masks" / split / f"{i:06d}.png")
        progress.update(i + 1, (i + 1) / (time.monotonic() - started))
    progress.close()


def write_classes(folder: Path, names: list[str]) -> None:
    rows = [f"{i}: {name}" for i, name in enumerate([BACKGROUND, *names])]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")


def make(stamps: Path, out: Path, *, size: int, scenes: int, val: int, seed: int, share: float) -> dict:
    """Writes both data sets and OUT/manifest.json; returns the manifest.

    Raises:
      UserError: OUT is in use, a value out of range, or no stamps.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out={out}: is not empty; name another folder, or remove it")
    for flag, value, least in (("size", size, 32), ("scenes", scenes, 1), ("val", val, 1)):
        if value < least:
            raise UserError(f"--{flag}={value}: must be at least {least}")
    if not 0 < share < 1:
        raise UserError(f"--held_out={share}: legal range (0, 1)")
    found = read_stamps(stamps)
    unseen = held_out(found, share, seed)
    parts = {
        "seen": [s for s in found if s.name not in unseen],
        "unseen": [s for s in found if s.name in unseen],
    }
    manifest = {"size": size, "seed": seed, "held_out": share}
    for number, (part, own) in enumerate(parts.items()):
        names = sorted({s.name for s in own})
        if len(names) < 3:
            raise UserError(f"--held_out={share}: {len(names)} {part} names; a scene needs up to 3")
        splits = {"train": scenes, "val": val} if part == "seen" else {"val": val}
        for place, (split, count) in enumerate(splits.items()):
            tiles = "train" if split == "train" else "test"
            key = [seed, 1 + number, place]
            write_set(out / part, Scenes(own, tiles, size), split, count, key)
        write_classes(out / part, names)
        manifest[part] = {"names": names, "pictures": len(own), "scenes": splits}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m digseg_jax.data.stamps", description=__doc__)
    parser.add_argument("--stamps", type=Path, required=True, help="the unpacked package")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--size", type=int, default=64, help="a side of a scene, pixels")
    parser.add_argument("--scenes", type=int, default=6000, help="of the training split")
    parser.add_argument("--val", type=int, default=200, help="of each validation split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held_out", type=float, default=0.2, help="share of the names")
    a = parser.parse_args(argv)
    setup()
    try:
        made = make(
            a.stamps, a.out, size=a.size, scenes=a.scenes, val=a.val, seed=a.seed, share=a.held_out
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for part in ("seen", "unseen"):
        print(f"{part}: {len(made[part]['names'])} names, scenes {made[part]['scenes']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
