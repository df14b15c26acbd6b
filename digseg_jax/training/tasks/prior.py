# SPDX-License-Identifier: Apache-2.0
"""A small text-to-image latent diffusion model: the pretrained prior that the segmenter starts from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from digseg_jax.arraytypes import Array, Batch, Params
from digseg_jax.config.schema import ComputeConfig, DiffusionConfig, ModelConfig, UnetArch
from digseg_jax.models import functional
from digseg_jax.models.remat import activation_bytes
from digseg_jax.models.text_branch import ZERO_INIT
from digseg_jax.models.unet import DOWN_TYPES, UP_TYPES, UNet2DConditionModel, UNetConfig
from digseg_jax.training.tasks.base import Task, to_unit
from digseg_jax.training.tasks.parts import (
    bank_arrays,
    bank_rows,
    check_size,
    check_tokens,
    draw_noise_and_timestep,
    encode_bank,
    load_tower,
    load_vae,
    schedule_from,
    unet_options,
)
from digseg_jax.weights import save_component


class PriorTask(Task):
    """MSE of the noise (or v, or x0) prediction on image latents, captions by cross-attention.

    captions: texts of the prompt bank. size: pixels of a crop's side. seed: of the initial weights.

    Raises:
      UserError: weights are missing, or parts do not fit together or to the size.
    """

    def __init__(
        self,
        captions: Sequence[str],
        arch: UnetArch,
        model: ModelConfig,
        compute: ComputeConfig,
        diffusion: DiffusionConfig,
        *,
        size: int,
        seed: int,
    ):
        self.seed, self.diffusion = seed, diffusion
        self.schedule = schedule_from(diffusion)

        # Frozen parts: the autoencoder, and every caption encoded once.
        self.vae, vae_params = load_vae(model, compute)
        tower = load_tower(model)
        self.prompts = tuple(captions)
        self.frozen: Params = {
            "vae": vae_params,
            "bank": bank_arrays(encode_bank(tower, self.prompts, model)),
        }

        # A small U-Net, whose text adapters bring the tokens to its width.
        levels = len(arch.block_out_channels)
        self.unet_config = UNetConfig(
            sample_size=size // self.vae.config.factor,
            in_channels=self.vae.config.latent_channels,
            out_channels=self.vae.config.latent_channels,
            block_out_channels=arch.block_out_channels,
            down_block_types=(DOWN_TYPES[0],) * levels,
            up_block_types=tuple(UP_TYPES[0 if attend else 1] for attend in arch.up_attention),
            layers_per_block=arch.layers_per_block,
            norm_num_groups=arch.norm_num_groups,
            attention_head_dim=arch.attention_head_dim,
            cross_attention_dim=arch.cross_attention_dim,
            use_linear_projection=True,
            text_adapters=model.text_adapters,
            text_dim=tower.width,
        )
        check_size("data.image_size", size, self.vae, self.unet_config)
        check_tokens(tower, self.unet_config)

        # Its structure and the parameters' shapes; nothing is allocated.
        self.graphdef, self.abstract = functional.abstract(
            lambda: UNet2DConditionModel(
                self.unet_config,
                rngs=functional.FixedRngs(),
                **unet_options(model, compute),
            )
        )

        # Memory of a train step, for the choice of mesh and microbatches.
        cells, channels = self.unet_config.sample_size**2, arch.block_out_channels[0]
        self._activations = activation_bytes(cells, channels, model.dtype, compute.remat)

    def initial(self) -> Params:
        return functional.random_init(self.abstract, self.seed, zero=ZERO_INIT)

    def activation_bytes(self) -> float:
        return self._activations

    def loss(
        self,
        params: Params,
        frozen: Params,
        batch: Batch,
        keys: Array,
        whole: Batch | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        x0 = self.vae.encode(frozen["vae"], to_unit(batch["image"]))
        noise, t = draw_noise_and_timestep(keys, x0.shape[1:], self.diffusion, self.schedule)
        query = batch["query"][:, 0]
        unet = functional.merge(self.graphdef, params)
        prediction = unet(
            self.schedule.add_noise(x0, noise, t),
            t,
            *bank_rows(frozen["bank"], query),
        )
        loss = jnp.square(prediction - self.schedule.target(x0, noise, t)).mean()
        return loss, {"latent_std": x0.std()}

    def export(self, params: Params, folder: Path, metadata: dict[str, str]) -> None:
        save_component((self.unet_config, params), folder, metadata=metadata)
