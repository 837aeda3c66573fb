from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_pipes
import torch

from overtone.progressive import layouts, spectral
from overtone.progressive.families import FAMILIES, Family, family_name
from overtone.progressive.schedule import grid_for, latent_frames


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_an_entry_can_make_its_own_defaults(family: Family):
    assert FAMILIES[family.name] is family
    height, width = grid_for(family, family.default_height, family.default_width)
    assert (height * family.cell_px, width * family.cell_px) == (family.default_height, family.default_width)
    assert latent_frames(family, None) >= 1
    assert 0 < family.default_delta < 1
    assert family.grid_multiple % family.patch == 0


def test_issue_numbers_of_the_tiny_family():
    tiny, flux = FAMILIES["tiny"], FAMILIES["flux1"]
    assert (tiny.default_height, tiny.default_width, tiny.default_steps, tiny.default_delta) == (
        256,
        256,
        30,
        0.05,
    )
    assert tiny.spectrum != flux.spectrum
    same = {"name", "default_height", "default_width", "default_steps", "spectrum", "call"}
    fields = {name: getattr(tiny, name) for name in same}
    assert replace(flux, **fields) == tiny


@pytest.mark.parametrize(
    ("pipeline", "config", "name"),
    [
        ("FluxPipeline", {}, "flux1"),
        ("Flux2Pipeline", {}, "flux2"),
        ("Flux2KleinPipeline", {"is_distilled": True}, "flux2"),
        ("WanPipeline", {}, "wan2.1"),
        ("WanPipeline", {"boundary_ratio": None}, "wan2.1"),
        ("WanPipeline", {"boundary_ratio": 0.875}, "wan2.2"),
        ("WanPipeline", {"expand_timesteps": True}, "wan2.2-5b"),
        ("FluxImg2ImgPipeline", {}, "generic"),
    ],
)
def test_a_pipeline_is_known_by_class_and_configuration(pipeline, config, name):
    assert family_name(pipeline, config) == name


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_unpack_undoes_pack(family: Family):
    shape = layouts.shape(family, 16, 3, 6, 4)
    latents = torch.arange(2 * torch.Size(shape).numel(), dtype=torch.float32).reshape(2, *shape)
    packed = layouts.pack(family, latents)
    if family.layout == "grid_to_tokens":
        packed = packed.flatten(2).transpose(1, 2)  # as the pipeline does on the way in
    assert torch.equal(layouts.unpack(family, packed, 6, 4), latents)


def test_packing_is_that_of_the_pipelines():
    latents = torch.arange(2 * 4 * 6 * 8, dtype=torch.float32).reshape(2, 4, 6, 8)
    for pipe, name in ((tiny_pipes.FluxPipeline, "flux1"), (tiny_pipes.QwenImagePipeline, "qwen-image")):
        assert torch.equal(layouts.pack(FAMILIES[name], latents), pipe._pack_latents(latents, 2, 4, 6, 8))


def test_subcells_are_ordered_as_the_vae_reads_them():
    """FLUX.2 unpatchifies channel c * 4 + row * 2 + column; Ideogram 4's tokens have the cell first."""
    fine = torch.arange(2 * 3 * 8 * 12, dtype=torch.float32).reshape(2, 3, 8, 12)
    ours = tiny_pipes.Flux2KleinPipeline._patchify_latents(fine)
    z = layouts.pack(FAMILIES["ideogram4"], ours)  # [B, tokens, C]
    z = z.view(2, 4, 6, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 8, 12)  # the pipeline's decoding
    assert torch.equal(z, fine)


def test_patches_are_expanded_in_the_grid_that_they_are_patches_of():
    """A smooth picture on 32 x 32 cells, from its 16 x 16 version, both held as 2 x 2 patches: exact on the
    finer grid; plane by plane every sub-cell is treated as if it sat in its cell's middle."""

    def wave(size: int) -> torch.Tensor:  # DCT-II functions 3 and 5: the same wave at any size, up to scale
        cell = (torch.arange(size) + 0.5) / size * torch.pi
        return torch.outer(torch.cos(3 * cell), torch.cos(5 * cell))[None, None]

    coarse, fine = spectral.patchify(wave(16), 2), spectral.patchify(wave(32), 2)
    silence = torch.zeros(1, 4, 16, 16)
    exact = spectral.expand(coarse, silence, 0.0, 16, 16, kappa=2.0, patch=FAMILIES["flux2"].subcells)
    planes = spectral.expand(coarse, silence, 0.0, 16, 16, kappa=2.0)
    assert (exact - fine).norm() < 1e-5 * fine.norm()
    assert (planes - fine).norm() > 0.1 * fine.norm()
