# SPDX-License-Identifier: Apache-2.0
"""The usual choice for each domain of the generalist: a U-Net in torch, trained on it from scratch.

It gets the crops that a specialist of ours gets (same data, scales, turns and colors), all classes of a
crop at once, cross-entropy, AdamW, and about as many parameters as the generalist's U-Net: 6 million.
It is trained for so many minutes of a core; the rate falls to 0 over them along a cosine.

What it sees tells what limits the generalist, whose U-Net gets latents of the frozen autoencoder: the
pixels, the pixels that the autoencoder gives back, or the latents.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from digseg_jax.config.experiment import load_config
from digseg_jax.config.schema import Config
from digseg_jax.data.datasets.domains import Domain
from digseg_jax.data.pipeline import training_stream
from digseg_jax.errors import UserError
from digseg_jax.evaluation.domains import domain_examples
from digseg_jax.log import log
from digseg_jax.training.tasks.base import to_unit
from digseg_jax.training.tasks.parts import load_vae
from tests.bench.domain_scores import chosen_domains, mean_row, score

WIDTHS = (28, 56, 112, 224)  # channels of the levels, the lowest has 448: 5.9 million parameters
LATENT_WIDTHS = (96, 160, 256)  # of a U-Net on latents, the lowest has 512: 8.4 million parameters
SEES = ("pixels", "decoded", "latents")
RATE = 1e-3
WEIGHT_DECAY = 1e-2
BATCH = 8

Inputs = Callable[[np.ndarray], torch.Tensor]  # images uint8 [b, h, w, 3] to [b, c, h / f, w / f]


class Block(nn.Sequential):
    """Two convolutions, each with batch normalization and ReLU."""

    def __init__(self, before: int, after: int):
        layers: list[nn.Module] = []
        for channels in (before, after):
            layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class UNet(nn.Module):
    """The U-Net of Ronneberger et al. (2015) with padding: [b, i, h, w] -> logits [b, c, H, W].

    enlarge: H / h.
    """

    def __init__(self, classes: int, widths: Sequence[int], inputs: int = 3, enlarge: int = 1):
        super().__init__()
        self.enlarge = enlarge
        pairs = list(zip((inputs, *widths), widths, strict=False))
        self.down = nn.ModuleList(Block(a, b) for a, b in pairs)
        self.middle = Block(widths[-1], widths[-1] * 2)
        below = (*widths[1:], widths[-1] * 2)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in zip(widths, below, strict=True)
        )
        self.merge = nn.ModuleList(Block(2 * a, a) for a in widths)
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The sides are made divisible by what the levels halve, and cut back at the end.
        height, width = x.shape[-2:]
        unit = 2 ** len(self.down)
        x = F.pad(x, (0, -width % unit, 0, -height % unit), mode="replicate")

        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for up, merge in reversed(list(zip(self.up, self.merge, strict=True))):
            x = merge(torch.cat([kept.pop(), up(x)], 1))
        logits = self.head(x)[..., :height, :width]
        return F.interpolate(logits, scale_factor=self.enlarge, mode="bilinear")


def run(
    root: str,
    split: str,
    images: int,
    minutes: float,
    only: Sequence[str] = (),
    seed: int = 0,
    widths: Sequence[int] = (),
    sees: str = "pixels",
) -> dict[str, Any]:
    """Mean IoU of a U-Net on every domain, each trained on this domain.

    Args:
      root: folder of all domains.
      split: as --config.eval.split takes it in the suite.
      images: of the scored split, evenly spread; 0: all.
      minutes: of one core, for each training.
      only: names of domains; empty: all.
      seed: of the weights and of the crops.
      widths: channels of the levels; empty: WIDTHS or, on latents, LATENT_WIDTHS.
      sees: "pixels"; "decoded", the pixels after the generalist's autoencoder; or its "latents".
    """
    torch.set_num_threads(1)
    widths = widths or (LATENT_WIDTHS if sees == "latents" else WIDTHS)
    inputs = make_inputs(sees)
    rows: dict[str, Any] = {}
    for domain in chosen_domains(only):
        try:
            rows[domain.name] = _one(domain, root, split, images, minutes, seed, widths, inputs)
        except UserError as error:
            rows[domain.name] = {"missing": str(error)}
        log.info("%s: %s", domain.name, rows[domain.name])
    facts = {"split": split, "minutes": minutes, "seed": seed, "batch": BATCH, "widths": list(widths)}
    facts["sees"] = sees
    return facts | {"domains": rows, "mean": mean_row(rows)}


def _one(
    domain: Domain,
    root: str,
    split: str,
    images: int,
    minutes: float,
    seed: int,
    widths: Sequence[int],
    inputs: Inputs,
) -> dict[str, Any]:
    """The row of one domain."""
    scored = domain_examples(domain, root, split, images)
    torch.manual_seed(seed)
    shape = inputs(np.zeros((1, 32, 32, 3), np.uint8)).shape
    model = UNet(len(scored.classes), widths, shape[1], 32 // shape[-1])
    model = model.to(memory_format=torch.channels_last)
    steps = _train(model, domain, root, minutes, seed, inputs)
    model.eval()

    def predict(image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        with torch.inference_mode():
            return model(inputs(image[None]))[0].argmax(0).numpy()[:height, :width]

    parameters = sum(p.numel() for p in model.parameters())
    return score(scored, domain.short_side, predict) | {"steps": steps, "parameters": parameters}


def _train(model: UNet, domain: Domain, root: str, minutes: float, seed: int, inputs: Inputs) -> int:
    """Trains on the domain's crops until the minutes are over; returns the number of steps."""
    config = load_config(f"generalist:{domain.name}", **{"data.root": root})
    stream = training_stream(
        config.data,
        config.task,
        seed=seed,
        batch_size=BATCH,
        start=0,
        host=0,
        hosts=1,
        loading=config.loading,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)

    # Seconds of the processor, not of the clock: other programs must not shorten the training.
    started, steps, done = time.process_time(), 0, 0.0
    for batch in stream:
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 + math.cos(math.pi * done)) / 2
        label = torch.from_numpy(np.asarray(batch["label"])).long()
        logits = model(inputs(np.asarray(batch["image"])))
        loss = F.cross_entropy(logits, label, ignore_index=-1)
        if bool((label >= 0).any()):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        steps += 1
        done = (time.process_time() - started) / 60 / minutes
        if steps % 50 == 0:
            log.info("%s: step %d, %.0f %%, loss %.3f", domain.name, steps, 100 * done, loss.item())
        if done >= 1:
            break
    return steps


