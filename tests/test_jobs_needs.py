"""What a job needs before it runs, and what of it `plan` refuses as `run` would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_jobs import prompt_table, small_job

from overtone.jobs.errors import SpecError
from overtone.jobs.needs import needs_of
from overtone.jobs.sampling import checkpoint_of
from overtone.progressive import tiny
from overtone.progressive.families import FAMILIES

PLAIN = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    """The embedded model's configuration, without weights."""
    for path in tiny.FOLDER.rglob("*.json"):
        there = tmp_path / "model" / path.relative_to(tiny.FOLDER)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_text(json.dumps(json.loads(path.read_text())))
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("files", "variant", "refused"),
    [
        ([f"transformer/{PLAIN}", f"vae/{PLAIN}"], None, None),
        ([f"transformer/{PLAIN}", f"vae/{PLAIN}"], "fp16", "no weights of the variant fp16; .* may be unset"),
        (["transformer/x.fp16.safetensors", f"vae/{PLAIN}"], "fp16", None),  # the VAE has no other
        (["transformer/x.fp16.safetensors", f"vae/{PLAIN}"], None, "fp16 alone, in its transformer; set"),
        (["transformer/x.fp16-00001-of-00002.safetensors"], "bf16", "variant bf16; `variant` may be fp16$"),
        (["transformer/x-00001-of-00002.safetensors"], None, None),
        (["transformer/x.bf16.safetensors", f"vae/{PLAIN}"], "fp16", "`variant` may be bf16, unset$"),
        (["vae/x.fp16.safetensors", "transformer/x.bf16.safetensors"], "fp16", "bf16 alone, in its tran"),
        ([], "fp16", None),  # a folder whose weights are in other files is another mistake
    ],
)
def test_weights_of_a_variant_that_a_folder_has_not_are_refused(tmp_path, folder, files, variant, refused):
    for name in files:
        (folder / name).write_bytes(b"")
    spec, plan = small_job(tmp_path, prompt_table(2))
    model = {"id": str(folder), "variant": variant}
    spec = spec.model_validate(spec.model_dump() | {"model": model})
    if refused is None:
        assert needs_of(spec, plan, FAMILIES["tiny"], checkpoint_of(spec)).state == "new"
    else:
        with pytest.raises(SpecError, match=rf"^model\.variant: {folder} .*{refused}"):
            needs_of(spec, plan, FAMILIES["tiny"], checkpoint_of(spec))
