# SPDX-License-Identifier: Apache-2.0
"""How fast training crops come: against bare decoding, against torch's DataLoader, with more workers.

Images are 640 x 480 (COCO's size) windows of the land-cover imagery, as JPEG and PNG; crops are
512 x 512. Rates per core are per second of processor time, so that other programs on the machine
disturb them little; the scaling with workers is by the clock and needs idle cores.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from digseg_jax.config.schema import DataConfig
from digseg_jax.data.checked import Guarded
from digseg_jax.data.crops import CropRules
from digseg_jax.data.datasets import landcover
from digseg_jax.data.datasets.pairs import FileSource, pair_folders
from digseg_jax.data.datasets.readers.index import IndexLabels
from digseg_jax.data.datasets.spec import ClassInfo, DatasetSpec
from digseg_jax.data.datasets.statistics import confusable
from digseg_jax.data.pipeline import CropWithNames, NamedQueries
from digseg_jax.data.queries import QuerySampler
from digseg_jax.data.shards.records import RecordSource
from digseg_jax.data.stream import Batches, Part, mixed_stream
from digseg_jax.errors import UserError
from digseg_jax.runtime.malloc import keep_freed_memory
from digseg_jax.tools.prepare_data import prepare_split

SIZE, BATCH, IMAGES = 512, 16, 1024
TURNS = 3  # of every measurement, in turn with the others: machines speed up and slow down
WIDTH, HEIGHT = 640, 480
SPEC = DatasetSpec(
    name="bench",
    title="",
    classes=tuple(ClassInfo(n, raw=(i,)) for i, n in enumerate(landcover.GROUPS)),
    splits={"train": IMAGES},
    ignore="255",
    ignored_raw=(255,),
    license="",
)


def write_images(folder: Path, count: int = IMAGES) -> None:
    """Windows with land in them: folder/images/*.jpg, folder/annotations/*.png."""
    cover = landcover.load()
    rng = np.random.default_rng(0)
    label = cover.labels["groups"]
    for kind in ("images", "annotations"):
        (folder / kind).mkdir(parents=True)
    written = 0
    while written < count:
        top = int(rng.integers(label.shape[0] - HEIGHT))
        left = int(rng.integers(label.shape[1] - WIDTH))
        rows, columns = slice(top, top + HEIGHT), slice(left, left + WIDTH)
        if (label[rows, columns] == 0).mean() > 0.5:
            continue
        image = Image.fromarray(cover.image[rows, columns])
        image.save(folder / "images" / f"{written:04d}.jpg", quality=90)
        Image.fromarray(label[rows, columns]).save(folder / "annotations" / f"{written:04d}.png")
        written += 1


def open_folder(folder: Path) -> FileSource:
    pairs = pair_folders(folder, "images", "annotations", (".jpg",), (".png",), "bench")
    return FileSource(folder, pairs, IndexLabels(SPEC))


def limit(folder: Path, rounds: int) -> dict[str, float]:
    """Decode both files from memory and resize them to the crop's size: images a second.

    The fastest decoder at hand: OpenCV's and Pillow's are tried.
    """
    pairs = [
        (path.read_bytes(), (folder / "annotations" / f"{path.stem}.png").read_bytes())
        for path in sorted((folder / "images").glob("*.jpg"))
    ]

    def opencv(data: bytes, flags: int) -> np.ndarray:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)

    def with_opencv() -> None:
        for jpeg, png in pairs:
            cv2.resize(opencv(jpeg, cv2.IMREAD_COLOR), (SIZE, SIZE))
            label = opencv(png, cv2.IMREAD_UNCHANGED)
            cv2.resize(label, (SIZE, SIZE), interpolation=cv2.INTER_NEAREST)

    def with_pillow() -> None:
        for jpeg, png in pairs:
            image = Image.open(io.BytesIO(jpeg)).convert("RGB")
            cv2.resize(np.asarray(image), (SIZE, SIZE))
            label = np.asarray(Image.open(io.BytesIO(png)))
            cv2.resize(label, (SIZE, SIZE), interpolation=cv2.INTER_NEAREST)

    return {
        "limit_opencv": rounds * len(pairs) / _cpu_seconds(with_opencv, rounds),
        "limit_pillow": rounds * len(pairs) / _cpu_seconds(with_pillow, rounds),
    }


def _cpu_seconds(work: Callable[[], None], rounds: int) -> float:
    work()
    start = time.process_time()
    for _ in range(rounds):
        work()
    return time.process_time() - start


def open_stream(root: Path, workers: int) -> Batches:
    """The training pipeline as a run has it, from the shards in `root`."""
    config = DataConfig()
    source = RecordSource(root, "train", SPEC, narrow=True)
    statistics = source.statistics()
    names = [(name,) for name in SPEC.names]
    sampler = QuerySampler(
        statistics.rarity(),
        config.negative_rate,
        confusable=confusable(statistics, names),
        hard_rate=config.hard_negative_rate,
    )
    rows = tuple((c,) for c in range(SPEC.num_classes))
    covers = np.arange(SPEC.num_classes, dtype=np.int32)[:, None]
    make = CropWithNames(CropRules(SIZE), NamedQueries(config.num_queries, sampler, rows, covers))
    parts = [Part(Guarded(source, SPEC.num_classes), make)]
    return mixed_stream(parts, seed=0, batch_size=BATCH, workers=workers)


def per_core(root: Path, count: int) -> float:
    """Crops per second of processor time, threads of this process."""
    with open_stream(root, 0) as batches:
        next(batches)
        start, seen = time.process_time(), 0
        while seen < count:
            seen += len(next(batches)["label"])
        return seen / (time.process_time() - start)


def by_the_clock(root: Path, workers: int, count: int) -> float:
    """Crops per second with worker processes; their start and their buffers are not counted."""
    with open_stream(root, workers) as batches:
        for _ in range(4 * workers):
            next(batches)
        start, seen = time.monotonic(), 0
        while seen < count:
            seen += len(next(batches)["label"])
        return seen / (time.monotonic() - start)


def torch_rate(python: str, folder: Path, count: int) -> float:
    """Raises UserError: that interpreter cannot run it."""
    script = Path(__file__).with_name("torch_loader.py")
    command = [python, str(script), str(folder), str(SIZE), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"--torch-python={python}: {last}")
    return float(json.loads(done.stdout)["crops_per_second"])


def _turn(folder: Path, root: Path, torch_python: str | None, count: int) -> dict[str, float]:
    rates = limit(folder, max(1, count // IMAGES))
    rates["ours"] = per_core(root, count)
    if torch_python:
        rates["torch"] = torch_rate(torch_python, folder, count)
    return rates | {f"workers_{n}": by_the_clock(root, n, count) for n in (1, 2)}


def run(torch_python: str | None, count: int) -> dict[str, Any]:
    """Rates (medians over TURNS) and their ratios, of this run on this machine."""
    cv2.setNumThreads(1)
    keep_freed_memory()  # the bare limit gets it too
    with tempfile.TemporaryDirectory() as scratch:
        folder, root = Path(scratch) / "folder", Path(scratch) / "shards"
        write_images(folder)
        prepare_split(partial(open_folder, folder), SPEC, "train", root, shard_examples=256)
        turns = [_turn(folder, root, torch_python, count) for _ in range(TURNS)]
    result: dict[str, Any] = {k: statistics.median(t[k] for t in turns) for k in turns[0]}
    best = max(result["limit_opencv"], result["limit_pillow"])
    result["ours_to_limit"] = result["ours"] / best
    if torch_python:
        result["ours_to_torch"] = result["ours"] / result["torch"]
    result["scaling"] = result["workers_2"] / result["workers_1"]
    result["turns"] = turns
    result["cores"] = len(os.sched_getaffinity(0))
    result["load"] = os.getloadavg()[0]
    return result