def make_inputs(sees: str) -> Inputs:
    """The function that makes the network's input of images, for a word of SEES."""
    if sees == "pixels":
        return lambda images: _channels_first(to_unit(images))
    defaults = Config()
    vae, weights = load_vae(dataclasses.replace(defaults.model, vae="assets:vae"), defaults.compute)
    encode = jax.jit(lambda images: vae.encode(weights, images))
    decode = jax.jit(lambda latents: vae.decode(weights, latents))

    def inputs(images: np.ndarray) -> torch.Tensor:
        # The sides are made divisible by a latent cell; what is added is cut from the answer again.
        height, width = images.shape[1:3]
        factor = vae.config.factor
        more = ((0, 0), (0, -height % factor), (0, -width % factor), (0, 0))
        latents = encode(to_unit(np.pad(images, more, mode="edge")))
        if sees == "latents":
            return _channels_first(latents)
        return _channels_first(np.clip(decode(latents), -1, 1)[:, :height, :width])

    return inputs


def _channels_first(images: Any) -> torch.Tensor:
    """float32 [b, c, h, w] of [b, h, w, c], in the memory layout that torch's convolutions like."""
    x = torch.from_numpy(np.array(images, np.float32).transpose(0, 3, 1, 2))
    return x.contiguous(memory_format=torch.channels_last)
