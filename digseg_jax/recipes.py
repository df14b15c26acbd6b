# SPDX-License-Identifier: Apache-2.0
"""Settings that the experiment files share: fine-tuning a Stable Diffusion U-Net on a public data set.

Each line says where its value is from: the paper; Marigold (arXiv 2312.02145) where the paper is
silent; or "ours" where both are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from digseg_jax.config.parse import default
from digseg_jax.data.datasets.domains import DOMAINS, shareable_domains
from digseg_jax.errors import UserError, nearest

# multi-resolution noise: annealed, strength 0.9
MARIGOLD = {"timestep_sampling": "uniform", "noise": "multires", "sampler_share": 0.0}
# what Stable Diffusion 1.5 was trained for; x0 term: SDSeg, without which a single step of this target
# makes errors 15 times as large
EPSILON: Mapping[str, Any] = {
    "diffusion": {"prediction_type": "epsilon", "zero_snr": False},
    "x0_weight": 1.0,
}


@dataclasses.dataclass(frozen=True)
class Version:
    """The checkpoints that an experiment starts from, by their names in `digseg_jax.weights.catalog`.

    Attributes:
        pipeline: a Stable Diffusion, whose U-Net and autoencoder are used.
        text: a text encoder; empty: the pipeline's own.
        diffusion: keys of config.diffusion that differ from the other versions'.
        x0_weight: of the error of the clean latent.
        text_injection: value of config.model.text_injection.
    """

    pipeline: str
    text: str = ""
    diffusion: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    x0_weight: float = 0.0
    text_injection: str = "adapter"

    @property
    def text_spec(self) -> str:
        """The text encoder as a value of `config.model.text`."""
        # Imported here: it loads JAX, which the other recipes and a wrong key do not need.
        from digseg_jax.weights.catalog import hub_id

        return hub_id(self.text) if self.text else f"{hub_id(self.pipeline)}:text_encoder"


VERSIONS = {
    # CLIP ViT-L/14, the text encoder of the paper's first table; moved to Marigold's target
    "sd15": Version("sd-1.5"),
    # the default, ours: the paper names no version; Marigold's family, trained for v as here
    "sd21": Version("sd-2.1"),
    "marigold": Version("marigold"),  # a U-Net that takes the image latent already
    # paper: the other text encoders, of its first table and of its table of MoNuSeg. Their tokens are
    # new to the U-Net, so it keeps the target that it knows.
    "vitb16": Version("sd-1.5", "clip-b16", **EPSILON),
    "biomedclip": Version("sd-1.5", "biomedclip", **EPSILON),
}
# the same checkpoints with another diffusion, or another pathway of the text
RECIPES = {
    "sd15_epsilon": Version("sd-1.5", **EPSILON),
    "marigold_recipe": Version("sd-2.1", diffusion=MARIGOLD),  # Marigold 1.1
    # Marigold 1.0: at the last timestep of Stable Diffusion's own schedule some signal is left
    "marigold_recipe_v1": Version("sd-2.1", diffusion=MARIGOLD | {"zero_snr": False}),
    # paper: CLIP's text in a pathway parallel to the U-Net's own. Its tokens are 768 wide, those that
    # Stable Diffusion 2.1 was trained with 1024.
    "sd21_clip": Version("sd-2.1", "clip-l14", text_injection="parallel"),
}


def land_cover() -> ml_collections.ConfigDict:
    """The default configuration with crops of the land cover as they come from the map.

    Tiles have one scale on the ground and no upright, and absent classes are asked for evenly.
    """
    config = default()
    config.data.scale_unit = "pixel"
    config.data.scale_min = config.data.scale_max = 1.0
    config.data.quarter_turns = True
    config.data.class_share_cap = 1.0
    config.data.jitter = 0.0
    config.data.repeat_threshold = 0.3
    config.data.hard_negative_rate = 0.0
    return config


def stable_diffusion(
    version: str, dataset: str, others: tuple[str, ...] = ()
) -> ml_collections.ConfigDict:
    """A configuration that fine-tunes one of `VERSIONS` or `RECIPES` on a data set, and evaluates it on
    val.

    Args:
      version: what the user wrote after the colon of --config.
      dataset: value of config.data.name.
      others: versions that the experiment file defines itself, for the message.

    Raises:
      UserError: no such version.
    """
    known = VERSIONS | RECIPES
    if version not in known:
        versions = (*known, *others)
        raise UserError(
            f"--config: no version {version!r}{nearest(version, versions)}; legal after the "
            f"colon: {', '.join(versions)}"
        )

    config = default()
    config.data.name = dataset
    config.data.image_size = 512  # paper
    config.data.num_queries = 4  # ours
    config.loading.workers = 4  # ours

    _model(config, known[version])
    _training(config)

    config.eval.split = "val"
    config.eval.ensemble = 8  # paper: its headline E-Step is 8x2
    config.eval.steps = 2  # paper
    config.eval.spacing = "trailing"  # paper
    config.eval.calibrate = False  # paper: mentions none; it would need a split of its own
    return config


def _model(config: ml_collections.ConfigDict, version: Version) -> None:
    """Sets the checkpoints to start from, how they are computed, and the diffusion."""
    from digseg_jax.weights.catalog import find, hub_id  # as in `Version.text_spec`

    config.model.vae = f"{hub_id(version.pipeline)}:vae"
    config.model.unet = f"{hub_id(version.pipeline)}:unet"
    config.model.text = version.text_spec  # paper: CLIP text

    # Text: the tokens that Stable Diffusion was trained with.
    config.model.max_tokens = 77  # CLIP's; most of BiomedCLIP's 256 would be padding, and masked
    # ours: Stable Diffusion attends to all 77 tokens of a CLIP text encoder
    known = find(version.text_spec)
    config.model.mask_padding = known is None or known.masks_padding
    config.model.sentence_token = False  # ours: the tokens that Stable Diffusion was trained with
    config.model.text_adapters = True  # paper: text enters at several scales
    config.model.text_injection = version.text_injection

    # Computation: what fits in memory, and is fast there.
    config.model.dtype = "bfloat16"  # ours: activations only, the weights stay float32
    config.compute.attention = "auto"
    config.compute.accumulation = 0  # ours: as few microbatches as fit, on a single GPU more than one
    config.compute.remat = "block"  # ours: a tenth more FLOPs, half the temporaries (aot/RECORD.md)
    config.compute.vae_batch = 4  # ours: at 512 px an image's maps take a quarter of a GB each
    config.compute.unet_batch = 32  # ours: an 8x2 ensemble for 16 queries takes 24 GB at once

    # Diffusion.
    config.diffusion.prediction_type = "v_prediction"  # Marigold
    config.diffusion.zero_snr = True  # Marigold 1.1
    # ours, after GenMask: with Marigold's uniform timesteps, public attempts at binary masks began
    # with empty ones; its multi-resolution noise goes with uniform timesteps
    config.diffusion.timestep_sampling = "high_noise"
    config.diffusion.noise = "gaussian"
    # ours: half of the draws are where 8x2 samples, at 999 and 499. Few would be at 499 otherwise, and
    # on the land cover a second step then brings a little more (tests/bench/RESULTS.md).
    config.diffusion.sampler_share = 0.5
    config.diffusion.update(version.diffusion)
    config.loss.x0_weight = version.x0_weight


def _training(config: ml_collections.ConfigDict) -> None:
    """Sets the optimizer and the length of the training."""
    config.optim.learning_rate = 3e-5  # Marigold
    config.optim.warmup_steps = 100  # Marigold
    config.optim.schedule = "exponential"  # Marigold
    config.optim.final_scale = 0.01  # Marigold
    config.optim.b2 = 0.999  # Marigold: Adam as it comes
    config.optim.weight_decay = 0.0  # Marigold
    config.optim.clip_norm = 1.0  # ours
    config.optim.ema_decay = 0.999  # ours

    config.train.steps = 30_000  # Marigold
    config.train.batch_size = 32  # Marigold
    config.logging.eval_every = 500  # Marigold's interval; ours: 16 images, to see empty masks early
    config.checkpoint.every = 1_000  # ours
    config.mesh.fsdp = 0  # ours: chosen from the chips and their number


def on_domains(version: str, *, scored: bool = True) -> ml_collections.ConfigDict:
    """Data and optimization of a training on the generalist's domains.

    The learning rate is constant and the weights are averaged: every checkpoint can be used, and a run
    can be extended. `optim.cooldown_steps` lets the rate fall over the last steps.

    version: "all"; "shareable" for the domains whose terms allow weights trained on them to be passed
      on; or the name of one domain, which has no names of others to ask for, and is what is scored.
    scored: whether the run is evaluated; only a segmenter is.

    Raises:
      UserError: another version.
    """
    versions = {"all": DOMAINS, "shareable": shareable_domains()} | {d.name: (d,) for d in DOMAINS}
    if version not in versions:
        raise UserError(
            f"--config: no version {version!r}; legal after the colon: {', '.join(versions)}"
        )
    config = default()
    chosen = versions[version]
    config.data.mixture = tuple(domain.part() for domain in chosen)

    # A run's own evaluations score one data set: of a single domain itself, else the land cover, which
    # needs no files.
    if scored:
        one = chosen[0] if len(chosen) == 1 else next(d for d in DOMAINS if d.name == "landcover")
        config.data.name = one.reader
        config.eval.split = one.val
        config.eval.short_side = one.short_side
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 500
    config.optim.schedule = "constant"
    config.optim.ema_decay = 0.9995
    config.logging.every = 50
    config.checkpoint.every = 250
    config.checkpoint.keep_every = 5_000
    return config
