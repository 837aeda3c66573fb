"""Trains the embedded model: `python -m overtone.progressive.tiny.train --work .train`.

`all`, `export` or `restore` may follow `train`.

Six stages: pictures -> VAE -> latents -> the VAE's decoder again, on whole pictures -> T5 encoder, by reading
captions -> transformer and text encoders. All but the fifth, which takes two minutes, resume from their
checkpoints in the work folder. Learning rates fall with the clock, so a stage ends when its minutes are spent
however busy the machine is. `export` writes the averaged weights as a diffusers folder at any moment of the
last stage; `all` ends with it. `restore` is its inverse: it makes the work folder of an exported model, from
where `all` trains it on.

Coarse grids: x0 of grid m is the low-frequency corner of the full latent over the side ratio, which is what
a coarse stage must make for its expansion to be right (spectral.py, schedule/plan.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch

from overtone.progressive import tiny
from overtone.progressive.tiny.train.denoiser import train_denoiser
from overtone.progressive.tiny.train.settings import Settings
from overtone.progressive.tiny.train.vae import make_latents, make_pictures, train_decoder, train_vae
from overtone.progressive.tiny.train.weights import export, restore


def train(settings: Settings, work: Path, device: torch.device, until: float | None = None) -> None:
    """All stages, from wherever the work folder stands. `until`, seconds since the epoch, ends the last."""
    work.mkdir(parents=True, exist_ok=True)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    pictures = make_pictures(settings, work)
    vae = train_vae(settings, work, device, pictures)
    latents = make_latents(work, vae, pictures[: settings.latent_scenes], device)
    train_decoder(settings, work, device, vae, pictures, latents)
    train_denoiser(settings, work, device, latents, until)


def main(argv: Sequence[str] | None = None) -> None:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m overtone.progressive.tiny.train", description=__doc__.splitlines()[0]
    )
    parser.add_argument("command", nargs="?", choices=["all", "export", "restore"], default="all")
    parser.add_argument("--work", type=Path, default=Path(".train"), help="checkpoints; may be deleted after")
    parser.add_argument("--out", type=Path, default=tiny.FOLDER, help="diffusers folder")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--vae-minutes", type=float, default=defaults.vae_minutes)
    parser.add_argument("--dit-minutes", type=float, default=defaults.dit_minutes)
    parser.add_argument("--until", help="end of the last stage instead of --dit-minutes: HH:MM today")
    given = parser.parse_args(argv)
    if given.command == "restore":
        restore(given.out, given.work)
        return
    if given.command == "all":
        settings = Settings(vae_minutes=given.vae_minutes, dit_minutes=given.dit_minutes)
        until = None
        if given.until is not None:
            clock = datetime.strptime(given.until, "%H:%M").time()
            until = datetime.combine(datetime.now().date(), clock).timestamp()
        train(settings, given.work, torch.device(given.device), until)
    export(given.work, given.out)
