# SPDX-License-Identifier: Apache-2.0
"""DiGSeg: the U-Net denoises the latent of a query's mask beside the latent of the image."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from digseg_jax import assets
from digseg_jax.arraytypes import Array, Batch, Bool, Float, Int, Params, UInt8
from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import Config
from digseg_jax.data.queries import HARD_ABSENT, PRESENT
from digseg_jax.data.vocabulary import bank_prompts, num_classes
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.models.partition import in_slices
from digseg_jax.models.text_adapters import ZERO_INIT
from digseg_jax.models.unet import UNet2DConditionModel, UNetConfig
from digseg_jax.segmentation.codecs import decode_binary, encode_binary, latent_validity
from digseg_jax.segmentation.latent_probe import LatentProbe, enlarge, fit_probe
from digseg_jax.segmentation.mask_loss import (
    balanced_bce_and_dice,
    balanced_ce_and_dice,
    cell_shares,
    class_shares,
    latent_evidence,
    palette_logits,
)
from digseg_jax.segmentation.palette import (
    Palette,
    build_palette,
    decode_palette,
    encode_palette,
)
from digseg_jax.segmentation.sampling import member_noise, sample_mask_latents
from digseg_jax.training.tasks.base import to_unit
from digseg_jax.training.tasks.components import (
    asked,
    bank_arrays,
    check_fit,
    draw_noise_and_timestep,
    encode_bank,
    load_tower,
    load_vae,
    schedule_of,
    unet_options,
)
from digseg_jax.weights import load_config, load_unet_params, save_component

PALETTE_PROMPT = "segmentation map of all classes"
PALETTE_NAME = "palette.json"  # beside the weights: another palette would misread their output
PATCH_CELLS = 8  # latent cells; a side of the flat pictures of the palette's colours
MASK_ENDS = "mask_ends"  # key of the frozen tree


def wants_mask_ends(config: Config) -> bool:
    """Whether the latents of an empty and of a full mask are frozen parts, [2, h, w, c]: the auxiliary
    loss needs them, and training from a cache does not run the autoencoder."""
    binary = config.segmentation.codec == "binary"
    return bool(binary and config.data.latent_cache and config.diffusion.mask_loss_weight)


class SegmentationTask:
    """Builds everything from the config: frozen VAE and prompt bank, U-Net widened to 8 inputs.

    prompts: the bank's texts; by default those of the training queries. With the palette codec there
      is one text, which asks for all classes at once.
    """

    def __init__(self, config: Config, prompts: Sequence[str] | None = None):
        model = config.model
        self.config = config
        self.schedule = schedule_of(config.diffusion)
        self.vae, vae_params = load_vae(model)
        self.tower = load_tower(model)
        self.codec = config.segmentation.codec
        if self.codec == "palette":
            prompts = (PALETTE_PROMPT,)
        elif prompts is None:
            prompts = bank_prompts(config.data)
        self.prompts = tuple(prompts)
        self.frozen: Params = {
            "vae": vae_params,
            "bank": bank_arrays(encode_bank(self.tower, prompts, model)),
        }
        if wants_mask_ends(config):
            ends = np.full((2, *[config.data.image_size] * 2, 3), -1.0, np.float32)
            ends[1] = 1.0
            self.frozen[MASK_ENDS] = np.asarray(self._encode(vae_params, jnp.asarray(ends)))
        stored: UNetConfig = load_config(assets.resolve(model.unet))
        self.unet_config = dataclasses.replace(
            stored,
            in_channels=2 * self.vae.config.latent_channels,
            text_adapters=model.text_adapters,
            text_dim=self.tower.width,
        )
        check_fit(config, self.vae, self.tower, self.unet_config)
        self.graphdef, self.abstract = functional.abstract(
            lambda: UNet2DConditionModel(
                self.unet_config,
                rngs=functional.FixedRngs(),
                **unet_options(model),
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

    def adopt(self, folder: Path) -> None:
        """Takes over what was stored beside the weights that are used: the palette.

        Raises:
          UserError: the config asks for a palette and there is none, or it has another size.
        """
        path = folder / PALETTE_NAME
        if self.codec != "palette":
            return
        if not path.is_file():
            raise UserError(f"{path}: missing; these weights were not trained with a palette")
        stored = Palette.from_dict(json.loads(path.read_text(encoding="utf-8")))
        if len(stored.colors) != self._num_classes():
            raise UserError(f"{path}: {len(stored.colors)} colours for {self._num_classes()} classes")
        self.palette = stored

    def prepare(self) -> None:
        """Computes what programs hold as constants: palette and probe; before any program is traced.

        Both run the autoencoder, and a program that is traced for a mesh would take its attention for
        a part of itself.
        """
        _ = (self.palette, self.palette_latents) if self.codec == "palette" else self.probe

    @functools.cached_property
    def palette(self) -> Palette:
        """The colors of the label set, chosen with this autoencoder."""
        _require_no_trace("palette")
        return build_palette(self._num_classes(), self.round_trip, self.latents)

    @functools.cached_property
    def probe(self) -> LatentProbe:
        """The linear probe of this autoencoder's mask latents."""
        _require_no_trace("probe")
        return fit_probe(lambda image: self._encode(self.frozen["vae"], image))

    def _num_classes(self) -> int:
        return num_classes(self.config.data)

    @functools.cached_property
    def palette_latents(self) -> Float[np.ndarray, "k c"]:
        """What the autoencoder makes of flat images of the palette's colors."""
        _require_no_trace("palette_latents")
        size = PATCH_CELLS * self.vae.config.factor
        flat = np.broadcast_to(self.palette.colors[:, None, None], (self._num_classes(), size, size, 3))
        return self.latents(flat.astype(np.float32)).mean(axis=(1, 2))

    def latents(self, image: np.ndarray) -> np.ndarray:
        """Images [n, h, w, 3] in [-1, 1] to latents, on the host."""
        return np.asarray(self._encode(self.frozen["vae"], jnp.asarray(image)))

    def round_trip(self, image: np.ndarray) -> np.ndarray:
        """Images [n, h, w, 3] in [-1, 1] through the autoencoder and back, on the host."""
        return np.asarray(self._decode(self.frozen["vae"], jnp.asarray(self.latents(image))))

    @functools.cached_property
    def _encode(self):
        return jax.jit(self.vae.encode)

    @functools.cached_property
    def _decode(self):
        return jax.jit(self.vae.decode)

    def _bank_rows(self, batch: Batch) -> Int[Array, "b q"]:
        """The texts of a batch; a palette asks one thing of every image."""
        if self.codec == "palette":
            return jnp.zeros((len(batch["label"]), 1), jnp.int32)
        return batch["query"]

    def _targets(self, batch: Batch) -> Float[Array, "b q h w 3"]:
        """The pictures to denoise, one for each of `_bank_rows`."""
        if self.codec == "palette":
            return encode_palette(batch["label"], jnp.asarray(self.palette.colors))[:, None]
        return encode_binary(batch["label"], batch["query_class"])

    def loss(
        self,
        params: Params,
        frozen: Params,
        batch: Batch,
        keys: Array,
        whole: Batch | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        label, query = batch["label"], self._bank_rows(batch)
        q = query.shape[1]
        latents, x0 = self._latents(frozen, batch)
        image_latent = jnp.repeat(latents, q, axis=0)
        x0 = x0.reshape(-1, *x0.shape[2:])
        noise_keys, text_keys, word_keys = self._query_keys(keys, q)
        noise, t = draw_noise_and_timestep(
            noise_keys, x0.shape[1:], self.config.diffusion, self.schedule
        )
        every = None
        if whole is not None:
            every, _ = asked(frozen["bank"], self._bank_rows(whole).reshape(-1))
        tokens, mask = asked(frozen["bank"], query.reshape(-1))
        unet = functional.merge(self.graphdef, params)
        noisy = self.schedule.add_noise(x0, noise, t)
        prediction = unet(
            jnp.concatenate([image_latent, noisy], axis=-1),
            t,
            self._noisy_text(tokens, text_keys, every),
            self._fewer_words(mask, word_keys),
        )
        valid = jnp.repeat(latent_validity(label, self.vae.config.factor), q, axis=0)
        squared = jnp.square(prediction - self.schedule.target(x0, noise, t)).mean(axis=-1)
        loss = (squared * valid).sum() / self._valid_cells(valid, whole)
        metrics = {"mean_timestep": t.mean()} | negative_shares(batch)
        if self.config.diffusion.mask_loss_weight:
            metrics["mse"] = loss
            clean, _ = self.schedule.x0_and_eps(prediction, noisy, t)
            metrics["mask_loss"] = self._mask_loss(frozen, batch, clean, valid, t)
            loss += self.config.diffusion.mask_loss_weight * metrics["mask_loss"]
        return loss, metrics

    def _latents(
        self, frozen: Params, batch: Batch
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b q h w c"]]:
        """Of the pictures and of their targets: those of a cache, or encoded here."""
        if "image_latent" in batch:
            return batch["image_latent"], batch["mask_latent"]
        image, masks = to_unit(batch["image"]), self._targets(batch)
        # beside its masks, so that no device hands a picture to another
        pictures = jnp.concatenate([image[:, None], masks], axis=1)
        latents = self.vae.encode(frozen["vae"], pictures.reshape(-1, *image.shape[1:]))
        latents = latents.reshape(*pictures.shape[:2], *latents.shape[1:])
        return latents[:, 0], latents[:, 1:]

    def _mask_loss(
        self, frozen: Params, batch: Batch, clean: Array, valid: Array, t: Int[Array, " n"]
    ) -> Array:
        """Mean of the auxiliary loss over all queries; those at low noise count as zero."""
        counts = t >= self.config.diffusion.mask_loss_from * self.schedule.num_timesteps
        if self.codec == "palette":
            shares = class_shares(batch["label"], self.vae.config.factor, self._num_classes())
            logits = palette_logits(clean, jnp.asarray(self.palette_latents))
            return jnp.mean(counts * balanced_ce_and_dice(logits, shares, valid))
        masks = self._targets(batch)
        masks = masks.reshape(-1, *masks.shape[2:])

        def encode(ends: Float[Array, "2 H W 3"]) -> Float[Array, "2 h w c"]:
            # latents of a cache are trained from without the autoencoder
            return frozen[MASK_ENDS] if MASK_ENDS in frozen else self.vae.encode(frozen["vae"], ends)

        evidence = latent_evidence(clean, encode, masks.shape[1])
        share = cell_shares(masks, self.vae.config.factor)
        return jnp.mean(counts * balanced_bce_and_dice(evidence, share, valid))

    def _valid_cells(self, valid: Bool[Array, "n h w"], whole: Batch | None) -> Array:
        """What the sum of the errors is divided by; of an accumulated batch, the parts' mean."""
        if whole is None:
            return jnp.maximum(valid.sum(), 1)
        images, queries = self._bank_rows(whole).shape
        cells = queries * latent_validity(whole["label"], self.vae.config.factor).sum()
        return jnp.maximum(cells, 1) * (valid.shape[0] / (images * queries))

    def _query_keys(self, keys: Array, q: int) -> tuple[Array, Array, Array]:
        """Three independent keys for each (example, query), flattened to [b * q]."""
        triples = jax.vmap(lambda key: jax.random.split(key, (q, 3)))(keys).reshape(-1, 3)
        return triples[:, 0], triples[:, 1], triples[:, 2]

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
        """What every member says of every query of `frozen["bank"]`, in [-1, 1]; with the palette
        codec, of every class (see `decode_palette`).

        index: names the image in the draws of the initial noise. seed: number or key of those draws,
        by default the configuration's. frozen["bank"]: texts for all images, or [n, q, ...] for each.
        decoder: "latent_mean" and "probe" are cheaper than "vae"; the former leaves one member.
        """
        latents = self.sample(params, frozen, image, index, estep, seed=seed)
        return self.read(frozen, latents, image.shape[1:3], decoder)

    def sample(
        self,
        params: Params,
        frozen: Params,
        image: UInt8[Array, "n h w 3"],
        index: Int[Array, " n"],
        estep: EStep,
        *,
        seed: int | Array | None = None,
    ) -> Float[Array, "n q e h w c"]:
        """The mask latents that `evidence` reads; a larger ensemble begins with the smaller one."""
        image_latent = self.vae.encode(frozen["vae"], to_unit(image))
        seed = self.config.seed if seed is None else seed

        def denoise(*rows: Array) -> Array:
            limit = self.config.model.unet_limit
            return in_slices(lambda part: self.predict_latent(params, *part), rows, limit)

        return sample_mask_latents(
            denoise,
            image_latent,
            frozen["bank"]["tokens"],
            frozen["bank"]["mask"],
            member_noise(seed, index, estep.ensemble, image_latent.shape[1:]),
            self.schedule,
            estep,
        )

    def read(
        self,
        frozen: Params,
        latents: Float[Array, "n q e h w c"],
        size: tuple[int, int],
        decoder: str = "vae",
    ) -> Float[Array, "n q e H W"]:
        """Mask latents to evidence at `size` pixels."""
        if decoder == "probe" and self.codec == "palette":
            # what the auxiliary loss trains: the nearest colour's latent, in units of decoded evidence
            logits = palette_logits(latents[:, 0], jnp.asarray(self.palette_latents))
            return enlarge(jnp.moveaxis(logits, -1, 1) / self.palette.scale, *size)
        if decoder == "probe":
            return enlarge(self.probe(latents), *size)
        if decoder == "latent_mean":
            latents = latents.mean(axis=2, keepdims=True)
        read = decode_binary
        if self.codec == "palette":
            read = partial(decode_palette, prototypes=jnp.asarray(self.palette.prototypes))
        evidence = self.vae.decode(frozen["vae"], latents.reshape(-1, *latents.shape[3:]), read)
        if self.codec == "binary":
            return evidence.reshape(*latents.shape[:3], *size)
        n, _, e = latents.shape[:3]
        return jnp.moveaxis(evidence.reshape(n, e, -1, *size), 1, 2)

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
        if self.codec == "palette":
            text = json.dumps(self.palette.to_dict(), indent=1)
            (folder / PALETTE_NAME).write_text(text + "\n", encoding="utf-8")


def _require_no_trace(name: str) -> None:
    """Fails where a constant that needs the autoencoder is first asked for inside a program."""
    if isinstance(jnp.zeros(()), jax.core.Tracer):
        raise RuntimeError(f"SegmentationTask.{name} is first used inside a program: call prepare()")


def negative_shares(batch: Batch) -> dict[str, Array]:
    """The rates of queries for absent classes that sampling really gave, where it tells them."""
    if "query_kind" not in batch:
        return {}
    kind = batch["query_kind"]
    return {
        "negative_share": (kind != PRESENT).mean(),
        "hard_negative_share": (kind == HARD_ABSENT).mean(),
    }
