# SPDX-License-Identifier: Apache-2.0
"""python -m digseg_jax.tools.check_codec: what binary and palette masks lose in the autoencoder.

Label maps of a data set are encoded, sent through the autoencoder and read back. The result is the
upper bound for any model trained on that codec: label accuracy and mIoU of both, the palette's
colors and sigma, and the share of the mask's variance that the linear latent decoder explains.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags

from digseg_jax.config.schema import ComputeConfig, ModelConfig
from digseg_jax.data.datasets import registry
from digseg_jax.log import setup
from digseg_jax.metrics import confusion
from digseg_jax.runtime import cpu
from digseg_jax.runtime.door import run_tool
from digseg_jax.segmentation.binary import BinaryCodec
from digseg_jax.segmentation.codec import Codec, HostAutoencoder
from digseg_jax.segmentation.latent_probe import enlarge
from digseg_jax.segmentation.palette import MAX_CLASSES, PaletteCodec
from digseg_jax.training.tasks.parts import Vae, load_vae

QUERIES = 8  # binary masks per call of the decoder


def check(vae: Vae, params: Any, source: Any, num_classes: int, images: int) -> dict[str, Any]:
    """Accuracy and mIoU of every way back, over `images` label maps spread evenly over the source."""
    # A palette has room for a limited number of classes; beyond it only the binary codec is checked.
    autoencoder = vae.on_host(params)
    binary = BinaryCodec()
    codecs: list[Codec] = [binary]
    if num_classes <= MAX_CLASSES:
        codecs.append(PaletteCodec(num_classes))
    for codec in codecs:
        codec.prepare(autoencoder)

    # Confusion counts are pooled over all maps.
    counts: dict[str, np.ndarray] = {}
    rows = np.unique(np.linspace(0, len(source) - 1, min(images, len(source))).astype(int))
    for row in rows:
        label = _whole_cells(np.asarray(source[int(row)]["label"]), autoencoder.factor)
        for codec in codecs:
            for name, prediction in round_trip(codec, autoencoder, label, num_classes).items():
                found = confusion.confusion(label[None], prediction[None], num_classes)
                counts[name] = counts.get(name, 0) + np.asarray(found, np.int64)

    # JSON-ready.
    result: dict[str, Any] = {"images": len(rows), "probe_r2": binary.probe.r2}
    result |= {codec.name: state for codec in codecs if (state := codec.state())}
    result["codecs"] = {name: confusion.closed_set_scores(c) for name, c in counts.items()}
    return result


def round_trip(
    codec: Codec, autoencoder: HostAutoencoder, label: np.ndarray, num_classes: int
) -> dict[str, np.ndarray]:
    """Sends a label map [h, w] through a codec; returns the maps that come back.

    NAME: read from the decoder's images; NAME_probe: from the latents alone.
    """
    evidence, probed = [], []

    # Always QUERIES masks at a time, so that one compilation serves; those beyond the last class are
    # dropped below. A codec that paints all classes together takes one call.
    step = QUERIES if codec.one_by_one else num_classes
    for first in range(0, num_classes, step):
        classes = np.arange(first, first + step)[None]
        images = codec.encode(jnp.asarray(label)[None], jnp.asarray(classes))[0]
        latents = autoencoder.encode(np.asarray(images))
        decoded = codec.decode(jnp.asarray(autoencoder.decode(latents)))
        evidence.append(np.asarray(decoded).reshape(-1, *label.shape))
        cells = codec.read_latents(jnp.asarray(latents)[None, :, None])[0, :, 0]
        probed.append(np.asarray(enlarge(cells, *label.shape)))

    # As in a prediction: each pixel goes to the class of the largest mask score.
    maps = [np.concatenate(x)[:num_classes].argmax(axis=0) for x in (evidence, probed)]
    return {codec.name: maps[0], f"{codec.name}_probe": maps[1]}


def _whole_cells(label: np.ndarray, factor: int) -> np.ndarray:
    """The label map without the pixels beyond the last whole group of 4 latent cells."""
    step = 4 * factor  # pixels
    height, width = (max(n // step, 1) * step for n in label.shape)
    return label[:height, :width]


def table(result: dict[str, Any]) -> str:
    """The result as a table for people."""
    rows = ["codec         label accuracy    mIoU"]
    for name, scores in result["codecs"].items():
        rows.append(f"{name:<14}{scores['accuracy']:>14.4f}{scores['miou']:>8.4f}")
    sigma = f", palette sigma {result['palette']['sigma']:.4f}" if "palette" in result else ""
    return "\n".join(
        [*rows, f"{result['images']} label maps, probe R2 {result['probe_r2']:.3f}{sigma}"]
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m digseg_jax.tools.check_codec", description=__doc__)
    parser.add_argument("--vae", default=ModelConfig().vae, help="as config.model.vae")
    parser.add_argument("--data", default="landcover", help="a data set of the registry")
    parser.add_argument("--root", default="", help="its folder; the land cover needs none")
    parser.add_argument("--split", default="", help="by default the one that is evaluated")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--json", action="store_true", help="print JSON alone on stdout")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args(argv)

    # grain reads absl's flags outside absl.app.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

    setup(quiet=arguments.json)
    cpu.tune()
    return run_tool(partial(_run, arguments))


def _run(arguments: argparse.Namespace) -> int:
    """Checks and prints what the options name; returns the exit status."""
    facts = registry.spec(arguments.data, arguments.root)
    split = arguments.split or facts.eval_split
    source = registry.open_source(arguments.data, arguments.root, split)
    model = dataclasses.replace(ModelConfig(), vae=arguments.vae)
    result = check(*load_vae(model, ComputeConfig()), source, facts.num_classes, arguments.images)

    result = {"data": arguments.data, "split": split, "vae": arguments.vae, **result}
    print(json.dumps(result) if arguments.json else table(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
