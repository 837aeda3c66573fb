"""Trained weights as a diffusers folder, and back. Trains nothing but the heads that no pipeline has."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from torch import Tensor

from overtone.progressive.spectral import dct_basis, frequencies
from overtone.progressive.tiny import MAX_SEQUENCE_LENGTH, world
from overtone.progressive.tiny.train.clock import save, write_json
from overtone.progressive.tiny.train.models import (
    build_denoiser,
    build_scheduler,
    build_tokenizer,
    build_vae,
    decoder_of,
)
from overtone.progressive.tiny.train.settings import Settings
from overtone.progressive.tiny.train.text import reading_answers, tokenize, train_text


def export(work: Path, out: Path) -> None:
    """Write the averaged weights as a diffusers folder, half precision on disk, with spectrum and log.

    FileNotFoundError before the last stage has its first checkpoint. The old folder is replaced at the end.
    """
    vae_state = torch.load(work / "vae.pt", map_location="cpu", weights_only=True)
    state = torch.load(work / "denoiser.pt", map_location="cpu", weights_only=True)
    latents = torch.load(work / "latents.pt", weights_only=True)["latents"]
    settings = Settings(**state["settings"])
    vae, denoiser = build_vae(settings), build_denoiser(settings)
    vae.load_state_dict(vae_state["model"])
    decoder_state = torch.load(work / "decoder.pt", map_location="cpu", weights_only=True)
    decoder_of(vae).load_state_dict(decoder_state["model"])
    denoiser.load_state_dict(state["model"])
    denoiser.load_state_dict(state["average"], strict=False)  # buffers have no average
    pipe: Any = FluxPipeline(
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=denoiser["text_encoder"],
        tokenizer=build_tokenizer(True, MAX_SEQUENCE_LENGTH),
        text_encoder_2=denoiser["text_encoder_2"],
        tokenizer_2=build_tokenizer(False, 512),
        transformer=denoiser["transformer"],
    )
    pipe.to(dtype=torch.float16)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.save_pretrained(partial, safe_serialization=True)
    _polish(partial)
    spectrum = fit_spectrum(latents[:1024])
    write_json(partial / "spectrum.json", spectrum)
    weights = sorted(partial.rglob("*.safetensors"))
    facts = {
        "settings": asdict(settings),
        "log": _log_summary(work),
        "sha256": {f.relative_to(partial).as_posix(): _sha256(f) for f in weights},
    }
    write_json(partial / "training.json", facts)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    card = out.parent / "README.md"
    if card.exists():
        card.write_text(_with_facts(card.read_text(), facts, spectrum))


def restore(model: Path, work: Path) -> None:
    """The inverse of `export`: a work folder from which `train` continues with an exported model.

    The weights come back as exported, in half precision, and without optimizer state; the linear heads of
    `reading_loss`, which no pipeline has, are fitted to the T5 encoder as it is. The next schedule begins
    here. FileExistsError where the work folder already has a checkpoint.
    """
    if (work / "denoiser.pt").exists():
        raise FileExistsError(f"{work / 'denoiser.pt'} is there already: `all` goes on with it")
    work.mkdir(parents=True, exist_ok=True)
    facts = json.loads((model / "training.json").read_text())
    settings = Settings(**facts["settings"])
    pipe: Any = FluxPipeline.from_pretrained(model, torch_dtype=torch.float32)
    denoiser = build_denoiser(settings)
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        denoiser[name].load_state_dict(getattr(pipe, name).state_dict())
    asked = [world.scene(seed).asked for seed in settings.seeds[: settings.latent_scenes]]
    answers = torch.stack([reading_answers(a) for a in asked])
    encoder = denoiser["text_encoder_2"].requires_grad_(False)
    train_text(settings, work, encoder, denoiser["reader"], tokenize([a.caption for a in asked])[0], answers)
    (work / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in facts["log"]))
    last = [line for line in facts["log"] if line["stage"] == "denoiser"][-1]
    begun = {"step": last["step"], "elapsed_s": 60 * last["minutes"]}
    begun |= {"began_step": begun["step"], "began_s": begun["elapsed_s"]}
    fresh = {"optimizers": None, "done": False, "settings": asdict(settings)}
    average = {name: p.detach() for name, p in denoiser.named_parameters()}
    save(work / "vae.pt", fresh | begun | {"model": pipe.vae.state_dict(), "done": True})
    save(work / "decoder.pt", fresh | begun | {"model": decoder_of(pipe.vae).state_dict(), "done": True})
    save(work / "denoiser.pt", fresh | begun | {"model": denoiser.state_dict(), "average": average})


def _polish(folder: Path) -> None:
    """Half precision is for the disk alone: configs say float32, and name classes that all versions have."""
    for config in folder.rglob("config.json"):
        values = json.loads(config.read_text())
        for key in ("dtype", "torch_dtype"):
            if key in values:
                values[key] = "float32"
        values.pop("_name_or_path", None)
        write_json(config, values)
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = index["tokenizer_2"] = ["transformers", "PreTrainedTokenizerFast"]
    write_json(folder / "model_index.json", index)
    for config in folder.rglob("tokenizer_config.json"):
        write_json(config, json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"})


def fit_spectrum(latents: Tensor) -> dict[str, float]:
    """A and beta of P(w) = A w^-beta over 1 < w < 15.5, a least-squares line through the logarithms.

    P(w) is the mean square of the orthonormal DCT coefficients of latents [N, C, H, H], averaged over rings
    half a cycle wide, w = k / 2 cycles over the side.
    """
    side = latents.shape[-1]
    basis = dct_basis(side)
    power = (basis @ latents.float() @ basis.T).square().mean((0, 1)).double().numpy()  # [H, H]
    w = frequencies("dct", (side, side))
    ring = np.rint(2 * w).astype(int)
    rings = [r for r in range(3, min(31, side))]
    middles = np.array([w[ring == r].mean() for r in rings])
    powers = np.array([power[ring == r].mean() for r in rings])
    slope, intercept = np.polyfit(np.log(middles), np.log(powers), 1)
    return {"amplitude": round(float(np.exp(intercept)), 4), "beta": round(float(-slope), 4)}


def _with_facts(card: str, facts: dict[str, Any], spectrum: dict[str, float]) -> str:
    """The model card with the part between its markers written anew."""
    begin, end = "<!-- export: begin -->", "<!-- export: end -->"
    before, _, rest = card.partition(begin)
    lines = [
        f"Spectrum of its latents, P(w) = A w^-beta over 1 < w < 15.5: A = {spectrum['amplitude']:.4g}, "
        f"beta = {spectrum['beta']:.4g}.",
        "",
        "| weights | SHA-256 |",
        "|---|---|",
        *(f"| {name} | `{digest}` |" for name, digest in facts["sha256"].items()),
        "",
        "Settings:",
        "",
        *(f"    {name} = {value}" for name, value in facts["settings"].items()),
        "",
        "Log (smoothed; a loss for each grid):",
        "",
        *("    " + ", ".join(f"{k} {v}" for k, v in line.items()) for line in facts["log"]),
        "",
    ]
    return before + "\n".join([begin, *lines, end]) + rest.partition(end)[2]


def _log_summary(work: Path) -> list[dict[str, Any]]:
    """At most 12 lines of each stage's log, evenly over its minutes, the last included."""
    lines = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    summary = []
    for stage in dict.fromkeys(line["stage"] for line in lines):
        own = [line for line in lines if line["stage"] == stage]
        if len(own) > 12:
            minutes = np.array([line["minutes"] for line in own])
            wanted = np.linspace(minutes[0], minutes[-1], 12)
            own = [own[i] for i in sorted({int(np.abs(minutes - m).argmin()) for m in wanted})]
        summary += own
    return summary


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
