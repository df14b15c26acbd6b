# SPDX-License-Identifier: Apache-2.0
"""Training the small AutoencoderKL on images and on the binary masks that it will have to carry."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from digseg_jax.arraytypes import Array, Batch, Float, Params
from digseg_jax.config.schema import ComputeConfig, VaeArch
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.models.vae import AutoencoderKL, VaeConfig
from digseg_jax.models.vae_init import carry_colors
from digseg_jax.segmentation.binary import encode_binary
from digseg_jax.training.tasks.base import Task, to_unit
from digseg_jax.training.tasks.parts import attention_of
from digseg_jax.weights import save_component

MASK_SHARPNESS = 4.0  # turns a decoded mask in [-1, 1] into logits; only the sign matters later


class AutoencoderTask(Task):
    """Absolute and squared error on images, cross-entropy on masks, a little KL.

    dtype: of activations. size: pixels of a crop's side. seed: of the initial weights.

    Raises:
      UserError: a size that the levels cannot halve often enough.
    """

    def __init__(self, arch: VaeArch, compute: ComputeConfig, *, dtype: str, size: int, seed: int):
        self.seed, self.kl_weight = seed, arch.kl_weight
        self.color_weight, self.carry_colors = arch.color_weight, arch.carry_colors

        # The structure and the parameters' shapes; nothing is allocated.
        self.config = VaeConfig(
            block_out_channels=arch.block_out_channels,
            layers_per_block=arch.layers_per_block,
            norm_num_groups=arch.norm_num_groups,
            mid_block_add_attention=arch.mid_block_add_attention,
            sample_size=size,
        )
        if size % self.config.factor:
            raise UserError(
                f"config.data.image_size={size}: must be a multiple of {self.config.factor} pixels for "
                f"config.vae_arch.block_out_channels={arch.block_out_channels}"
            )
        self.graphdef, self.abstract = functional.abstract(
            lambda: AutoencoderKL(
                self.config,
                rngs=functional.FixedRngs(),
                dtype=jnp.dtype(dtype),
                conv="cpu" if compute.conv == "cpu" else "xla",
                attention=attention_of(compute),
                remat=compute.remat,
            )
        )
        self.frozen: Params = {}

    def initial(self) -> Params:
        params = functional.random_init(self.abstract, self.seed)
        return carry_colors(params, self.config) if self.carry_colors else params

    def loss(
        self,
        params: Params,
        frozen: Params,
        batch: Batch,
        keys: Array,
        whole: Batch | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        # Images and one mask of each, through the autoencoder.
        vae = functional.merge(self.graphdef, params)
        image = to_unit(batch["image"])
        mask = encode_binary(batch["label"], batch["query_class"][:, :1])[:, 0]
        both = jnp.concatenate([image, mask])
        posterior = vae.encode(both)

        # A sample of the posterior; an image and its mask draw from the image's key.
        draws = jax.vmap(lambda k: jax.random.normal(k, (2, *posterior.mean.shape[1:])))(keys)
        noise = jnp.concatenate([draws[:, 0], draws[:, 1]])
        decoded = vae.decode(posterior.mean + jnp.exp(0.5 * posterior.logvar) * noise)

        # The errors of images and masks, and how far the posterior is from the prior.
        n = image.shape[0]
        error = decoded[:n] - image
        image_loss = jnp.abs(error).mean() + jnp.square(error).mean()
        mask_loss = mask_error(decoded[n:], mask)
        kl = 0.5 * (jnp.square(posterior.mean) + jnp.exp(posterior.logvar) - 1 - posterior.logvar)
        color = color_error(error, self.config.factor)
        loss = image_loss + mask_loss + self.kl_weight * kl.mean() + self.color_weight * color

        metrics = {
            "image_mae": jnp.abs(error).mean(),
            "color_mae": color,
            "mask_loss": mask_loss,
            "mask_iou": binary_iou(decoded[n:], mask),
            "kl": kl.mean(),
            "latent_std": posterior.mean.std(),
        }
        return loss, metrics

    def export(self, params: Params, folder: Path, metadata: dict[str, str]) -> None:
        """Writes the autoencoder; the scaling factor must be in `config` by now."""
        save_component((self.config, params), folder, metadata=metadata)


def color_error(error: Float[Array, "b h w 3"], cell: int) -> Array:
    """Mean absolute error of the mean color of cells of `cell` pixels, along opponent axes.

    Pixel errors are dominated by texture that latents of four channels cannot carry; left alone they
    crowd out small differences of hue, which is what separates cropland from grass.
    """
    b, h, w, _ = error.shape
    mean = error.reshape(b, h // cell, cell, w // cell, cell, 3).mean(axis=(2, 4))
    red, green, blue = jnp.moveaxis(mean, -1, 0)
    return jnp.abs(jnp.stack([red - green, green - blue, (red + green + blue) / 3])).mean()


def mask_error(decoded: Float[Array, "b h w 3"], mask: Float[Array, "b h w 3"]) -> Array:
    """Cross-entropy of the channel mean, plus a small squared error that ties it to +-1."""
    logits = MASK_SHARPNESS * decoded.mean(axis=-1)
    cross_entropy = jax.nn.softplus(-logits * mask[..., 0]).mean()
    return cross_entropy + 0.1 * jnp.square(decoded - mask).mean()


def binary_iou(decoded: Float[Array, "b h w 3"], mask: Float[Array, "b h w 3"]) -> Array:
    """Foreground IoU at the threshold 0, pooled over the batch."""
    predicted, true = decoded.mean(axis=-1) > 0, mask[..., 0] > 0
    union = (predicted | true).sum()
    return (predicted & true).sum() / jnp.maximum(union, 1)
