# SPDX-License-Identifier: Apache-2.0
"""What an evaluation keeps while it runs: counts by batch, and soft masks of the images to be shown.

Both go to disk as they come, so that a killed evaluation goes on and ends with the same files.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from digseg_jax.distributed import is_main
from digseg_jax.journal import Journal, pack, unpack
from digseg_jax.storage import AnyPath, explained, write_bytes

EXTREMES = 3  # worst and best images that the gallery shows beside those from all over the split
COUNTS = ("confusion", "overlap", "area")


class Progress:
    """The journal of one evaluation and its folder; `None` keeps everything in memory.

    With several processes all of them know what is done, and process 0 alone writes and keeps masks.
    """

    def __init__(self, folder: AnyPath | None, identity: str):
        """Raises UserError if the disk or the bucket refuses; every process must come."""
        self.folder = folder if is_main() else None
        if folder is None:
            self.journal = Journal(None, "counts", identity)
        else:
            self.journal = Journal.shared(folder, "counts", identity)

    def batch(
        self, key: str, compute: Callable[[], dict[str, np.ndarray]]
    ) -> tuple[dict[str, np.ndarray], bool]:
        """Counts ("confusion", "overlap", "area" by image, "seconds") and whether they are new.

        compute: makes them, and perhaps more that is not recorded.
        """
        if key in self.journal:
            row = self.journal[key]
            return {n: unpack(row[n]) for n in COUNTS} | {"seconds": row["seconds"]}, False
        return compute(), True

    def record(self, key: str, counts: dict[str, Any]) -> None:
        """To be called when all masks of the batch that are to be kept have been."""
        packed = {n: pack(counts[n]) for n in COUNTS}
        self.journal.add(key, packed | {"seconds": counts["seconds"]})

    def fitted(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A JSON-ready value that is computed once."""
        if key not in self.journal:
            self.journal.add(key, compute())
        return self.journal[key]

    def keep(self, image: int, masks: np.ndarray) -> None:
        """Puts the soft masks of an image on disk."""
        if self.folder is not None:
            data = io.BytesIO()
            np.save(data, masks)
            write_bytes(self.folder / f"{image}.npy", data.getvalue())

    def kept(self, image: int) -> np.ndarray | None:
        """What `keep` stored in this run or in the one before it; None where nothing is kept."""
        if self.folder is None:
            return None
        path = self.folder / f"{image}.npy"
        with explained(path, "cannot be read"):
            return np.load(io.BytesIO(path.read_bytes()))

    def finish(self) -> None:
        """Everything is written elsewhere now."""
        self.journal.close()
        if self.folder is not None:
            with explained(self.folder, "cannot be removed"):
                epath.Path(self.folder).rmtree(missing_ok=True)


class Shown:
    """Soft masks for the gallery: images from all over the split, and the worst and best so far.

    A pure function of the order and scores of the images, so that a resumed run chooses the same.
    """

    def __init__(self, count: int, total: int, progress: Progress):
        extremes = min(EXTREMES, count // 4)
        spread = count - 2 * extremes
        self.spread = {i * total // spread for i in range(spread)} if spread else set()
        self.extremes, self.progress = extremes, progress
        self.scores: dict[int, float] = {}
        self.masks: dict[int, np.ndarray] = {}

    def offer(self, image: int, score: float, masks: Callable[[], np.ndarray] | None) -> None:
        """masks: those of the image; None if they were kept before a kill."""
        if not np.isnan(score):
            self.scores[image] = score
        if image not in self.spread and image not in self.worst() + self.best():
            return
        if masks is not None:
            self.masks[image] = masks()
            self.progress.keep(image, self.masks[image])
        elif (kept := self.progress.kept(image)) is not None:
            self.masks[image] = kept

    def worst(self) -> list[int]:
        return sorted(self.scores, key=lambda i: (self.scores[i], i))[: self.extremes]

    def best(self) -> list[int]:
        return sorted(self.scores, key=lambda i: (-self.scores[i], i))[: self.extremes]

    def final(self) -> tuple[dict[int, np.ndarray], dict[int, str]]:
        """Masks by image, in the order of the split, and notes on the extreme ones."""
        worst, best = self.worst(), self.best()
        chosen = sorted(self.spread | set(worst) | set(best))
        notes = {i: "among the best of the split" for i in best if i not in worst}
        notes |= {i: "among the worst of the split" for i in worst}
        return {i: self.masks[i] for i in chosen if i in self.masks}, notes
