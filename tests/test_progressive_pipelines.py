"""What comes with a model is not run: weights are safetensors, and code stays where it is unless trusted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_pipes
import torch

from overtone.progressive.pipelines import load


def test_pickled_weights_are_refused(tmp_path):
    tiny_pipes.flux1().save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.rglob("*.bin"))
    with pytest.raises(OSError, match="safetensors"):
        load(tmp_path, device="cpu")


def test_a_pickled_adapter_is_refused(tmp_path):
    tiny_pipes.flux1().save_pretrained(tmp_path / "model")
    (tmp_path / "lora").mkdir()
    torch.save({}, tmp_path / "lora" / "pytorch_lora_weights.bin")
    with pytest.raises(OSError, match="safetensors"):
        load(tmp_path / "model", device="cpu", loras=[{"id": tmp_path / "lora"}])


@pytest.mark.parametrize("trusted", [False, True])
def test_code_that_comes_with_a_model_runs_only_where_it_is_trusted(tmp_path, monkeypatch, trusted):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    tiny_pipes.flux1().save_pretrained(tmp_path / "model")
    ran = tmp_path / "ran"
    code = "from diffusers import FluxPipeline\n\n\nclass Mine(FluxPipeline):\n    pass\n"
    (tmp_path / "model" / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\n{code}")
    index = tmp_path / "model" / "model_index.json"
    about = json.loads(index.read_text()) | {"_class_name": ["mine", "Mine"]}
    index.write_text(json.dumps(about))
    if trusted:
        assert type(load(tmp_path / "model", device="cpu", trust_remote_code=True)).__name__ == "Mine"
    else:
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(tmp_path / "model", device="cpu")
    assert Path(ran).exists() is trusted
