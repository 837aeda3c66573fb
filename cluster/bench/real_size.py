"""FLUX.1 at its real size with random weights, text encoders and VAE and all, as a worker's engine. Knows no
benchmark.

    run_job(spec, engine_factory=RealSize())        # spec.model: black-forest-labs/FLUX.1-dev

The transformer and the VAE have the published shapes; the text encoders have the published widths and one
layer each, for their time beside the transformer's is small and their weights are many. Nothing is
downloaded, and nothing goes through a disk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from overtone.cluster.worker import Engine, engine_of
from overtone.jobs.spec import JobSpec
from overtone.progressive.bench import build
from overtone.progressive.checkpoints import describe
from overtone.progressive.denoisers import quantize_blocks
from overtone.progressive.pipelines import load
from overtone.progressive.tiny import FOLDER

_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
"""As published: black-forest-labs/FLUX.1-dev, vae/config.json."""
_SEED = 0


@dataclass(frozen=True)
class RealSize:
    """An engine factory for a job: the embedded model for a spec that names it, else random weights."""

    transformer: tuple[tuple[str, Any], ...] = ()
    """Changes of the transformer's configuration, for tests on a CPU."""

    def __call__(self, spec: JobSpec) -> Engine:
        return engine_of(spec, self.pipe(spec))

    def pipe(self, spec: JobSpec) -> Any:
        """The pipeline by itself, as a caller of the library has it."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if spec.model.id == "tiny":
            pipe = load("tiny", device=device)
        else:
            pipe = self._random(spec.model.id, device)
        quantize_blocks(pipe, spec.model.quantize)
        return pipe

    def _random(self, model_id: str, device: torch.device) -> Any:
        checkpoint = describe(model_id)
        if checkpoint.pipeline_class != "FluxPipeline":
            raise ValueError(f"{model_id} is not of FLUX.1's shape, the only one that is known here whole")
        checkpoint = replace(checkpoint, transformer=checkpoint.transformer | dict(self.transformer))
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with torch.random.fork_rng():
            torch.manual_seed(_SEED)
            config = checkpoint.transformer
            clip = CLIPTextConfig.from_pretrained(
                FOLDER / "text_encoder",
                hidden_size=config["pooled_projection_dim"],
                intermediate_size=4 * config["pooled_projection_dim"],
                num_attention_heads=max(1, config["pooled_projection_dim"] // 64),
            )
            t5 = T5Config.from_pretrained(
                FOLDER / "text_encoder_2", d_model=config["joint_attention_dim"], num_layers=1
            )
            parts: dict[str, Any] = {
                "vae": diffusers.AutoencoderKL(**_VAE),
                "text_encoder": CLIPTextModel(clip),
                "text_encoder_2": T5EncoderModel(t5),
            }
        tokenizers = {
            name: PreTrainedTokenizerFast.from_pretrained(FOLDER / name)
            for name in ("tokenizer", "tokenizer_2")
        }
        bare = build(checkpoint, device, dtype)
        pipe: Any = diffusers.FluxPipeline(
            transformer=bare.transformer,
            scheduler=bare.scheduler,
            **{name: part.to(device, dtype).eval().requires_grad_(False) for name, part in parts.items()},
            **tokenizers,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe
