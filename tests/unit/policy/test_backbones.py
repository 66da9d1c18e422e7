"""What the families of base models say of themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from ctrl_ray.config import LoraConfig, SamplerConfig
from ctrl_ray.config.presets import preset
from ctrl_ray.errors import ConfigError, ModelError
from ctrl_ray.policy.backbones import load_backbone, text
from ctrl_ray.policy.base_model import is_here, is_outline, outline_of, resolve_base_model
from tests.families import check_rows_of_adapted_layers
from tests.policies import make_policy
from tests.pretend_device import pretend_device


def test_a_backbone_knows_its_sizes_before_anything_is_loaded(tiny_pipeline: Path) -> None:
    """Latents, images and conditions as the loaded parts make them."""
    backbone = load_backbone(str(tiny_pipeline))
    assert (backbone.denoiser, backbone.latent_shape, backbone.image_size()) == ("unet", (4, 4, 4), (32, 32))
    condition = backbone.load_encoder().encode(["a red circle", "a blue cross"])
    shapes = {name: tuple(tensor.shape) for name, tensor in condition.tensors.items()}
    assert shapes == backbone.condition_shapes(2)
    assert condition.null_tensors is not None
    assert torch.equal(condition.null_tensors["text"], backbone.load_encoder().encode(["", ""]).tensors["text"])
    images = backbone.load_decoder().decode(torch.zeros(1, *backbone.latent_shape))
    assert tuple(images.shape[2:]) == (32, 32)


def test_features_of_the_last_prompts_are_kept_on_the_cpu(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bounded number of them; what left the cache is computed again, to the same bits."""
    monkeypatch.setattr(text, "CACHED_PROMPTS", 2)
    with pretend_device() as device:
        encoder = load_backbone(str(tiny_pipeline)).load_encoder(device)
        found = encoder.encode(["one", "two", "three"]).tensors["text"]
        assert found.device == device
        assert list(encoder._cache) == ["three", ""]
        assert {features["text"].device.type for features in encoder._cache.values()} == {"cpu"}
        assert torch.equal(encoder.encode(["three", "one", "two"]).tensors["text"].cpu(), found.cpu()[[2, 0, 1]])


def test_a_hub_pipelines_parts_are_fetched_and_single_file_checkpoints_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of a repository that has both."""
    files = [
        *("model_index.json", "v1-5-pruned.safetensors", "v1-5-pruned-emaonly.safetensors", "README.md"),
        *(
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "unet/diffusion_pytorch_model.fp16.safetensors",
        ),
        *(
            "tokenizer/merges.txt",
            "tokenizer/spiece.model",
            "safety_checker/model.safetensors",
            "scheduler/scheduler_config.json",
        ),
    ]
    fetched: list[str] = []

    def snapshot(repo: str, allow_patterns: list[str], ignore_patterns: list[str], **options: str | bool | None) -> str:
        fetched.extend(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return "/snapshot"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_base_model("someone/pipeline") == "/snapshot"
    assert fetched == [
        *("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        *("tokenizer/merges.txt", "tokenizer/spiece.model", "scheduler/scheduler_config.json"),
    ]


def test_an_empty_denoiser_has_the_shapes_of_the_real_one(tiny_pipeline: Path) -> None:
    """For counting: nothing is read."""
    backbone = load_backbone(str(tiny_pipeline))
    empty, real = backbone.load_denoiser(torch.bfloat16, empty=True), backbone.load_denoiser(torch.bfloat16)
    assert {n: (p.shape, p.dtype) for n, p in empty.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in real.named_parameters()
    }
    assert {p.device.type for p in empty.parameters()} == {"meta"}


def test_rows_of_adapted_layers_are_samples_or_tokens(tiny_pipeline: Path) -> None:
    check_rows_of_adapted_layers(tiny_pipeline)


def test_the_kernel_takes_an_adapters_schedule(tiny_pipeline: Path) -> None:
    """The pipeline's own, or another one, such as an adapter has stored."""
    backbone = load_backbone(str(tiny_pipeline))
    sampler = SamplerConfig(num_steps=5, reference_steps=1)
    other = {**backbone.scheduler_config(), "timestep_spacing": "leading"}
    own, stored = backbone.make_kernel(sampler), backbone.make_kernel(sampler, other)
    assert [int(own.time(k)) for k in range(5)] == [999, 799, 599, 399, 199]
    assert [int(stored.time(k)) for k in range(5)] == [801, 601, 401, 201, 1]
    assert [own.controlled(k) for k in range(5)] == [True, True, True, True, False]


def test_other_families_are_refused_by_name(tiny_pipeline: Path, tmp_path: Path) -> None:
    """The message names what the pipeline is and what is known."""
    folder = shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "KolorsPipeline"}))
    with pytest.raises(ModelError, match=r"is a KolorsPipeline.*expected one of StableDiffusionPipeline"):
        load_backbone(str(folder))


def test_images_of_another_size_have_other_latents(tiny_pipeline: Path) -> None:
    """In pixels, which the VAE's factor divides; a family without a T5 has one length of texts."""
    backbone = load_backbone(str(tiny_pipeline), sampler=SamplerConfig(height=64, width=24))
    assert (backbone.latent_shape, backbone.image_size()) == ((4, 8, 3), (64, 24))
    with pytest.raises(ConfigError, match=r"sampler\.height is 60, but base model .* multiples of 8 pixels; give one"):
        load_backbone(str(tiny_pipeline), sampler=SamplerConfig(height=60, width=24))
    with pytest.raises(ConfigError, match=r"sampler\.max_sequence_length is 5, but .* reads texts of one length"):
        load_backbone(str(tiny_pipeline), sampler=SamplerConfig(max_sequence_length=5))
    with pytest.raises(ConfigError, match=r"sampler\.height is None and sampler\.width 24; give both"):
        SamplerConfig(width=24)


@pytest.mark.parametrize(
    ("name", "denoiser"),
    [
        ("stable-diffusion", 859_520_964),
        ("sdxl", 2_567_463_684),
        ("sd3.5-medium", 2_243_171_520),
        ("auraflow", 6_858_605_568),
    ],
)
def test_the_outline_of_a_known_model_is_of_its_size(name: str, denoiser: int) -> None:
    """Parameters of the published weights, from configurations alone."""
    base = preset(name).base_model
    folder = outline_of(base)
    assert folder is not None and is_outline(folder) and not is_here(base) and outline_of("someone/else") is None
    backbone = load_backbone(folder)
    assert sum(p.numel() for p in backbone.load_denoiser(empty=True).parameters()) == denoiser
    assert sum(p.numel() for p in backbone.load_decoder(empty=True).parameters()) in (83_653_863, 83_819_683)
    backbone.make_kernel(SamplerConfig())
    with pytest.raises(ModelError, match="holds no safetensors weights"):
        backbone.load_denoiser()


def test_a_part_without_config_is_named(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"vae/config\.json does not exist; expected"):
        load_backbone(str(folder)).image_size()


def test_lora_on_layers_that_are_not_there(tiny_pipeline: Path) -> None:
    with pytest.raises(ConfigError, match=r"\['nowhere'\] are not in this denoiser.*to_q"):
        make_policy(tiny_pipeline, {"size": 2}, lora=LoraConfig(target_modules=("nowhere",)))
