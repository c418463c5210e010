"""Train the small model's VAE (diffusers' `AutoencoderKL`): 64x64 images <-> 8x8 latents of 16 channels."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from torch import nn
from tqdm import tqdm

from arcflow_distill.shapes.loop import Average, Muon, rate
from arcflow_export.images.scenes import RESOLUTION, WIDE, render, sample

IMAGES, BATCH, WARMUP = 32_000, 16, 50
#: Learning rates of Muon (kernels) and AdamW (the rest).
KERNEL_RATE, OTHER_RATE = 0.02, 2e-3
#: Weight of the KL term (mean over latent values) relative to the absolute plus squared error (mean over pixels).
KL_WEIGHT = 2e-4
#: Additional weight of the few pixels that are within two pixels of the shape.
SHAPE_WEIGHT = 8.0


def build() -> AutoencoderKL:
    """Make the untrained VAE, with 0.6 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 48),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=RESOLUTION,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


class _Loss(nn.Module):
    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> the loss, a scalar."""
        posterior = self.vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(images.device)
        error = (self.vae.decode(posterior.mean + posterior.std * noise).sample - images).abs()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        background = images[:, :, :1, :1]
        shape = ((images - background).abs().amax(1, keepdim=True) > 0.02).float()
        weight = 1 + SHAPE_WEIGHT * nn.functional.max_pool2d(shape, 5, 1, 2)
        return (weight * (error + error.square())).mean() + KL_WEIGHT * kl


def train(out: Path, seed: int, images: int = IMAGES) -> None:
    """Train the VAE and save it to `out`; its config gets the measured mean and deviation of its latents."""
    set_seed(seed)
    accelerator = Accelerator()
    vae = build().to(memory_format=torch.channels_last)
    steps, batch = images // BATCH, BATCH // accelerator.num_processes
    kernels = [
        p for name, p in vae.named_parameters() if p.dim() > 1 and "conv_in" not in name and "conv_out" not in name
    ]
    others = [p for p in vae.parameters() if all(p is not kernel for kernel in kernels)]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(kernels, KERNEL_RATE),
        torch.optim.AdamW(others, OTHER_RATE, (0.9, 0.99), weight_decay=0, foreach=True),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate(step, steps, WARMUP)) for o in optimizers]
    average = Average(vae.parameters(), 0.995)
    loss_module = accelerator.prepare(_Loss(vae))
    generator = torch.Generator().manual_seed(seed * 1000 + accelerator.process_index)
    bar = tqdm(range(steps), "vae", disable=not accelerator.is_main_process, mininterval=2)
    smooth = None
    for _ in bar:
        rendered = render(sample(batch, generator, jitter=WIDE)).to(accelerator.device)
        loss = loss_module(rendered.contiguous(memory_format=torch.channels_last) * 2 - 1, generator)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(loss_module.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        average.update()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}")
    average.store()
    if accelerator.is_main_process:
        mean, deviation = measure(vae, seed)
        vae.register_to_config(shift_factor=round(mean, 4), scaling_factor=round(1 / deviation, 4))
        vae.save_pretrained(out)
    accelerator.end_training()


@torch.no_grad()
def measure(vae: AutoencoderKL, seed: int, count: int = 2048) -> tuple[float, float]:
    """Mean and standard deviation of the latents of `count` training images, over all channels."""
    latents = encode(vae, render(sample(count, torch.Generator().manual_seed(seed), jitter=WIDE)))
    return latents.mean().item(), latents.std().item()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Encode images [N, 3, H, W] in [0, 1] to the means of their unscaled latents [N, 16, H/8, W/8]."""
    return torch.cat([vae.encode(p.to(vae.device) * 2 - 1).latent_dist.mean.cpu() for p in images.split(batch)])


def main() -> None:
    """Entry point of a training process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=IMAGES)
    args = parser.parse_args()
    train(args.out, args.seed, args.images)


if __name__ == "__main__":
    main()
