# SPDX-License-Identifier: Apache-2.0
"""Torch's side of `bench sample`: writes the weights, times the loop. Runs in its own process."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np

from tests.bench.models import VAE
from tests.bench.models_torch import best
from tests.bench.sample import inputs, unet_config


class Loop:
    """What one writes with diffusers: members one after the other, image latents encoded once."""

    def __init__(self, spec: dict[str, Any]):
        import diffusers
        import torch

        torch.manual_seed(0)
        size, folder = spec["size"], spec["folder"]
        unet = diffusers.UNet2DConditionModel.from_config(unet_config(size, spec["pixels"]))
        self.unet = unet.eval()
        self.vae = diffusers.AutoencoderKL.from_config(VAE[size]).eval()
        self.unet.save_pretrained(f"{folder}/unet")
        self.vae.save_pretrained(f"{folder}/vae")
        self.schedule, self.batch = spec["schedule"], spec["torch_batch"]
        arrays = inputs(size, spec["pixels"], spec["queries"])
        self.image, self.tokens = arrays["image"], torch.from_numpy(arrays["tokens"])
        noise = np.moveaxis(np.load(f"{folder}/noise.npy"), -1, 1)
        self.noise = torch.from_numpy(np.ascontiguousarray(noise))

    def scheduler(self, steps: int, spacing: str) -> Any:
        import diffusers

        scheduler = diffusers.DDIMScheduler(
            beta_schedule="scaled_linear",
            timestep_spacing=spacing,
            clip_sample=False,
            set_alpha_to_one=True,
            steps_offset=1,
            **self.schedule,
        )
        scheduler.set_timesteps(steps)
        return scheduler

    def __call__(self, ensemble: int, steps: int, spacing: str) -> np.ndarray:
        """Mean masks [q H W] of the image."""
        import torch

        with torch.no_grad():
            image = torch.from_numpy(self.image).movedim(-1, 1).float() / 127.5 - 1.0
            image_latent = self.vae.encode(image).latent_dist.mode()
            image_latent = image_latent * self.vae.config.scaling_factor
            masks = []
            for tokens in self.tokens:
                members = self.noise[:ensemble].split(self.batch)
                masks.append(
                    torch.cat([self.member(image_latent, x, tokens, steps, spacing) for x in members])
                )
            return torch.stack(masks).mean(dim=1).numpy()

    def member(self, image_latent: Any, x: Any, tokens: Any, steps: int, spacing: str) -> Any:
        """Masks [b H W] of as many members as x [b c h w] starts."""
        import torch

        scheduler = self.scheduler(steps, spacing)
        image_latent = image_latent.expand(len(x), -1, -1, -1)
        tokens = tokens.expand(len(x), -1, -1)
        for t in scheduler.timesteps:
            both = torch.cat([image_latent, x], dim=1)
            prediction = self.unet(both, t, encoder_hidden_states=tokens).sample
            x = scheduler.step(prediction, t, x).prev_sample
        decoded = self.vae.decode(x / self.vae.config.scaling_factor).sample
        return decoded.mean(dim=1).clip(-1.0, 1.0)


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Returns the times of each row; leaves weights and mean masks in `spec["folder"]`."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec["threads"]])
    import torch

    from digseg_jax.config.sampling import EStep

    torch.set_num_threads(spec["threads"])
    loop, result = Loop(spec), {}
    loop(1, 1, "trailing")  # what the first call prepares counts for no row
    for row in spec["rows"]:
        estep, masks = EStep.parse(row), []

        def one(estep: EStep = estep, masks: list[np.ndarray] = masks) -> None:
            masks[:] = [loop(estep.ensemble, estep.steps, estep.spacing)]

        result[row] = best(one, spec["repeats"])
        np.save(f"{spec['folder']}/torch_{row}.npy", masks[0])
    return result


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
