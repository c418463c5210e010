"""Train the small model's teacher: a FLUX transformer and its text encoders, by flow matching on rendered scenes."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from arcflow_distill.shapes import vae as vae_stage
from arcflow_distill.shapes.loop import Average, rate
from arcflow_distill.shapes.tokenizers import captions, clip_tokenizer, t5_tokenizer
from arcflow_export.families import CLIP_TOKENS
from arcflow_export.images.scenes import MAX_SEQUENCE_LENGTH, RESOLUTION, Scenes, caption, name_some, render, sample
from arcflow_export.options import SHIFT

SAMPLES, BATCH, LEARNING_RATE, WARMUP = 800_000, 128, 2e-3, 300
SCENES = 40_960
#: Noise levels in training are sigma = S u / (1 + (S - 1) u) for uniform u, with this S. Generation uses ArcFlow's
#: shift.
TRAINING_SHIFT = 2.0
TEXT_WIDTH = 64
GRID = RESOLUTION // 16


class Networks(nn.Module):
    """Transformer and text encoders, trained together; `forward` computes the flow-matching loss."""

    def __init__(self) -> None:
        super().__init__()
        clip = clip_tokenizer()
        self.transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=False,
            axes_dims_rope=(8, 12, 12),
        )
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip),
                hidden_size=TEXT_WIDTH,
                intermediate_size=2 * TEXT_WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=CLIP_TOKENS,
                bos_token_id=clip.bos_token_id,
                eos_token_id=clip.eos_token_id,
                pad_token_id=clip.pad_token_id,
            )
        )
        self.text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=len(t5_tokenizer()),
                d_model=TEXT_WIDTH,
                d_kv=32,
                d_ff=2 * TEXT_WIDTH,
                num_layers=1,
                num_heads=2,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
                use_cache=False,
            )
        )
        ids = torch.zeros(GRID, GRID, 3)
        ids[..., 1] += torch.arange(GRID)[:, None]
        ids[..., 2] += torch.arange(GRID)[None]
        self.register_buffer("image_ids", ids.reshape(-1, 3), persistent=False)
        self.register_buffer("text_ids", torch.zeros(MAX_SEQUENCE_LENGTH, 3), persistent=False)

    def forward(
        self, latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, clip: torch.Tensor, t5: torch.Tensor
    ) -> torch.Tensor:
        """The mean squared error of the predicted velocity; the true velocity is noise - latents.

        Args:
            latents: packed, scaled latents [B, N, 64].
            noise: noise of the same shape.
            sigma: noise level in [0, 1], [B].
            clip: CLIP's token ids [B, T] up to the end mark at least; CLIP is causal, so padding changes nothing.
            t5: T5's token ids [B, MAX_SEQUENCE_LENGTH].
        """
        level = sigma[:, None, None]
        velocity = self.transformer(
            hidden_states=(1 - level) * latents + level * noise,
            timestep=sigma,
            encoder_hidden_states=self.text_encoder_2(t5)[0],
            pooled_projections=self.text_encoder(clip).pooler_output,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]
        return (velocity - (noise - latents)).square().mean()


class Captions:
    """The token ids of every possible caption, looked up by text."""

    def __init__(self) -> None:
        texts = captions()
        self._index = {text: i for i, text in enumerate(texts)}
        clip = clip_tokenizer()(texts, padding="longest", return_tensors="pt")
        t5 = t5_tokenizer()(texts, padding="max_length", return_tensors="pt")
        self._clip, self._t5 = clip.input_ids, t5.input_ids

    def ids(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """The CLIP and T5 token ids of the captions `texts`."""
        rows = torch.tensor([self._index[text] for text in texts])
        return self._clip[rows], self._t5[rows]


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Pack latents [B, C, 2h, 2w] into [B, h*w, C*4], channel-major, as FLUX does."""
    batch, channels, height, width = latents.shape
    return FluxPipeline._pack_latents(latents, batch, channels, height, width)


def train(vae_folder: Path, out: Path, seed: int, samples: int = SAMPLES) -> None:
    """Train the teacher on the VAE's latents, and write a complete `FluxPipeline` directory to `out`."""
    set_seed(seed)
    accelerator = Accelerator()
    networks = Networks()
    optimizer = torch.optim.AdamW(networks.parameters(), LEARNING_RATE, (0.9, 0.99), weight_decay=0, foreach=True)
    steps, batch = samples // BATCH, BATCH // accelerator.num_processes
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, WARMUP))
    average = Average(networks.parameters(), 0.999)
    loss_module, optimizer = accelerator.prepare(networks, optimizer)

    vae = AutoencoderKL.from_pretrained(vae_folder)
    generator = torch.Generator().manual_seed(seed * 1000 + accelerator.process_index + 1)
    scenes = sample(min(SCENES, samples) // accelerator.num_processes, generator)
    latents = _latents(vae, scenes, accelerator)
    words = [scenes.words(i) for i in range(len(scenes))]
    tokens = Captions()

    bar = tqdm(range(steps), "teacher", disable=not accelerator.is_main_process, mininterval=5)
    smooth = None
    for _ in bar:
        rows = torch.randint(len(scenes), (batch,), generator=generator)
        variants = torch.randint(2, (batch,), generator=generator).tolist()
        texts = [caption(name_some(words[i], generator), v) for i, v in zip(rows.tolist(), variants, strict=True)]
        u = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
        sigma = TRAINING_SHIFT * u / (1 + (TRAINING_SHIFT - 1) * u)
        noise = torch.randn(batch, GRID * GRID, 64, generator=generator)
        inputs = (latents[rows], noise, sigma, *tokens.ids(texts))
        loss = loss_module(*(x.to(accelerator.device) for x in inputs))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(loss_module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.update()
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}")
    average.store()
    if accelerator.is_main_process:
        save(networks, vae, out)
    accelerator.end_training()


def _latents(vae: AutoencoderKL, scenes: Scenes, accelerator: Accelerator) -> torch.Tensor:
    """Packed, scaled latents [N, 16, 64] of the scenes' images."""
    vae.to(accelerator.device)
    parts = []
    rows = torch.arange(len(scenes)).split(1024)
    for part in tqdm(rows, "encoding", disable=not accelerator.is_main_process):
        attributes = {name: index[part] for name, index in scenes.attributes.items()}
        images = render(Scenes(attributes, scenes.center[part], scenes.radius[part]))
        parts.append(vae_stage.encode(vae, images))
    return pack((torch.cat(parts) - vae.config.shift_factor) * vae.config.scaling_factor)


def save(networks: Networks, vae: AutoencoderKL, out: Path) -> None:
    """Write the pipeline's directory, with weights in bfloat16."""
    networks.to("cpu", torch.bfloat16)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae.to("cpu", torch.bfloat16),
        text_encoder=networks.text_encoder,
        tokenizer=clip_tokenizer(),
        text_encoder_2=networks.text_encoder_2,
        tokenizer_2=t5_tokenizer(),
        transformer=networks.transformer,
    )
    pipeline.save_pretrained(out)


def main() -> None:
    """Entry point of a training process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    args = parser.parse_args()
    train(args.vae, args.out, args.seed, args.samples)


if __name__ == "__main__":
    main()
