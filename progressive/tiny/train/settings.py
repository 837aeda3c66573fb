"""The numbers that training depends on. Knows no torch and no file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from overtone.progressive.tiny import world


@dataclass(frozen=True)
class Settings:
    """All that training depends on. The defaults made the weights in the repository."""

    scenes: int = 49152
    """Training pictures, of the seeds that `world.training` names."""
    skip_scenes: int = 12288
    """Seeds left out before those: earlier training saw them, and this one continues with new scenes."""
    latent_scenes: int = 49152
    """How many of them the transformer is trained on, for encoding them takes time too."""
    side_px: int = world.SIDE_PX
    seed: int = 0
    """Of weights and batches."""

    vae_channels: tuple[int, ...] = (8, 16, 48, 48)
    latent_channels: int = 8
    vae_minutes: float = 12.0
    vae_steps: int | None = None
    """Ends the stage early; None: the clock alone."""
    vae_lr: float = 4e-3
    vae_warmup: int = 20
    """Steps."""
    crop_px: int = 64
    """Side of a training crop; twice that in the last `large_crops` of the time, and a quarter as many."""
    large_crops: float = 0.3
    vae_batch: int = 16
    gradient_weight: float = 0.5
    kl_weight: float = 2e-4

    decoder_minutes: float = 24.0
    decoder_steps: int | None = None
    decoder_lr: float = 5e-4
    decoder_batch: int = 2
    """Whole pictures: group norms see what they will see."""
    outline_weight: float = 6.0
    """Weight of a pixel's loss on and near a thing; the rest of the picture has 1."""
    latent_noise: float = 0.05
    """Standard deviation of what is added to the latents: a transformer's are never exact."""

    width: int = 192
    head_dim: int = 32
    double_blocks: int = 2
    single_blocks: int = 4
    text_width: int = 128
    text_layers: int = 2
    pooled_width: int = 32
    text_steps: int = 1500
    """Of the T5 encoder on `reading_loss` alone, before the transformer: pictures teach it very slowly."""
    text_batch: int = 64
    """Captions."""
    text_lr: float = 2e-3
    place_lr: float = 0.05
    """Of the T5 encoder's relative position biases: all it knows of order, and they must grow to 5 or so."""
    dit_minutes: float = 2.3
    dit_steps: int | None = None
    matrix_lr: float = 3e-3
    """Of the hidden matrices, by Muon."""
    other_lr: float = 1.5e-3
    """Of everything else, by AdamW."""
    warmup: int = 50
    """Steps."""
    high_noise: float = 0.4
    """Share of the samples whose noise levels are shifted `high_noise_shift` times as far as the pipeline
    does: shapes and places are settled there, and by the caption alone."""
    high_noise_shift: float = 5.0
    thing_weight: float = 4.0
    """Weight of the loss where the caption has a large thing; a small one has more, by the ratio of their
    radii, and the background 1. As the caption alone says where, the best prediction stays the same; shapes,
    a small part of a picture's energy, are learnt sooner."""
    reading_weight: float = 0.2
    """Weight of `reading_loss` beside the pictures'."""
    unconditional: float = 0.1
    """Share of captions replaced by the empty one."""
    ema: float = 0.998
    grids: tuple[int, ...] = (16, 18, 20, 22, 24, 26, 28, 30, 32)
    """Latent cells a side, the last the full grid. One that is left out is out of distribution, even between
    two that are in."""
    batches: tuple[int, ...] = (384, 312, 256, 224, 192, 168, 144, 128, 112)
    """Samples of a step at each grid: about equally long steps. For a GPU; two CPU cores did with an
    eighth."""
    early: tuple[float, ...] = (0.10, 0.09, 0.05, 0.09, 0.07, 0.09, 0.06, 0.10, 0.35)
    """Share of the steps at each grid when training begins; moves linearly to `late`."""
    late: tuple[float, ...] = (0.08, 0.06, 0.05, 0.07, 0.06, 0.06, 0.06, 0.08, 0.48)
    checkpoint_s: float = 120.0
    log_steps: int = 50

    @cached_property
    def seeds(self) -> list[int]:
        """Of the training scenes."""
        return world.training(self.scenes, self.skip_scenes)
