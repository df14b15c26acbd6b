# SPDX-License-Identifier: Apache-2.0
"""A folder of cached latents, made up so that each value tells its example, mirroring and class."""

from __future__ import annotations

import hashlib
import io
import itertools
import json

import numpy as np
from etils import epath

from digseg_jax.config.schema import DataConfig, LoadingConfig
from digseg_jax.data.datasets import registry
from digseg_jax.data.datasets.statistics import ClassStatistics
from digseg_jax.data.pipeline import training_stream
from digseg_jax.data.shards import files
from digseg_jax.data.shards import latents as latent_records
from digseg_jax.data.shards.latents import (
    encode_record,
)
from digseg_jax.data.shards.records import class_hash

SPEC = registry.spec("camvid")


SIZE, LATENT, COUNT, SHARD = 32, (8, 8, 4), 7, 3


ABSENT = -1.0


def label_of(i: int) -> np.ndarray:
    """Two classes side by side, the left one a third wide: a mirrored label shows."""
    label = np.full((SIZE, SIZE), (i + 1) % SPEC.num_classes, np.int32)
    label[:, : SIZE // 3] = i % SPEC.num_classes
    label[0, :3] = -1
    return label


def value_of(i: int, mirrored: bool, c: int | None) -> float:
    """What the made-up latents are filled with: of the image (c is None) or of a class's mask."""
    return 1000.0 * i + 500.0 * mirrored + (0 if c is None else c + 1)


def record(i: int, mirrored: bool) -> bytes:
    label = label_of(i)[:, ::-1] if mirrored else label_of(i)
    classes = sorted(set(np.unique(label).tolist()) - {-1})
    values = [value_of(i, mirrored, c) for c in (None, *classes)]
    latents = np.stack([np.full(LATENT, v, np.float32) for v in values])
    return encode_record(f"näme {i}", label, classes, latents)


def write_cache(root, **changes):
    """root/camvid/train as the job writes it, of made-up latents."""
    folder = epath.Path(root) / "camvid" / "train"
    folder.mkdir(parents=True)
    shards, statistics = -(-COUNT // SHARD), ClassStatistics.empty(SPEC.num_classes)
    plan = {"source_examples": COUNT, "shard_examples": SHARD}
    files.claim(folder, plan, "")
    for shard in range(shards):
        with files.new_shard(folder, shard, shards) as (writer, facts):
            rows = range(COUNT)[shard * SHARD : (shard + 1) * SHARD]
            for i, mirrored in itertools.product(rows, (False, True)):
                writer.write(record(i, mirrored))
                if not mirrored:
                    statistics.add(label_of(i))
            facts["examples"] = len(rows)
    file = io.BytesIO()
    np.save(file, np.full(LATENT, ABSENT, np.float32))
    (folder / latent_records.ABSENT).write_bytes(file.getvalue())
    manifest = plan | {
        "format": latent_records.FORMAT, "codec": "binary", "image_size": SIZE,
        "class_hash": class_hash(SPEC), "examples": COUNT, "statistics": statistics.to_dict(),
        "shards": files.sidecars(folder, shards),
        "absent_sha256": hashlib.sha256(file.getvalue()).hexdigest(),
    }  # fmt: skip
    (folder / latent_records.MANIFEST).write_text(json.dumps(manifest | changes))
    return folder


def config(root, **changes):
    values = {"name": "camvid", "image_size": SIZE, "num_queries": 4, "latent_cache": str(root)}
    values |= {"scale_min": 1.0, "scale_max": 1.0, "class_share_cap": 1.0, "jitter": 0.0}
    return DataConfig(**(values | changes))


def batches(config, n, **options):
    options = {"seed": 1, "batch_size": 4, "start": 0, "host": 0, "hosts": 1} | options
    options = {"loading": LoadingConfig()} | options
    with training_stream(config, "segmentation", **options) as stream:
        return list(itertools.islice(stream, n))
