# SPDX-License-Identifier: Apache-2.0
"""CLIP's image encoder, numerically equal to `transformers.CLIPVisionModelWithProjection`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx

from digseg_jax.arraytypes import Array, DTypeLike, Float
from digseg_jax.errors import UserError
from digseg_jax.models.hub_config import TRANSFORMERS_HARMLESS, HubConfig
from digseg_jax.models.layers import Compute, Shared, layer_norm, linear
from digseg_jax.models.text.clip import ClipEncoder, check_tower
from digseg_jax.models.text.clip_text import tower_values

# Mean and deviation of pixels in [0, 1], the same for every OpenAI and OpenCLIP encoder
# (`preprocessor_config.json`).
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig(HubConfig):
    """Fields and defaults of transformers' `CLIPVisionConfig`."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    CLASS_NAME: ClassVar[str] = "CLIPVisionModelWithProjection"
    HARMLESS: ClassVar = TRANSFORMERS_HARMLESS

    def __post_init__(self):
        check_tower(self.CLASS_NAME, self)
        if self.image_size % self.patch_size:
            raise UserError(
                f"{self.CLASS_NAME} config: image_size {self.image_size} is not a multiple of "
                f"patch_size {self.patch_size}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds from an encoder's own `config.json` or that of a whole CLIPModel."""
        return super().from_dict(tower_values(values, "vision_config"))

    def to_dict(self) -> dict[str, Any]:
        """The content of a `config.json` that transformers reads."""
        values = {k: v for k, v in super().to_dict().items() if k != "_class_name"}
        return {"architectures": [self.CLASS_NAME], "model_type": "clip_vision_model", **values}


class VisionOutput(NamedTuple):
    """Features of the class token and the patches, and one projected vector per image.

    Attributes:
        last_hidden_state: [b, 1 + patches, d], the class token first, before the last norm.
        image_embeds: [b, e] in the space shared with text, not normalized.
    """

    last_hidden_state: Float[Array, "b l d"]
    image_embeds: Float[Array, "b e"]


class PatchEmbedding(nnx.Module):
    """Embeds patches: a convolution without bias whose stride is its size, as one matrix product."""

    def __init__(self, config: ClipVisionConfig, *, compute: Compute, rngs: nnx.Rngs):
        size = config.patch_size
        shape = (size, size, config.num_channels, config.hidden_size)
        self.kernel = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape))
        self.dtype = compute.dtype

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b l d"]:
        kernel = self.kernel[...].astype(self.dtype)
        b, h, w, c = x.shape
        p = kernel.shape[0]

        # Patches to rows, in the order of the kernel's own pixels.
        x = x.astype(self.dtype).reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3)
        return x.reshape(b, -1, p * p * c) @ kernel.reshape(p * p * c, -1)


class ClipVisionEmbeddings(nnx.Module):
    """Class token and patches, with positions added."""

    def __init__(self, config: ClipVisionConfig, *, compute: Compute, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        count = (config.image_size // config.patch_size) ** 2 + 1
        self.dtype = compute.dtype
        self.class_embedding = nnx.Param(init(rngs.params(), (config.hidden_size,)))
        self.patch_embedding = PatchEmbedding(config, compute=compute, rngs=rngs)
        self.position_embedding = nnx.Embed(
            count, config.hidden_size, dtype=compute.dtype, embedding_init=init, rngs=rngs
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b l d"]:
        patches = self.patch_embedding(x)
        b, length, d = patches.shape

        # The class token comes first, as in the checkpoints' table of positions.
        first = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (b, 1, d))
        tokens = jnp.concatenate([first, patches], axis=1)
        return tokens + self.position_embedding(jnp.arange(length + 1))


class ClipVisionTransformer(nnx.Module):
    """The encoder without its projection."""

    def __init__(self, config: ClipVisionConfig, *, compute: Compute, rngs: nnx.Rngs):
        options: Shared = {"compute": compute, "rngs": rngs}
        d, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings = ClipVisionEmbeddings(config, **options)
        self.pre_layrnorm = layer_norm(d, eps=eps, **options)  # misspelled in every checkpoint
        self.encoder = ClipEncoder(config, causal=False, **options)
        self.post_layernorm = layer_norm(d, eps=eps, **options)

    def __call__(self, x: Float[Array, "b h w c"]) -> tuple[Array, Array]:
        """Returns token features [b, l, d] and the normalized class token [b, d]."""
        # Only the class token is normalized at the end: it alone stands for the image.
        tokens = self.encoder(self.pre_layrnorm(self.embeddings(x)))
        return tokens, self.post_layernorm(tokens[:, 0])


class CLIPVisionModelWithProjection(nnx.Module):
    """Encodes images to vectors that can be compared with texts.

    The cosine with a vector of `CLIPTextModelWithProjection` says how well image and text match.
    """

    def __init__(self, config: ClipVisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        options: Shared = {"compute": Compute(dtype), "rngs": rngs}
        self.config = config
        self.vision_model = ClipVisionTransformer(config, **options)
        self.visual_projection = linear(
            config.hidden_size, config.projection_dim, bias=False, **options
        )

    def __call__(self, pixel_values: Float[Array, "b h w 3"]) -> VisionOutput:
        """Encodes images that `normalize_pixels` has normalized.

        Raises:
            UserError: the images do not have `config.image_size`.
        """
        size, found = self.config.image_size, pixel_values.shape[1:3]
        if found != (size, size):
            raise UserError(f"CLIP image is {found[0]}x{found[1]}; the model takes {size}x{size}")

        tokens, pooled = self.vision_model(pixel_values)
        return VisionOutput(tokens, self.visual_projection(pooled))


def normalize_pixels(image: Float[Array, "b h w 3"], size: int) -> Float[Array, "b size size 3"]:
    """Converts images in [-1, 1], the VAE's range, to CLIP's pixel values; resizes bicubically."""
    # Bicubic interpolation overshoots at edges, hence the clip.
    image = (image.astype(jnp.float32) + 1) / 2
    shape = (image.shape[0], size, size, image.shape[3])
    image = jnp.clip(jax.image.resize(image, shape, "cubic"), 0, 1)
    return (image - jnp.asarray(PIXEL_MEAN)) / jnp.asarray(PIXEL_STD)
