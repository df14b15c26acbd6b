# SPDX-License-Identifier: Apache-2.0
"""DiGSeg (arXiv 2604.24575): a U-Net denoises the latent of a mask beside the image's latent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from digseg_jax.arraytypes import Array, Batch, Bool, Float, Int, Params, UInt8
from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import Config
from digseg_jax.data.sources import labels_of
from digseg_jax.models import functional
from digseg_jax.models.partition import in_slices
from digseg_jax.models.remat import activation_bytes
from digseg_jax.models.unet import UNet2DConditionModel
from digseg_jax.segmentation.codec import latent_validity
from digseg_jax.segmentation.codecs import load_state, save_state
from digseg_jax.segmentation.latent_probe import enlarge
from digseg_jax.segmentation.sampling import (
    PredictLatent,
    member_noise,
    sample_mask_latents,
    step_mask_latents,
)
from digseg_jax.training.tasks.base import Task, to_unit
from digseg_jax.training.tasks.parts import (
    ANCHORS,
    Parts,
    bank_rows,
    check_size,
    draw_noise_and_timestep,
    load_parts,
    schedule_from,
    unet_options,
)
from digseg_jax.training.tasks.shares import negative_shares, part_losses
from digseg_jax.training.tasks.unet_start import initial_unet
from digseg_jax.weights import save_component


class SegmentationTask(Task):
    """Fine-tuning of a U-Net, widened to 8 input channels, to denoise the latents of masks.

    Shapes: b images of h * w latent cells with c channels; q queries, asked in t texts of l tokens and
    painted into k mask images; n = b * k pairs of an image and a mask image; e ensemble members.

    parts: the frozen autoencoder, the prompt bank and the codec, loaded or as mere shapes; by default
      loaded as the configuration names them.

    Raises:
      UserError: sizes that the parts cannot halve often enough, or what `load_parts` raises.
    """

    def __init__(self, config: Config, parts: Parts | None = None):
        if parts is None:
            parts = load_parts(config.data, config.model, config.compute, config.loss)
        check_size("data.image_size", config.data.image_size, parts.vae, parts.unet)
        check_size("eval.view_size", config.eval.view_size, parts.vae, parts.unet)
        self.parts, self.config = parts, config
        self.schedule = schedule_from(config.diffusion)
        self.vae, self.codec, self.frozen = parts.vae, parts.codec, parts.frozen
        self.prompts, self.unet_config, self.new = parts.prompts, parts.unet, parts.new

        # The U-Net's structure and parameter shapes; nothing is allocated.
        self.graphdef, self.abstract = functional.abstract(
            lambda: UNet2DConditionModel(
                self.unet_config,
                rngs=functional.FixedRngs(),
                **unet_options(config.model, config.compute),
            )
        )

    def initial(self) -> Params:
        """Parameters at step 0: the pretrained U-Net with conv_in widened, or random weights."""
        config, tower = self.config, self.parts.tower
        return initial_unet(config.model, self.unet_config, self.abstract, tower, config.seed)

    def prepare(self) -> None:
        """Computes the codec's constants with the autoencoder; must run before any program is traced.

        Inside a trace for a mesh, the autoencoder's attention would become part of the traced program.
        """
        self.codec.prepare(self.vae.on_host(self.frozen["vae"]))

    def adopt(self, folder: Path) -> None:
        """Restores the codec's state from the folder of the weights in use.

        Raises:
          UserError: the state is missing, or belongs to other classes.
        """
        load_state(self.codec, folder)

    def constants(self) -> dict[str, Any]:
        """The codec's state, to be stored in a checkpoint."""
        return self.codec.state()

    def restore_constants(self, constants: dict[str, Any]) -> None:
        """Restores `constants` from a checkpoint; must run before the first step is traced."""
        self.codec.restore(constants)
        self.prepare()

    def activation_bytes(self) -> float:
        """Estimated bytes of the U-Net's activations per image, for all of its mask images."""
        data, channels = self.config.data, self.unet_config.block_out_channels[0]
        masks = self.codec.num_images(data.num_queries)
        cells = masks * (data.image_size // self.vae.config.factor) ** 2
        return activation_bytes(cells, channels, self.config.model.dtype, self.config.compute.remat)

    def loss(
        self,
        params: Params,
        frozen: Params,
        batch: Batch,
        keys: Array,
        whole: Batch | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """Mean squared error over the labeled latent cells, plus the auxiliary losses that are on.

        Args:
          frozen: {"vae", "bank"}, and the anchors of a codec that needs them.
          batch: image uint8 [b, H, W, 3] or its cached latent; label int32 [b, H, W], -1 is ignored;
            query int32 [b, q], rows of the bank; query_class.
          keys: one random key per image, a function of (seed, running index of the example).
          whole: the full batch if `batch` is a microbatch of it; see `Trainable.loss`.
        """
        label, rows = batch["label"], self.codec.text_rows(batch["query"])
        drawn = self.codec.draw(keys, batch["query_class"])

        # Encode each image once and its k mask images: n = b * k pairs of latents.
        latents, x0 = self._latents(frozen, batch, drawn)
        k = x0.shape[1]
        image_latent = jnp.repeat(latents, k, axis=0)  # [n, h, w, c]
        x0 = x0.reshape(-1, *x0.shape[2:])  # [n, h, w, c]

        # Noise the mask latents, each with its own noise and timestep.
        noise_keys = self._keys(keys, k)[:, 0]
        noise, t = draw_noise_and_timestep(
            noise_keys, x0.shape[1:], self.config.diffusion, self.schedule
        )
        noisy = self.schedule.add_noise(x0, noise, t)

        # Predict from [image, noisy mask] and the text: noise, clean latent or v, as configured.
        unet = functional.merge(self.graphdef, params)
        tokens, mask = self.codec.context(*self._text(frozen, rows, keys, whole), drawn)
        prediction = unet(
            jnp.concatenate([image_latent, noisy], axis=-1),
            t,
            tokens.reshape(-1, *tokens.shape[2:]),
            mask.reshape(-1, *mask.shape[2:]),
        )

        # The paper's loss, averaged over the cells that carry a label.
        valid = jnp.repeat(latent_validity(label, self.vae.config.factor), k, axis=0)
        cells = self._valid_cells(valid, whole)
        squared = jnp.square(prediction - self.schedule.target(x0, noise, t)).mean(axis=-1)
        loss = (squared * valid).sum() / cells
        metrics = {"mean_timestep": t.mean()} | negative_shares(batch)
        if "part" in batch:
            own = squared.reshape(len(label), -1), valid.reshape(len(label), -1)
            metrics |= part_losses(*own, batch["part"], labels_of(self.config.data.mixture))

        # The auxiliary losses (not in the paper) judge the clean latent that the prediction stands for:
        # by its distance from the true one (SDSeg), and by the mask that is read from it.
        weights = self.config.loss
        if weights.x0_weight or weights.mask_weight:
            metrics["mse"] = loss
            clean, _ = self.schedule.x0_and_eps(prediction, noisy, t)
        if weights.x0_weight:
            metrics["x0_loss"] = (jnp.abs(clean - x0).mean(axis=-1) * valid).sum() / cells
            loss += weights.x0_weight * metrics["x0_loss"]
        if weights.mask_weight:
            metrics["mask_loss"] = self._mask_loss(frozen, batch, clean, valid, t, drawn)
            loss += weights.mask_weight * metrics["mask_loss"]
        return loss, metrics

    def _latents(
        self, frozen: Params, batch: Batch, drawn: Any
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b k h w c"]]:
        """Latents of the images and of their mask images, from the cache or freshly encoded."""
        if "image_latent" in batch:
            return batch["image_latent"], batch["mask_latent"]

        image = to_unit(batch["image"])
        masks = self.codec.encode(batch["label"], batch["query_class"], drawn)

        # Concatenated per image, so that each device encodes its own rows and nothing is resharded.
        images = jnp.concatenate([image[:, None], masks], axis=1)
        latents = self.vae.encode(frozen["vae"], images.reshape(-1, *image.shape[1:]))
        latents = latents.reshape(*images.shape[:2], *latents.shape[1:])
        return latents[:, 0], latents[:, 1:]

    def _text(
        self, frozen: Params, rows: Int[Array, "b t"], keys: Array, whole: Batch | None
    ) -> tuple[Float[Array, "b t l d"], Bool[Array, "b t l"]]:
        """Tokens and token masks of the texts, with the configured noise and word dropout.

        rows: of the prompt bank. keys: one per image.
        """
        tokens, mask = bank_rows(frozen["bank"], rows.reshape(-1))

        # The noise is scaled by the full batch's tokens, so that accumulation does not change the step.
        every = None
        if whole is not None:
            whole_rows = self.codec.text_rows(whole["query"])
            every, _ = bank_rows(frozen["bank"], whole_rows.reshape(-1))

        # Of the three keys the first draws the noise of the mask images; the others vary the text.
        draws = self._keys(keys, rows.shape[1])
        tokens = self._noisy_text(tokens, draws[:, 1], every)
        mask = self._fewer_words(mask, draws[:, 2])
        return tokens.reshape(*rows.shape, *tokens.shape[1:]), mask.reshape(*rows.shape, -1)

    def _mask_loss(
        self, frozen: Params, batch: Batch, clean: Array, valid: Array, t: Int[Array, " n"], drawn: Any
    ) -> Array:
        """Mean of the codec's auxiliary loss over all mask images; those at low noise count as zero.

        clean: predicted clean latents [n, h, w, c]. valid: labeled cells [n, h, w]. t: timesteps.
        """
        label = batch["label"]
        counts = t >= self.config.loss.mask_from * self.schedule.num_timesteps

        # Latents of reference images that the loss compares with: a frozen part, or encoded here.
        anchors = frozen.get(ANCHORS)
        if anchors is None and (images := self.codec.anchors(label.shape[1])) is not None:
            anchors = self.vae.encode(frozen["vae"], images)
        loss = self.codec.mask_loss(clean, label, batch["query_class"], valid, anchors, drawn)
        return jnp.mean(counts * loss)

    def _valid_cells(self, valid: Bool[Array, "n h w"], whole: Batch | None) -> Array:
        """Divisor of the summed errors: the number of valid cells, at least 1.

        For a microbatch it is the full batch's number times the microbatch's share of it, so that the
        mean of the microbatches' losses is the loss of the full batch.
        """
        if whole is None:
            return jnp.maximum(valid.sum(), 1)

        # Valid cells of the full batch: each image's cells count once for each of its mask images.
        images, queries = whole["query"].shape
        masks = self.codec.num_images(queries)
        cells = masks * latent_validity(whole["label"], self.vae.config.factor).sum()
        return jnp.maximum(cells, 1) * (valid.shape[0] / (images * masks))

    def _keys(self, keys: Array, count: int) -> Array:
        """Three independent keys for each of `count` mask images or texts per image: [b * count, 3]."""
        return jax.vmap(lambda key: jax.random.split(key, (count, 3)))(keys).reshape(-1, 3)

    def _noisy_text(
        self, tokens: Float[Array, "n l d"], keys: Array, every: Float[Array, "m l d"] | None = None
    ) -> Float[Array, "n l d"]:
        """Adds Gaussian noise to tokens, so that words close to a trained one mean the same.

        `data.text_noise` is its standard deviation as a share of the tokens' (not in the paper).

        every: tokens of the full batch, whose standard deviation scales the noise; None if `tokens` are
          the full batch.
        """
        scale = self.config.data.text_noise
        if not scale:
            return tokens

        # One key per text: the draw does not depend on the other texts of the batch.
        draws = jax.vmap(lambda key: jax.random.normal(key, tokens.shape[1:]))(keys)
        deviation = (tokens if every is None else every).std()
        return tokens + scale * deviation * draws

    def _fewer_words(self, mask: Bool[Array, "n l"], keys: Array) -> Bool[Array, "n l"]:
        """Hides the words of a share of texts, `data.word_dropout`; keeps the last, sentence token."""
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
        """Samples masks and reads each member's evidence, in [-1, 1] for the binary codec.

        Args:
          frozen: frozen["bank"] has the texts, for all images together or [n, q, ...] for each.
          index: identifies each image in the draws of the initial noise.
          seed: number or key of those draws; by default the configuration's seed.
          decoder: "vae"; or "latent_mean", which leaves one member, or "probe", which are cheaper.
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
        """Samples the mask latents of k mask images and e = `estep.ensemble` members.

        Members have noise of their own, so a larger ensemble begins with the members of a smaller one.
        """
        # One encoding of an image serves all of its members and queries.
        image_latent = self.vae.encode(frozen["vae"], to_unit(image))
        seed = self.config.seed if seed is None else seed

        # The noise is a function of (seed, image index, member), whatever the batch and the mesh.
        return sample_mask_latents(
            self._denoise(params),
            image_latent,
            *self._contexts(frozen["bank"], estep.ensemble),
            member_noise(seed, index, estep.ensemble, image_latent.shape[1:]),
            self.schedule,
            estep,
        )

    def start(
        self,
        frozen: Params,
        image: UInt8[Array, "n H W 3"],
        index: Int[Array, " n"],
        ensemble: int,
        *,
        seed: int | Array,
    ) -> tuple[Float[Array, "n h w c"], Float[Array, "n k e h w c"]]:
        """What `sample` begins with: the images' latents, and every mask image's initial noise."""
        latent = self.vae.encode(frozen["vae"], to_unit(image))
        noise = member_noise(seed, index, ensemble, latent.shape[1:])

        # All mask images of a member share its noise.
        masks = self._context(frozen["bank"])[0].shape[-3]
        return latent, jnp.repeat(noise[:, None], masks, axis=1)

    def step(
        self,
        params: Params,
        bank: Params,
        image_latent: Float[Array, "n h w c"],
        x: Float[Array, "n k h w c"],
        now: tuple[Array, Array, Array],
        member: int | Array = 0,
    ) -> tuple[Float[Array, "n k h w c"], Float[Array, "n k h w c"]]:
        """One step of `sample` for one member; see `step_mask_latents`."""
        context = self._context(bank, member)
        denoise = self._denoise(params)
        return step_mask_latents(denoise, image_latent, *context, x, self.schedule, now)

    def _denoise(self, params: Params) -> PredictLatent:
        """The U-Net's prediction, at most `compute.unet_batch` rows at a time to bound memory."""
        limit = self.config.compute.unet_batch
        return lambda *rows: in_slices(lambda part: self.predict_latent(params, *part), rows, limit)

    def _context(self, bank: Params, member: int | Array = 0) -> tuple[Array, Array]:
        """Tokens for cross-attention, one row per mask image: [k, l, d], or [n, k, l, d] per image."""
        tokens, mask = bank["tokens"], bank["mask"]

        # The codec takes a leading axis of images: one for texts that all images share.
        if tokens.ndim == 4:
            return self.codec.member_context(tokens, mask, member)
        tokens, mask = self.codec.member_context(tokens[None], mask[None], member)
        return tokens[0], mask[0]

    def _contexts(self, bank: Params, ensemble: int) -> tuple[Array, Array]:
        """`_context` for all members; [n or 1, k, e, l, d] where they differ."""
        if not self.codec.recolored:
            return self._context(bank)
        every = [self._context(bank, member) for member in range(ensemble)]
        tokens = jnp.stack([tokens for tokens, _ in every], axis=-3)
        mask = jnp.stack([mask for _, mask in every], axis=-2)
        return (tokens, mask) if tokens.ndim == 5 else (tokens[None], mask[None])

    def read(
        self,
        frozen: Params,
        latents: Float[Array, "n k e h w c"],
        size: tuple[int, int],
        decoder: str = "vae",
        first: int | Array = 0,
    ) -> Float[Array, "n q e H W"]:
        """Decodes mask latents to evidence at `size` = (height, width) pixels.

        decoder: "vae" decodes each member, "latent_mean" their mean (e = 1), unless they are
        `recolored`; "probe" enlarges a linear reading. first: number of the first member.
        """
        if decoder == "probe":
            return enlarge(self.codec.in_places(self.codec.read_latents(latents), first), *size)
        if decoder == "latent_mean" and not self.codec.recolored:
            latents = latents.mean(axis=2, keepdims=True)

        # Decode all rows, and read each mask image as the s queries that it shows (q = k * s). The
        # codec reads slices as they are decoded, so that decoded images need not be kept.
        n, k, e = latents.shape[:3]
        rows = latents.reshape(-1, *latents.shape[3:])
        evidence = self.vae.decode(frozen["vae"], rows, self.codec.decode)
        evidence = jnp.moveaxis(evidence.reshape(n, k, e, -1, *size), 3, 2)  # [n, k, s, e, h, w]
        return self.codec.in_places(evidence.reshape(n, -1, e, *size), first)

    def predict_latent(
        self,
        params: Params,
        image_latent: Float[Array, "n h w c"],
        x: Float[Array, "n h w c"],
        t: Int[Array, " n"],
        tokens: Float[Array, "n l d"],
        mask: Array,
    ) -> Float[Array, "n h w c"]:
        """The U-Net's raw prediction at mask latent x and timestep t, for the sampler."""
        unet = functional.merge(self.graphdef, params)
        return unet(jnp.concatenate([image_latent, x], axis=-1), t, tokens, mask)

    def export(self, params: Params, folder: Path, metadata: dict[str, str]) -> None:
        """Writes the U-Net to FOLDER/unet, in diffusers' layout, and the codec's state beside it."""
        save_component((self.unet_config, params), folder / "unet", metadata=metadata)
        save_state(self.codec, folder)
