"""The embedded pipelines and recogniser as they ship."""

import json
from pathlib import Path

import pytest
import torch

import ctrl_ray.shapes
from ctrl_ray.embedded import FLOW_PIPELINE
from ctrl_ray.evaluation.recogniser import Recogniser
from ctrl_ray.offline.shapes import PROMPTS, draw_dataset
from ctrl_ray.policy.backbones import load_backbone

FOLDER = Path(ctrl_ray.shapes.__file__).parent
HELD_OUT_SEED = 12345  # training draws with seed 0


def to_tensor(drawn):
    import numpy as np

    pixels = np.stack([np.asarray(image) for image, _ in drawn])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255.0


def test_weights_are_small_and_safetensors_only():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    weights = [path for path in files if path.suffix == ".safetensors"]
    sizes: dict[str, int] = {}
    for path in weights:
        name = str(path.relative_to(FOLDER).parent)
        sizes[name] = sizes.get(name, 0) + path.stat().st_size
    of_flow = {f"flow_pipeline/{part}" for part in ("vae", "transformer", "text_encoder", "text_encoder_2")}
    assert sizes.keys() == {
        *(f"pipeline/{part}" for part in ("vae", "unet", "text_encoder")),
        *of_flow,
        "recogniser",
        "classifier",
    }
    assert sum(sizes[name] for name in of_flow) <= 8 * 2**20 and sum(sizes.values()) <= 17e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".msgpack", ".h5")]


def test_index_names_no_safety_checker_and_the_ddim_scheduler():
    index = json.loads((FOLDER / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["safety_checker"] == [None, None]
    assert index["requires_safety_checker"] is False
    scheduler = json.loads((FOLDER / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "DDIMScheduler"
    assert scheduler["set_alpha_to_one"] is False  # or else the last step has no density
    assert scheduler["clip_sample"] is False
    assert index["vae"] == ["diffusers", "AutoencoderKL"]


def test_the_flow_pipeline_is_a_stable_diffusion_3_without_a_t5():
    index = json.loads((FLOW_PIPELINE / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    assert index["transformer"] == ["diffusers", "SD3Transformer2DModel"]
    scheduler = json.loads((FLOW_PIPELINE / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["shift"]) == ("FlowMatchEulerDiscreteScheduler", 3.0)
    backbone = load_backbone("shapes-flow")
    assert (backbone.latent_shape, backbone.image_size()) == ((4, 8, 8), (64, 64))
    assert backbone.condition_shapes(1) == {"text": (1, 8 + 1, 96), "pooled": (1, 96)}
    assert backbone.identities()["vae"].sha256 == load_backbone("shapes").identities()["vae"].sha256


@pytest.mark.full
def test_recogniser_is_right_on_held_out_drawings():
    drawn = list(draw_dataset(480, HELD_OUT_SEED))
    right = Recogniser.from_pretrained().is_right(to_tensor(drawn), [prompt for _, prompt in drawn])
    assert right.float().mean() >= 0.98


def test_recogniser_is_wrong_about_another_prompt():
    drawn = list(draw_dataset(48, HELD_OUT_SEED))
    others = [PROMPTS[(PROMPTS.index(prompt) + 5) % 24] for _, prompt in drawn]
    assert Recogniser.from_pretrained().is_right(to_tensor(drawn), others).float().mean() <= 0.02


def test_recogniser_survives_saving(tmp_path):
    recogniser = Recogniser.from_pretrained()
    recogniser.save_pretrained(tmp_path)
    images = to_tensor(list(draw_dataset(8, HELD_OUT_SEED)))
    for kept, first in zip(Recogniser.from_pretrained(tmp_path)(images), recogniser(images)):
        torch.testing.assert_close(kept, first, rtol=0, atol=0)


def test_recogniser_says_what_it_expects():
    recogniser = Recogniser.from_pretrained()
    with pytest.raises(ValueError, match=r"must be \(B, 3, 64, 64\)"):
        recogniser.recognise(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"prompts \(1\) must be as many as images \(2\)"):
        recogniser.is_right(torch.zeros(2, 3, 64, 64), ["a red circle"])


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(FOLDER / "pipeline", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_everything_loads_as_float32_without_being_asked(pipeline):
    models = (pipeline.vae, pipeline.text_encoder, pipeline.unet)
    assert {parameter.dtype for model in models for parameter in model.parameters()} == {torch.float32}


def test_no_prompt_is_truncated_and_no_two_are_the_same_to_the_text_encoder(pipeline):
    assert pipeline.tokenizer.model_max_length == 8
    ids = pipeline.tokenizer(list(PROMPTS), truncation=False).input_ids
    assert max(len(row) for row in ids) <= 8
    assert all(row[0] == pipeline.tokenizer.bos_token_id and row[-1] == pipeline.tokenizer.eos_token_id for row in ids)
    assert len({tuple(row) for row in ids}) == 24


def share_right(pipe, **call):
    """Of images of all prompts, each once, in ten steps without guidance: how many show what the prompt says."""
    prompts = list(PROMPTS)
    images = pipe(
        prompts, num_inference_steps=10, guidance_scale=1.0, height=64, width=64, output_type="pt",
        generator=torch.Generator().manual_seed(0), **call,
    ).images  # fmt: skip
    return Recogniser.from_pretrained().is_right(images.float(), prompts).float().mean()


@pytest.mark.full
def test_pipeline_draws_what_the_prompt_says(pipeline):
    """With the setting that everything uses: 10 steps, eta 1, no guidance. Each prompt once; 98 % right is the aim."""
    assert share_right(pipeline, eta=1.0) >= 0.9


@pytest.mark.full
def test_the_flow_pipeline_draws_what_the_prompt_says():
    """As the preset does: 10 steps with noise, no guidance, by our scheduler in diffusers' pipeline. Each prompt once."""
    from diffusers import StableDiffusion3Pipeline

    import ctrl_ray

    pipe = StableDiffusion3Pipeline.from_pretrained(
        FLOW_PIPELINE, text_encoder_3=None, tokenizer_3=None, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = ctrl_ray.AncestralFlowScheduler.from_config(pipe.scheduler.config, seed=0)
    assert share_right(pipe, max_sequence_length=1) >= 0.9
