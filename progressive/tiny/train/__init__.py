"""How the embedded model is trained."""

from __future__ import annotations

from overtone.progressive.tiny.train.clock import Clock
from overtone.progressive.tiny.train.command import main, train
from overtone.progressive.tiny.train.denoiser import coarse, velocity_loss
from overtone.progressive.tiny.train.models import build_denoiser
from overtone.progressive.tiny.train.muon import orthogonal
from overtone.progressive.tiny.train.settings import Settings
from overtone.progressive.tiny.train.text import PLACES, reading_answers, thing_weights, tokenize, train_text
from overtone.progressive.tiny.train.vae import outline_weights
from overtone.progressive.tiny.train.weights import export, fit_spectrum, restore

__all__ = [
    "PLACES",
    "Clock",
    "Settings",
    "build_denoiser",
    "coarse",
    "export",
    "fit_spectrum",
    "main",
    "orthogonal",
    "outline_weights",
    "reading_answers",
    "restore",
    "thing_weights",
    "tokenize",
    "train",
    "train_text",
    "velocity_loss",
]
