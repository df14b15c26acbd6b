# SPDX-License-Identifier: Apache-2.0
"""python -m tests.bench.stamp_data --stamps=DIR --out=DIR: named cut-outs on photographs.

DIR holds Debian's `tuxpaint-stamps-default` as `dpkg -x` unpacks it: photographs with an alpha channel
and a name each. Scenes of two or three of them lie on satellite photographs (`data.landcover`): those
for training on its training tiles, the others on its test tiles. Two data sets in the layout of
`readers.folder` come out: OUT/seen (splits train and val) and OUT/unseen (val), whose names training
never hears, not even as queries for something absent. A scene is a pure function of (seed, set,
split, number).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from digseg_jax.errors import UserError
from digseg_jax.io.progress import Progress
from digseg_jax.log import setup
from tests.bench.stamp_files import held_out, near_duplicates, read_stamps
from tests.bench.stamp_scenes import Scenes

BACKGROUND = "background"
MANIFEST = "manifest.json"


def write_set(folder: Path, scenes: Scenes, split: str, count: int, key: list[int]) -> None:
    """FOLDER/images/SPLIT/*.png and masks/SPLIT/*.png (16 bits)."""
    for kind in ("images", "masks"):
        (folder / kind / split).mkdir(parents=True, exist_ok=True)
    progress = Progress(count, label=f"{folder.name} {split}", unit="scenes")
    started = time.monotonic()
    for i in range(count):
        image, label = scenes.scene(np.random.default_rng([*key, i]))
        Image.fromarray(image).save(folder / "images" / split / f"{i:06d}.png")
        Image.fromarray(label).save(folder / "masks" / split / f"{i:06d}.png")
        progress.update(i + 1, (i + 1) / (time.monotonic() - started))
    progress.close()


def write_classes(folder: Path, names: list[str]) -> None:
    """FOLDER/classes.txt: background is class 0, so that its pixels count as not being a name's."""
    rows = [f"{i}: {name}" for i, name in enumerate([BACKGROUND, *names])]
    (folder / "classes.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")


def claim(out: Path, manifest: dict[str, Any]) -> None:
    """Writes OUT/manifest.json before the first scene: a killed command may be given again.

    Raises:
      UserError: OUT holds something else.
    """
    place = out / MANIFEST
    text = json.dumps(manifest, indent=1) + "\n"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out}: is a file; name a folder")
    if out.is_dir() and any(out.iterdir()):
        if not place.is_file() or place.read_text("utf-8") != text:
            raise UserError(f"--out={out}: is not empty, and holds another set; name another folder")
        return
    out.mkdir(parents=True, exist_ok=True)
    place.write_text(text, encoding="utf-8")


def check_numbers(*, size: int, scenes: int, val: int, seed: int, share: float) -> None:
    """Raises UserError: a value out of range."""
    least = (("size", size, 32), ("scenes", scenes, 1), ("val", val, 1), ("seed", seed, 0))
    for flag, value, minimum in least:
        if value < minimum:
            raise UserError(f"--{flag}={value}: must be at least {minimum}")
    if not 0 < share < 1:
        raise UserError(f"--held_out={share}: legal range (0, 1)")


def make(
    stamps: Path, out: Path, *, size: int, scenes: int, val: int, seed: int, share: float
) -> dict[str, Any]:
    """Writes both data sets and OUT/manifest.json; returns the manifest.

    A name that was drawn for the unseen set and is nearly a seen one ("some flowers", "flower") is in
    neither: training has not heard it, yet it would be no test.

    Raises:
      UserError: OUT holds something else, a value out of range, or too few stamps.
    """
    check_numbers(size=size, scenes=scenes, val=val, seed=seed, share=share)
    found = read_stamps(stamps)
    unseen = held_out(found, share, seed)
    near = near_duplicates(unseen, {s.name for s in found} - unseen)
    parts = {
        "seen": [s for s in found if s.name not in unseen],
        "unseen": [s for s in found if s.name in unseen - set(near)],
    }
    manifest: dict[str, Any] = {"size": size, "seed": seed, "held_out": share, "left_out": near}
    for part, own in parts.items():
        names = sorted({s.name for s in own})
        if len(names) < 3:
            raise UserError(f"--held_out={share}: {len(names)} {part} names; a scene needs up to 3")
        splits = {"train": scenes, "val": val} if part == "seen" else {"val": val}
        manifest[part] = {"names": names, "images": len(own), "scenes": splits}
    claim(out, manifest)
    for number, (part, own) in enumerate(parts.items()):
        for place, (split, count) in enumerate(manifest[part]["scenes"].items()):
            composed = Scenes(own, "train" if split == "train" else "test", size)
            write_set(out / part, composed, split, count, [seed, 1 + number, place])
        # last: without it the folder is no data set, and nobody trains on a half of it
        write_classes(out / part, manifest[part]["names"])
    return manifest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.stamp_data", description=__doc__)
    parser.add_argument("--stamps", type=Path, required=True, help="the unpacked package")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--size", type=int, default=64, help="a side of a scene, pixels")
    parser.add_argument("--scenes", type=int, default=6000, help="of the training split")
    parser.add_argument("--val", type=int, default=200, help="of each validation split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held_out", type=float, default=0.2, help="share of the names")
    return parser


def main(argv: list[str] | None = None) -> int:
    a = _parser().parse_args(argv)
    setup()
    try:
        made = make(
            a.stamps, a.out, size=a.size, scenes=a.scenes, val=a.val, seed=a.seed, share=a.held_out
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write {a.out}: {error}", file=sys.stderr)
        return 2
    for part in ("seen", "unseen"):
        print(f"{part}: {len(made[part]['names'])} names, scenes {made[part]['scenes']}")
    for name, other in made["left_out"].items():
        print(f"left out: {name!r}, nearly the seen {other!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
