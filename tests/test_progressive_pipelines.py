"""What comes with a model is not run: weights are safetensors, and code stays where it is unless trusted.
Adapters reach the transformer that they are for, and folders load as people have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_pipes
import torch
from diffusers import WanPipeline

from overtone.progressive.checkpoints import describe
from overtone.progressive.denoisers import load_adapters
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


# ------------------------------------------------------------------------------------------------- adapters


def lora(folder: Path, transformer: object, seed: int) -> Path:
    """An adapter for a transformer of Wan's, written to a folder."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    transformer.add_adapter(config, adapter_name="made")
    state = peft.get_peft_model_state_dict(transformer, adapter_name="made")
    transformer.delete_adapters("made")
    WanPipeline.save_lora_weights(folder, transformer_lora_layers=state)
    return folder


def adapters_of(pipe: object) -> list[dict[str, float]]:
    """Of each transformer, the adapters that are switched on, with their strengths."""
    found = []
    for transformer in (pipe.transformer, pipe.transformer_2):
        layers = [m for m in transformer.modules() if getattr(m, "lora_A", None)]
        found.append({name: layer.scaling[name] for layer in layers for name in layer.active_adapters})
    return found


def test_an_adapter_names_its_transformer_or_both(tmp_path):
    pipe = tiny_pipes.wan(two=True)
    pipe.save_pretrained(tmp_path / "model")
    high = str(lora(tmp_path / "high", pipe.transformer, 1))
    low = str(lora(tmp_path / "low", pipe.transformer, 2))

    def loaded(*loras: dict) -> list[dict[str, float]]:
        return adapters_of(load(tmp_path / "model", device="cpu", loras=loras))

    two = (
        {"id": high, "transformer": "transformer"},
        {"id": low, "transformer": "transformer_2", "scale": 0.5},
    )
    assert loaded(*two) == [{"lora_0": 1.0}, {"lora_1": 0.5}]
    assert loaded({"id": low, "transformer": "transformer_2"}) == [{}, {"lora_0": 1.0}]
    both = {"id": high, "transformer": "both", "scale": 0.25}
    assert loaded(both, {"id": low, "transformer": "transformer"}) == [
        {"lora_0": 0.25, "lora_1": 1.0},
        {"lora_0": 0.25},
    ]
    with pytest.raises(ValueError, match=r"names no transformer.*transformer, transformer_2, both"):
        loaded({"id": high})
    with pytest.raises(ValueError, match="is for transformer_3"):
        loaded({"id": high, "transformer": "transformer_3"})


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            {"id": "x", "strength": 2.0},
            "strength; the known keys are id, weight_name, revision, scale, trans",
        ),
        ({"path": "x"}, "the known keys are id"),
        ({"scale": 1.0}, "has no id"),
        ({"id": "x", "transformer": "both"}, "is for both, and FluxPipeline has transformer"),
    ],
)
def test_keys_of_an_adapter_that_there_are_not_are_refused(adapter, message):
    with pytest.raises(ValueError, match=message):
        load_adapters(tiny_pipes.flux1(), [adapter])


# ------------------------------------------------------------------------------- folders as people have them


def test_a_variant_alone_and_parts_that_are_left_out(tmp_path):
    """Stable Diffusion 3 without its T5, whose class calls the T5 no optional part, in half precision."""
    tiny_pipes.sd3().save_pretrained(tmp_path, variant="fp16")
    index = tmp_path / "model_index.json"
    about = json.loads(index.read_text())
    assert about["text_encoder_3"] == about["tokenizer_3"] == [None, None]
    assert not [path for path in tmp_path.rglob("*.safetensors") if ".fp16." not in path.name]
    with pytest.raises(ValueError, match=r"variant fp16 alone, in its \w+; set `variant`"):
        load(tmp_path, device="cpu")
    with pytest.raises(ValueError, match="no weights of the variant bf16; `variant` may be fp16"):
        load(tmp_path, device="cpu", variant="bf16")  # without a word diffusers would look for those without
    pipe = load(tmp_path, device="cpu", variant="fp16")
    assert pipe.text_encoder_3 is None
    assert pipe.transformer.dtype == torch.float32
    # A part that its class does not call optional.
    class_of = about | {"text_encoder_2": [None, None], "tokenizer_2": [None, None]}
    index.write_text(json.dumps(class_of))
    # And one whose weights come without a variant alone.
    (tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors").rename(
        tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    )
    assert load(tmp_path, device="cpu", variant="fp16").text_encoder_2 is None


def test_a_folder_for_more_than_prompts_is_refused_before_its_weights_are_read(tmp_path):
    tiny_pipes.flux1().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    for name in (
        "FluxKontextPipeline",
        "FluxControlPipeline",
        "QwenImageEditPipeline",
        "WanImageToVideoPipeline",
    ):
        index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": name}))
        for way in (lambda: load(tmp_path, device="cpu"), lambda: describe(str(tmp_path))):
            with pytest.raises(ValueError, match=f"{name} is a pipeline for more than a prompt"):
                way()


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
