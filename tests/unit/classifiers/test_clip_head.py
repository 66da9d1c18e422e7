"""Scores by a head on CLIP's features, against the CLIP's own embeddings and matrix products written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPModel

from ctrl_ray.classifiers.classifier import new_network
from ctrl_ray.classifiers.clip_head import load, read_head
from ctrl_ray.errors import ConfigError, ModelError
from ctrl_ray.offline.labelling import _named_oracles
from ctrl_ray.oracles import control_name, load_oracle, measure
from tests.tiny import CLIP_FEATURES, make_tiny_clip, make_tiny_head

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("clip"))


def embeddings(clip: Path, images: np.ndarray) -> Tensor:
    """Of unit length, by the whole CLIPModel."""
    pixels = (torch.tensor(images / 255) - torch.tensor(MEAN)) / torch.tensor(STD)
    model = CLIPModel.from_pretrained(clip)
    with torch.no_grad():
        vision = model.vision_model(pixel_values=pixels.permute(0, 3, 1, 2).float()).pooler_output
        found = model.visual_projection(vision)
    return found / found.norm(dim=1, keepdim=True)


def test_a_linear_head_is_a_dot_product(clip: Path, tmp_path: Path) -> None:
    file = make_tiny_head(tmp_path / "aesthetic.safetensors")
    name = f"clip_head:{file}@{clip}"
    weight = torch.randn(1, CLIP_FEATURES, generator=torch.Generator().manual_seed(0))
    expected = embeddings(clip, IMAGES) @ weight[0] + 5
    assert measure(load_oracle(name), IMAGES) == pytest.approx(expected.double().numpy(), abs=1e-5)
    assert control_name(name) == "aesthetic"


def test_its_column_is_called_after_the_file(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `python -m ctrl_ray.label` writes; its workers have another working directory."""
    monkeypatch.chdir(tmp_path)
    file = make_tiny_head(tmp_path / "aesthetic.safetensors")
    assert _named_oracles(["jpeg_size", f"clip_head:aesthetic.safetensors@{clip}"]) == {
        "jpeg_size": "jpeg_size",
        "aesthetic": f"clip_head:{file}@{clip}",
    }


@pytest.mark.parametrize(
    ("activation", "between"),
    [(None, lambda x: x), ("relu", torch.relu), ("gelu", torch.nn.functional.gelu)],
    ids=["none", "relu", "gelu"],
)
def test_an_mlp_in_the_order_of_its_layers_numbers(clip: Path, tmp_path: Path, activation: str | None, between) -> None:  # type: ignore[no-untyped-def]
    """layers.10 comes after layers.2; a layer without a bias has none. The names are those of LAION's predictor."""
    generator = torch.Generator().manual_seed(1)
    first, second, third = (torch.randn(*shape, generator=generator) for shape in ((5, CLIP_FEATURES), (3, 5), (1, 3)))
    bias = torch.randn(5, generator=generator)
    tensors = {"layers.10.weight": third, "layers.0.weight": first, "layers.0.bias": bias, "layers.2.weight": second}
    save_file(tensors, tmp_path / "head.safetensors", metadata=activation and {"activation": activation})
    expected = between(between(embeddings(clip, IMAGES) @ first.T + bias) @ second.T) @ third[0]
    found = measure(load_oracle(f"clip_head:{tmp_path / 'head.safetensors'}@{clip}"), IMAGES)
    assert found == pytest.approx(expected.double().numpy(), abs=1e-4)


def test_the_centre_square_of_any_picture_is_scored(clip: Path, tmp_path: Path) -> None:
    """In colour, on white where it is transparent."""
    oracle = load(f"{make_tiny_head(tmp_path / 'head.safetensors')}@{clip}")
    wide = np.zeros((32, 60, 4), dtype=np.uint8)
    wide[:, 14:46, :3], wide[:, 14:46, 3] = IMAGES[0], 255
    assert oracle(Image.fromarray(wide)) == oracle(Image.fromarray(IMAGES[0]))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(2, CLIP_FEATURES)}, r"the last with 1 output"),
        ({"a.weight": torch.zeros(4, 8), "b.weight": torch.zeros(1, 5)}, "each as wide as the one before"),
        ({"weight": torch.zeros(1, 8, 3, 3)}, "linear layers only"),
        ({"weight": torch.zeros(1, 8), "bias": torch.zeros(2)}, "linear layers only"),
        ({"weight": torch.zeros(1, 8), "running_mean": torch.zeros(8)}, "linear layers only"),
        ({"bias": torch.zeros(1)}, "linear layers only"),
    ],
)
def test_what_is_no_head_is_said(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    save_file(tensors, tmp_path / "head.safetensors")
    with pytest.raises(ConfigError, match=message):
        read_head(tmp_path / "head.safetensors")


def test_a_file_that_cannot_be_used_is_said(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist; expected a safetensors file of linear layers"):
        load_oracle(f"clip_head:{tmp_path / 'nothing.safetensors'}")
    (tmp_path / "pickle.pth").write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match=r"is not a safetensors file"):
        read_head(tmp_path / "pickle.pth")
    save_file({"weight": torch.zeros(1, 4)}, tmp_path / "odd.safetensors", metadata={"activation": "tanh"})
    with pytest.raises(ConfigError, match=r"activation 'tanh' .*expected one of none, relu, gelu"):
        read_head(tmp_path / "odd.safetensors")
    save_file({"weight": torch.zeros(1, 4)}, tmp_path / "narrow.safetensors")
    with pytest.raises(ConfigError, match=r"is for 4 features, but .* has 8; name the CLIP"):
        load(f"{tmp_path / 'narrow.safetensors'}@{clip}")
    with pytest.raises(ModelError, match=r"CLIP model .* cannot be loaded"):
        load(f"{make_tiny_head(tmp_path / 'head.safetensors')}@{tmp_path / 'no_clip'}")


def test_a_classifier_on_the_same_clip_learns_the_heads_classes(clip: Path, tmp_path: Path) -> None:
    """Stage 1's network 'clip:' on labels of the oracle: what `paper-multi-task` does for its aesthetic classes."""
    oracle = load(f"{make_tiny_head(tmp_path / 'head.safetensors')}@{clip}")
    rng = np.random.default_rng(3)
    images = (rng.uniform(0, 255, (64, 1, 1, 3)) * np.ones((1, 32, 32, 1))).astype(np.uint8)
    values = measure(oracle, images)
    labels = torch.tensor(values >= np.median(values)).long()
    torch.manual_seed(0)
    network, _ = new_network(f"clip:{clip}", 2, prompt_conditional=False)
    inputs = torch.tensor(images / 255).permute(0, 3, 1, 2).float()
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(network(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (network(inputs).argmax(1) == labels).float().mean() > 0.95
