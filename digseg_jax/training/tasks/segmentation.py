# SPDX-License-Identifier: Apache-2.0
"""DiGSeg: the U-Net denoises the latent of a query's mask beside the latent of the image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from digseg_jax import assets
from digseg_jax.arraytypes import Array, Batch, Bool, Float, Int, Params, UInt8
from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import Config
from digseg_jax.data.queries import HARD_ABSENT, PRESENT
from digseg_jax.models import functional
from digseg_jax.models.partition import in_slices
from digseg_jax.models.text_adapters import ZERO_INIT
from digseg_jax.models.unet import UNet2DConditionModel
from digseg_jax.segmentation.codec import latent_validity
from digseg_jax.segmentation.codecs import load_state, save_state
from digseg_jax.segmentation.latent_probe import enlarge
from digseg_jax.segmentation.sampling import member_noise, sample_mask_latents
from digseg_jax.training.tasks.base import Task, to_unit
from digseg_jax.training.tasks.parts import (
    ANCHORS,
    Parts,
    asked,
    draw_noise_and_timestep,
    load_parts,
    schedule_of,
    unet_options,
)
from digseg_jax.weights import load_unet_params, save_component


def load_task(config: Config, prompts: Sequence[str] | None = None) -> SegmentationTask:
    """The task of a configuration with its real parts; raises what `load_parts` raises."""
    return SegmentationTask(load_parts(config, prompts), config)


class SegmentationTask(Task):
    """The U-Net, widened to 8 input channels, among its parts."""

    def __init__(self, parts: Parts, config: Config):
        self.parts, self.config = parts, config
        self.schedule = schedule_of(config.diffusion)
        self.vae, self.codec, self.frozen = parts.vae, parts.codec, parts.frozen
        self.prompts, self.unet_config = parts.prompts, parts.unet
        self.graphdef, self.abstract = functional.abstract(
            lambda: UNet2DConditionModel(
                self.unet_config,
                rngs=functional.FixedRngs(),
                **unet_options(config.model),
            )
        )

    def initial(self) -> Params:
        """The pretrained U-Net with conv_in widened, or random weights if the config asks."""
        model = self.config.model
        random = partial(functional.random_init, seed=self.config.seed, zero=ZERO_INIT)
        if model.unet_init == "random":
            return random(self.abstract)
        # only what a checkpoint may lack: drawing all of a large U-Net takes longer than loading it
        lacking = {k: v for k, v in self.abstract.items() if k == "text_adapters"}
        return load_unet_params(
            assets.resolve(model.unet),
            self.unet_config,
            optional_prefixes=("text_adapters.",),
            initial=random(lacking),
        )

    def prepare(self) -> None:
        """Computes what programs hold as constants: the codec's; before any program is traced.

        It runs the autoencoder, and a program that is traced for a mesh would take its attention for a
        part of itself.
        """
        self.codec.prepare(self.vae.on_host(self.frozen["vae"]))

    def adopt(self, folder: Path) -> None:
        """Takes over what was stored beside the weights that are used: the codec's state.

        Raises:
          UserError: there is none, or it is of other classes.
        """
        load_state(self.codec, folder)

    def constants(self) -> dict[str, Any]:
        """The codec's state, which goes into a checkpoint."""
        return self.codec.state()

    def restore_constants(self, constants: dict[str, Any]) -> None:
        """Takes over `constants` of a checkpoint; before the first step is traced."""
        self.codec.restore(constants)
        self.prepare()

    def loss(
        self,
        params: Params,
        frozen: Params,
        batch: Batch,
        keys: Array,
        whole: Batch | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        label, rows = batch["label"], self.codec.text_rows(batch["query"])
        drawn = self.codec.draw(keys)

        # k mask images of each image, and its latent beside each of them.
        latents, x0 = self._latents(frozen, batch, drawn)
        k = x0.shape[1]
        image_latent = jnp.repeat(latents, k, axis=0)
        x0 = x0.reshape(-1, *x0.shape[2:])
        noise_keys = self._keys(keys, k)[:, 0]
        noise, t = draw_noise_and_timestep(
            noise_keys, x0.shape[1:], self.config.diffusion, self.schedule
        )
        noisy = self.schedule.add_noise(x0, noise, t)

        unet = functional.merge(self.graphdef, params)
        tokens, mask = self.codec.context(*self._text(frozen, rows, keys, whole), drawn)
        prediction = unet(
            jnp.concatenate([image_latent, noisy], axis=-1),
            t,
            tokens.reshape(-1, *tokens.shape[2:]),
            mask.reshape(-1, *mask.shape[2:]),
        )

        # The paper's loss: mean squared error over the cells that are labelled.
        valid = jnp.repeat(latent_validity(label, self.vae.config.factor), k, axis=0)
        squared = jnp.square(prediction - self.schedule.target(x0, noise, t)).mean(axis=-1)
        loss = (squared * valid).sum() / self._valid_cells(valid, whole)
        metrics = {"mean_timestep": t.mean()} | negative_shares(batch)
        if self.config.diffusion.mask_loss_weight:
            metrics["mse"] = loss
            clean, _ = self.schedule.x0_and_eps(prediction, noisy, t)
            metrics["mask_loss"] = self._mask_loss(frozen, batch, clean, valid, t, drawn)
            loss += self.config.diffusion.mask_loss_weight * metrics["mask_loss"]
        return loss, metrics

    def _latents(
        self, frozen: Params, batch: Batch, drawn: Any
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b k h w c"]]:
        """Of the images and of their masks: those of a cache, or encoded here."""
        if "image_latent" in batch:
            return batch["image_latent"], batch["mask_latent"]
        image = to_unit(batch["image"])
        masks = self.codec.encode(batch["label"], batch["query_class"], drawn)

        # An image goes beside its masks, so that no device hands one to another.
        images = jnp.concatenate([image[:, None], masks], axis=1)
        latents = self.vae.encode(frozen["vae"], images.reshape(-1, *image.shape[1:]))
        latents = latents.reshape(*images.shape[:2], *latents.shape[1:])
        return latents[:, 0], latents[:, 1:]

    def _text(
        self, frozen: Params, rows: Int[Array, "b t"], keys: Array, whole: Batch | None
    ) -> tuple[Float[Array, "b t l d"], Bool[Array, "b t l"]]:
        """Tokens and masks of the texts, varied as the configuration asks."""
        tokens, mask = asked(frozen["bank"], rows.reshape(-1))
        every = None
        if whole is not None:
            whole_rows = self.codec.text_rows(whole["query"])
            every, _ = asked(frozen["bank"], whole_rows.reshape(-1))

        draws = self._keys(keys, rows.shape[1])
        tokens = self._noisy_text(tokens, draws[:, 1], every)
        mask = self._fewer_words(mask, draws[:, 2])
        return tokens.reshape(*rows.shape, *tokens.shape[1:]), mask.reshape(*rows.shape, -1)

    def _mask_loss(
        self, frozen: Params, batch: Batch, clean: Array, valid: Array, t: Int[Array, " n"], drawn: Any
    ) -> Array:
        """Mean of the auxiliary loss over all mask images; those at low noise count as zero."""
        label = batch["label"]
        counts = t >= self.config.diffusion.mask_loss_from * self.schedule.num_timesteps
        anchors = frozen.get(ANCHORS)
        if anchors is None and (images := self.codec.anchors(label.shape[1])) is not None:
            anchors = self.vae.encode(frozen["vae"], images)
        loss = self.codec.mask_loss(clean, label, batch["query_class"], valid, anchors, drawn)
        return jnp.mean(counts * loss)

    def _valid_cells(self, valid: Bool[Array, "n h w"], whole: Batch | None) -> Array:
        """What the sum of the errors is divided by; of an accumulated batch, the parts' mean."""
        if whole is None:
            return jnp.maximum(valid.sum(), 1)
        images, queries = whole["query"].shape
        masks = self.codec.num_images(queries)
        cells = masks * latent_validity(whole["label"], self.vae.config.factor).sum()
        return jnp.maximum(cells, 1) * (valid.shape[0] / (images * masks))

    def _keys(self, keys: Array, count: int) -> Array:
        """Three independent keys for each of `count` masks or texts of an example, [b * count, 3]."""
        return jax.vmap(lambda key: jax.random.split(key, (count, 3)))(keys).reshape(-1, 3)

    def _noisy_text(
        self, tokens: Float[Array, "n l d"], keys: Array, every: Float[Array, "m l d"] | None = None
    ) -> Float[Array, "n l d"]:
        """Tokens with a little noise: neighbours of a trained name should mean the same.

        every: those of the whole batch, whose deviation counts; None: `tokens` are.
        """
        scale = self.config.data.text_noise
        if not scale:
            return tokens
        draws = jax.vmap(lambda key: jax.random.normal(key, tokens.shape[1:]))(keys)
        deviation = (tokens if every is None else every).std()
        return tokens + scale * deviation * draws

    def _fewer_words(self, mask: Bool[Array, "n l"], keys: Array) -> Bool[Array, "n l"]:
        """Leaves some queries nothing but the sentence token, which is the last one."""
        rate = self.config.data.word_dropout
        if not rate:
            return mask
        draws = jax.vmap(jax.random.uniform)(keys)
        return mask.at[:, :-1].set(mask[:, :-1] & (draws >= rate)[:, None])

    def evidence(
        self,
        params: Params,
        frozen: Params,
        image: UInt8[Array, "n h w 3"],
        index: Int[Array, " n"],
        estep: EStep,
        *,
        seed: int | Array | None = None,
        decoder: str = "vae",
    ) -> Float[Array, "n q e h w"]:
        """What every member says of every query: of `frozen["bank"]`, or of a closed codec's classes.

        index: names the image in the draws of the initial noise. seed: number or key of those draws,
        by default the configuration's. frozen["bank"]: texts for all images, or [n, q, ...] for each.
        decoder: "latent_mean" and "probe" are cheaper than "vae"; the former leaves one member.
        """
        latents = self.sample(params, frozen, image, index, estep, seed=seed)
        _, height, width, _ = image.shape
        return self.read(frozen, latents, (height, width), decoder)

    def sample(
        self,
        params: Params,
        frozen: Params,
        image: UInt8[Array, "n H W 3"],
        index: Int[Array, " n"],
        estep: EStep,
        *,
        seed: int | Array | None = None,
    ) -> Float[Array, "n k e h w c"]:
        """The mask latents that `evidence` reads; a larger ensemble begins with the smaller one."""
        image_latent = self.vae.encode(frozen["vae"], to_unit(image))
        seed = self.config.seed if seed is None else seed

        def denoise(*rows: Array) -> Array:
            limit = self.config.model.unet_limit
            return in_slices(lambda part: self.predict_latent(params, *part), rows, limit)

        return sample_mask_latents(
            denoise,
            image_latent,
            *self._context(frozen["bank"]),
            member_noise(seed, index, estep.ensemble, image_latent.shape[1:]),
            self.schedule,
            estep,
        )

    def _context(self, bank: Params) -> tuple[Array, Array]:
        """What cross-attention sees for each mask image: [k, l, d] for all images, or [n, k, l, d]."""
        tokens, mask = bank["tokens"], bank["mask"]
        if tokens.ndim == 4:
            return self.codec.context(tokens, mask)
        tokens, mask = self.codec.context(tokens[None], mask[None])
        return tokens[0], mask[0]

    def read(
        self,
        frozen: Params,
        latents: Float[Array, "n k e h w c"],
        size: tuple[int, int],
        decoder: str = "vae",
    ) -> Float[Array, "n q e H W"]:
        """Mask latents to evidence at `size` pixels."""
        if decoder == "probe":
            return enlarge(self.codec.read_latents(latents), *size)
        if decoder == "latent_mean":
            latents = latents.mean(axis=2, keepdims=True)

        # Each mask image is read as the s queries that it shows.
        n, k, e = latents.shape[:3]
        rows = latents.reshape(-1, *latents.shape[3:])
        evidence = self.vae.decode(frozen["vae"], rows, self.codec.decode)
        evidence = jnp.moveaxis(evidence.reshape(n, k, e, -1, *size), 3, 2)
        return evidence.reshape(n, -1, e, *size)

    def predict_latent(
        self,
        params: Params,
        image_latent: Float[Array, "n h w c"],
        x: Float[Array, "n h w c"],
        t: Int[Array, " n"],
        tokens: Float[Array, "n l d"],
        mask: Array,
    ) -> Float[Array, "n h w c"]:
        """The U-Net's raw prediction at x_t, for the sampler."""
        unet = functional.merge(self.graphdef, params)
        return unet(jnp.concatenate([image_latent, x], axis=-1), t, tokens, mask)

    def export(self, params: Params, folder: Path, metadata: dict[str, str]) -> None:
        save_component((self.unet_config, params), folder, metadata=metadata)
        save_state(self.codec, folder)


def negative_shares(batch: Batch) -> dict[str, Array]:
    """The rates of queries for absent classes that sampling really gave, where it tells them."""
    if "query_kind" not in batch:
        return {}
    kind = batch["query_kind"]
    return {
        "negative_share": (kind != PRESENT).mean(),
        "hard_negative_share": (kind == HARD_ABSENT).mean(),
    }
