"""Noise streams: the same bits wherever a row is drawn, and no two rows or purposes alike."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overtone.progressive.noise import BASE, batch_noise, expansion, row_generator, row_noise, sampler

settings.register_profile("patient", deadline=None)  # a busy machine is not a failure
settings.load_profile("patient")

seeds = st.integers(-(2**63), 2**64 - 1)
SHAPE = (2, 6, 5)


@settings(max_examples=40)
@given(st.lists(seeds, min_size=1, max_size=6), st.sampled_from([BASE, expansion(0), expansion(3)]))
def test_a_row_has_the_same_bits_in_any_batch(batch, purpose):
    together = batch_noise(batch, purpose, SHAPE)
    assert together.shape == (len(batch), *SHAPE)
    assert together.dtype == torch.float32
    assert together.device.type == "cpu"
    for row, seed in zip(together, batch, strict=True):
        assert torch.equal(row, row_noise(seed, purpose, SHAPE))
    assert torch.equal(batch_noise(batch[::-1], purpose, SHAPE), together.flip(0))


@settings(max_examples=60)
@given(st.sets(seeds, min_size=2, max_size=6))
def test_streams_differ_between_rows_and_purposes(rows):
    streams = [
        row_noise(seed, purpose, (8,))
        for seed in rows
        for purpose in (BASE, sampler(0), sampler(1), expansion(0), expansion(1), expansion(10))
    ]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(streams, 2))


def test_no_arithmetic_on_seeds_can_make_two_streams_meet():
    """Neighbouring seeds, seeds a stage apart in schemes that add, and seeds equal in their low 32 bits."""
    far_apart = [0, 1, 2, 10_000, 20_000, 2**32, 2**32 + 1, 2**63, -1, 2**64 - 1, -(2**63)]
    purposes = [BASE, *(expansion(stage) for stage in range(4))]
    drawn = {row_noise(seed, p, (4,)).numpy().tobytes() for seed in far_apart for p in purposes}
    assert len(drawn) == len(far_apart) * len(purposes)


def test_a_million_rows_keep_their_own_noise():
    """128-bit keys: among so many seeds a 32-bit one would repeat about a hundred times."""
    from overtone.progressive.noise import _key

    count = 200_000
    assert len({_key(seed, BASE) for seed in range(count)}) == count
    assert len({_key(seed, BASE)[:4] for seed in range(count)}) < count  # what 32 bits would have done


def test_the_bits_are_fixed():
    """Pinned: a job resumed next year must go on with the same noise. Made by printing these very calls."""
    np.testing.assert_array_equal(row_noise(7, BASE, (4,)).numpy(), np.array(PINNED["base"], np.float32))
    np.testing.assert_array_equal(
        row_noise(-1, expansion(2), (4,)).numpy(), np.array(PINNED["expand/2"], np.float32)
    )


PINNED = {
    "base": [1.0808338, -1.8202512, 0.56621397, -2.396114],
    "expand/2": [-0.014513393, 1.253033, 0.10795058, 0.2384046],
}


def test_noise_is_standard_normal_and_rows_are_independent():
    rows = batch_noise(range(64), BASE, (4, 32, 32)).flatten(1).double()
    samples = rows.numel()
    assert abs(rows.mean()) < 4 / samples**0.5
    assert abs(rows.var() - 1) < 4 * (2 / samples) ** 0.5
    assert abs((rows**4).mean() - 3) < 4 * (96 / samples) ** 0.5
    correlations = torch.corrcoef(rows) - torch.eye(64, dtype=torch.float64)
    assert correlations.abs().max() < 5.5 / rows.shape[1] ** 0.5
    other = batch_noise(range(64), expansion(0), (4, 32, 32)).flatten(1).double()
    assert ((rows * other).mean(1)).abs().max() < 5 / rows.shape[1] ** 0.5


def test_noise_does_not_touch_the_global_generators():
    torch.manual_seed(0)
    np_state = np.random.get_state()[1].copy()
    before = torch.get_rng_state()
    row_noise(1, BASE, SHAPE)
    row_generator(1, sampler(0))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], np_state)


@settings(max_examples=20)
@given(seeds)
def test_generators_repeat_by_seed_and_purpose(seed):
    first, again = (torch.rand(4, generator=row_generator(seed, sampler(0))) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.rand(4, generator=row_generator(seed, sampler(1))))


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=rf"seed is {seed}; it must be from -2\*\*63 to 2\*\*64 - 1"):
        row_noise(seed, BASE, SHAPE)
    with pytest.raises(ValueError, match="seed is"):
        row_generator(seed, sampler(0))
