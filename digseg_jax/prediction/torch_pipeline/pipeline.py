# SPDX-License-Identifier: Apache-2.0
"""Segmentation of an image by words in torch: the pipeline of a model trained with digseg_jax.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    masks = pipe(image, ["road", "tree"], steps=2, ensemble=4)
    masks.probability, masks.label  # float32 [q, H, W], and int32 [H, W]: the most probable word

The masks equal those of digseg_jax: the views, the noise for a seed and the sampler are the same.
"""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

BATCH = 8  # masks that the U-Net denoises, or the autoencoder decodes, at a time


@dataclass
class Masks(BaseOutput):
    """probability: float32 [q, H, W]; label: int32 [H, W], the most probable word of each pixel."""

    probability: np.ndarray
    label: np.ndarray


class DigsegPipeline(DiffusionPipeline):
    """Pipeline with the settings that digseg_jax wrote: text, decoding, scale and limits."""

    model_cpu_offload_seq = "text_encoder->vae->unet->vae"

    def __init__(self, unet, vae, text_encoder, tokenizer, scheduler, image_processor, settings=None):
        super().__init__()
        self.register_modules(unet=unet, vae=vae, text_encoder=text_encoder)
        self.register_modules(tokenizer=tokenizer, scheduler=scheduler, image_processor=image_processor)
        self.register_to_config(settings=settings)

    @torch.no_grad()
    def __call__(self, image, words, steps=2, ensemble=1, seed=0, latents=None):
        """Returns the masks of an image (Pillow's, a file, or uint8 [H, W, 3]) at its own size.

        latents: initial noise [views, ensemble, c, h, w]; None: what digseg_jax draws for the seed.
        """
        words = [words] if isinstance(words, str) else list(words)
        self._check(words)
        s = self.config.settings
        texts = [way.replace("{}", word) for word in words for way in s["templates"]]
        contexts = [self._encode([s["prompt"]] if s["prompt"] else texts)]
        if s["marks"]:
            # one context for as many words as there are marks; a word is the mean of its texts
            whole = contexts[0][0][:, 0].unflatten(0, (len(words), -1)).mean(1)
            contexts = whole.split(len(s["marks"]))
        crops, assemble = self.image_processor.views(image)

        planes = []
        for view, crop in enumerate(crops):
            encoded = self._encode_image(crop)
            noise = self.scheduler.initial_noise(seed, view, ensemble, encoded.shape[1:])
            noise = noise if latents is None else torch.tensor(latents[view])
            found = []
            for context in contexts:
                members = []
                for e, x in enumerate(noise.to(encoded)):
                    own = self.unet.marked(context, s["marks"], e) if s["marks"] else context
                    members.append(self._denoise(encoded, x, *own, steps))
                found.append(self._read(torch.stack(members), len(context)))
            read = np.concatenate(found)  # of each text; a word is the mean of its texts
            planes.append(read.reshape(len(words), -1, *read.shape[1:]).mean(axis=1))

        # Join the views of one word at a time to a mask of the image's size.
        masks = np.stack([assemble([p[q] for p in planes]) for q in range(len(words))])
        return Masks(masks, masks.argmax(axis=0).astype(np.int32))

    def _check(self, words):
        """Raises ValueError for words that the model cannot answer."""
        s = self.config.settings
        classes, limit = s["classes"], s["limit"] and max(1, s["limit"] // len(s["templates"]))
        if s["decoder"] not in ("latent_mean", "vae"):
            raise ValueError(f"decoder={s['decoder']!r}: not supported here; legal: latent_mean, vae")
        if not words or not all(word.strip() for word in words):
            raise ValueError(f"words={words}: name what to segment, without blank words")
        if classes and len(words) != len(classes):
            raise ValueError(f"{len(words)} words: this model answers its classes, all of {classes}")
        if limit and len(words) > limit:
            raise ValueError(f"{len(words)} words: at most {limit} in a call; ask in several calls")

    def _encode(self, texts):
        """Tokens [q, l, d] of texts and their mask [q, l]."""
        s, device = self.config.settings, self._execution_device
        found = self.tokenizer(texts, padding="max_length", max_length=s["max_tokens"])
        if max(map(len, found.input_ids)) > s["max_tokens"]:
            raise ValueError(f"{texts}: a text has more than {s['max_tokens']} tokens")
        ids, mask = (torch.tensor(x, device=device) for x in (found.input_ids, found.attention_mask))
        real = mask
        mask = mask if s["mask_padding"] else torch.ones_like(mask)
        out = self.text_encoder(ids, attention_mask=mask, output_hidden_states=True)

        # Hidden states of earlier layers are not normalized yet.
        tokens = out.last_hidden_state
        if s["text_skip_layers"]:
            tower = getattr(self.text_encoder, "text_model", self.text_encoder)
            tokens = tower.final_layer_norm(out.hidden_states[-1 - s["text_skip_layers"]])

        # One token for each text, or all of them, with their mean behind them if it was trained.
        if s["marks"] and self.text_encoder.config.model_type.startswith("clip"):
            # the token that ends the text: the largest id where an old file names a wrong one
            last = self.text_encoder.config.eos_token_id
            ends = ids.argmax(1) if last == 2 else (ids == last).int().argmax(1)
            return tokens[torch.arange(len(ids)), ends][:, None].to(self.unet.dtype), mask[:, :1]
        if s["sentence_token"] or s["marks"]:  # append the mean of the real tokens
            weight = real[..., None].to(tokens)
            mean = (tokens * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
            tokens, mask = torch.cat([tokens, mean], 1), torch.nn.functional.pad(mask, (0, 1), value=1)
        keep = slice(-1 if s["marks"] else 0, None)
        return tokens[:, keep].to(self.unet.dtype), mask[:, keep]

    def _encode_image(self, crop):
        """The scaled latent [1, c, h, w] of a view."""
        pixels = torch.tensor(crop).permute(2, 0, 1)[None].to(self._execution_device, self.vae.dtype)
        found = self.vae.encode(pixels / 127.5 - 1)
        mean = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents
        return mean * self.vae.config.scaling_factor

    def _denoise(self, image, noise, tokens, mask, steps):
        """Clean mask latents [k, c, h, w] of one member."""
        x = noise.expand(len(tokens), *noise.shape)
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            whole = torch.cat([image.expand_as(x), x], 1), tokens, mask
            rows = zip(*(part.split(BATCH) for part in whole), strict=True)
            out = [self.unet(y, t, c, encoder_attention_mask=m).sample for y, c, m in rows]
            x = self.scheduler.step(torch.cat(out), t, x).prev_sample
        return x

    def _read(self, latents, asked):
        """Probabilities [q, h, w] of the members' latents [e, k, c, h, w], for `asked` texts."""
        s = self.config.settings
        if s["decoder"] == "latent_mean" and not s["marks"]:
            latents = latents.mean(0, keepdim=True)
        rows = latents.flatten(0, 1) / self.vae.config.scaling_factor
        images = torch.cat([self.vae.decode(part).sample for part in rows.split(BATCH)]).float()
        if table := s["prototypes"]:  # minus half the squared distance to each class's color
            colors = self.unet.colors(table, asked, s["marks"], len(images)).to(images.device)
            evidence = -0.5 * (images[:, None] - colors[..., None, None]).square().sum(2)
            members = (s["scale"] * evidence).softmax(1)
        else:
            evidence = images.mean(1).clip(-1, 1).unflatten(0, latents.shape[:2])
            members = (s["scale"] * evidence).sigmoid()

        if s["ensemble_rule"] == "vote":
            best = members == members.amax(1, keepdim=True)
            members = (best if s["prototypes"] else members > 0.5).float()
        members = members.quantile(0.5, dim=0) if s["ensemble_rule"] == "median" else members.mean(0)
        return members[: -1 if s["background"] else None].cpu().numpy()
