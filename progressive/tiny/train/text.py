"""Stage 5: the T5 encoder learns to read captions. Knows no pictures, latents or transformer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from overtone.progressive.tiny import MAX_SEQUENCE_LENGTH, world
from overtone.progressive.tiny.train.clock import Clock, log, set_lr
from overtone.progressive.tiny.train.models import PLACES, READING_SIZES, build_tokenizer
from overtone.progressive.tiny.train.settings import Settings


def train_text(
    settings: Settings, work: Path, encoder: nn.Module, reader: nn.Module, words: Tensor, answers: Tensor
) -> None:
    """Teach the T5 encoder to read, before anything is drawn. words [N, L], answers [N, L, 4]."""
    places = [p for name, p in encoder.named_parameters() if "relative_attention_bias" in name]
    others = [p for p in (*encoder.parameters(), *reader.parameters()) if all(p is not q for q in places)]
    optimizers = [
        torch.optim.AdamW(some, lr=lr, betas=(0.9, 0.98), weight_decay=0)
        for some, lr in ((others, settings.text_lr), (places, settings.place_lr))
    ]
    clock = Clock(math.inf, settings.text_steps, math.inf)
    rng = np.random.default_rng((settings.seed, 3))
    for progress in clock:
        for optimizer, peak in zip(optimizers, (settings.text_lr, settings.place_lr), strict=True):
            set_lr(optimizer, peak, progress, clock, settings.warmup)
        rows = torch.from_numpy(rng.integers(len(words), size=settings.text_batch)).to(words.device)
        logits = reader(encoder(words[rows])[0])
        loss = reading_loss(logits, answers[rows])
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if clock.step % (5 * settings.log_steps) == 0 or clock.step == settings.text_steps - 1:
            read = torch.stack([part.argmax(-1) for part in logits.split(READING_SIZES, dim=-1)], dim=-1)
            right = (read == answers[rows])[answers[rows] >= 0].float().mean()
            log(work, "text", clock, {"reading": float(loss.detach()), "right": float(right)})


def tokenize(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids of both text encoders, int64 [N, MAX_SEQUENCE_LENGTH] each."""
    ids = [
        build_tokenizer(begin, MAX_SEQUENCE_LENGTH)(
            list(captions),
            padding="max_length",
            max_length=MAX_SEQUENCE_LENGTH,
            truncation=True,
            return_tensors="pt",
        )["input_ids"]
        for begin in (False, True)
    ]
    return ids[0], ids[1]


def reading_answers(asked: world.Asked | None) -> Tensor:
    """What is to be read at each T5 token: int64 classes [MAX_SEQUENCE_LENGTH, 4]; -1: a word of no thing."""
    answers = torch.full((MAX_SEQUENCE_LENGTH, 4), -1)
    if asked is None:
        return answers
    classes = (list(world.SIZES), list(world.COLOURS), list(world.SHAPES))
    first = 0
    for kind, place in zip(asked.kinds, world.places(asked.relation), strict=True):
        said = (kind.size, kind.colour, kind.shape)
        own = [names.index(word) for names, word in zip(classes, said, strict=True)]
        answers[first : first + 4] = torch.tensor([*own, PLACES.index(place)])  # a SIZE COLOUR SHAPE
        first += 4 + len((asked.relation or "").split())
    return answers


def thing_weights(asked: world.Asked, tokens: int, settings: Settings) -> Tensor:
    """Weight of each image token's loss, float32 [tokens, tokens]: more where the caption has a thing."""
    sizes = tuple(kind.size for kind in asked.kinds)
    return _thing_weights(sizes, asked.relation, tokens, settings.thing_weight)


@cache  # two dozen different ones for any number of scenes
def _thing_weights(sizes: tuple[str, ...], relation: str | None, tokens: int, thing_weight: float) -> Tensor:
    middle = (torch.arange(tokens) + 0.5) * (world.SIDE_PX / tokens)
    weights = torch.ones(tokens, tokens)
    for size, (x, y) in zip(sizes, world.places(relation), strict=True):
        reach = 1.1 * world.SIZES[size] + 12
        near = ((middle - y).abs() < reach)[:, None] & ((middle - x).abs() < reach)[None]
        weights[near] = thing_weight * world.SIZES["large"] / world.SIZES[size]
    return weights


def reading_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """Mean cross entropy of `READING_SIZES` logits [B, L, sum] over all words of things; answers [B, L, 4].

    From the T5 encoder's output at each word of a thing, linear heads read the thing's size, colour, shape
    and place, so that an image token finds all about its thing in one text token.
    """
    losses = [
        nn.functional.cross_entropy(part.mT, answer, ignore_index=-1, reduction="sum")
        for part, answer in zip(logits.split(READING_SIZES, dim=-1), answers.unbind(-1), strict=True)
    ]
    return torch.stack(losses).sum() / (answers >= 0).sum().clamp_min(1)  # captions may all be empty
