import json
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor
from transformers.utils import logging

from ctrl_ray.classifiers.classifier import ImageClassifier, new_network
from ctrl_ray.config import ControlConfig
from ctrl_ray.errors import ModelError
from tests.tiny import make_tiny_clip

SPEC = ControlConfig(oracle="jpeg_size", thresholds=(1500.0, 1700.0, 1900.0), unit="bytes")
PROMPTS = ["a red circle", "a blue cross"]


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        num_labels=10,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(params=["cnn", "cnn+prompt", "vit", "vit+prompt", "clip", "clip+prompt"])
def classifier(request: pytest.FixtureRequest) -> ImageClassifier:
    kind, _, conditional = request.param.partition("+")
    name = kind
    if kind == "vit":
        name = f"transformers:{request.getfixturevalue('vit_folder')}"
    elif kind == "clip":
        name = f"clip:{request.getfixturevalue('clip_folder')}"
    torch.manual_seed(1)
    network, arguments = new_network(name, 4, prompt_conditional=bool(conditional))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return ImageClassifier(
        network.eval(), kind=name.partition(":")[0], arguments=arguments, control="jpeg_size", spec=SPEC,
        temperature=1.2345678901234567, image_size=(40, 56), base_model="shapes", calibration={"after": {"ece": 0.01}},
    )  # fmt: skip


def test_log_probs_are_a_law_over_the_classes(classifier: ImageClassifier) -> None:
    images = torch.rand(2, 3, 40, 40)
    log_probs = classifier.class_log_probs(images, PROMPTS)
    assert log_probs.shape == (2, 4)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(2))
    expected = classifier.logits(images, PROMPTS) / 1.2345678901234567
    torch.testing.assert_close(log_probs, expected - expected.logsumexp(1, keepdim=True))


def test_a_saved_classifier_answers_bit_for_bit(
    classifier: ImageClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.rand(2, 3, 40, 40)
    expected = classifier.class_log_probs(images, PROMPTS)
    classifier.save(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a saved classifier needs no network"))
    loaded = ImageClassifier.from_pretrained(tmp_path)
    assert torch.equal(loaded.class_log_probs(images, PROMPTS), expected)
    assert loaded.temperature == classifier.temperature
    assert (loaded.spec.thresholds, loaded.spec.unit, loaded.spec.oracle) == (SPEC.thresholds, "bytes", "jpeg_size")
    assert (loaded.control, loaded.image_size, loaded.base_model) == ("jpeg_size", (40, 56), "shapes")
    assert loaded.calibration == {"after": {"ece": 0.01}}
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_backbone_loads_without_a_word_about_the_parts_it_leaves_out(
    clip_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    level = logging.get_verbosity()
    new_network(f"clip:{clip_folder}", 4, prompt_conditional=True)
    assert "".join(capfd.readouterr()) == ""
    assert logging.get_verbosity() == level and logging.is_progress_bar_enabled()


def test_gradient_at_the_image_agrees_with_finite_differences(classifier: ImageClassifier) -> None:
    """float64, through resizing and normalisation; relative tolerance 1e-5."""
    classifier.double()
    images = torch.rand(2, 3, 40, 40, dtype=torch.float64, requires_grad=True)

    def value(at: torch.Tensor) -> torch.Tensor:
        return classifier.class_log_probs(at, PROMPTS)[[0, 1], [2, 0]].sum()

    (gradient,) = torch.autograd.grad(value(images), images)
    direction, step = torch.randn_like(images), 1e-6
    difference = (value(images + step * direction) - value(images - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(difference.detach()), rel=1e-5)


def test_the_prompt_counts_only_where_the_classifier_is_conditional(classifier: ImageClassifier) -> None:
    images = torch.rand(1, 3, 40, 40).expand(2, -1, -1, -1)
    log_probs = classifier.class_log_probs(images, PROMPTS)
    differs = not torch.equal(log_probs[0], log_probs[1])
    assert differs == classifier.prompt_conditional
    if classifier.prompt_conditional:
        with pytest.raises(ModelError, match="expected 2 prompts, one for each image, got none"):
            classifier.class_log_probs(images)


def test_a_transformers_backbone_keeps_its_weights_and_normalises_as_its_processor(vit_folder: Path) -> None:
    network, _ = new_network(f"transformers:{vit_folder}", 4, prompt_conditional=False)
    original = ViTForImageClassification.from_pretrained(vit_folder)
    assert torch.equal(
        network.backbone.vit.embeddings.patch_embeddings.projection.weight,
        original.vit.embeddings.patch_embeddings.projection.weight,
    )
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    expected = ViTImageProcessor.from_pretrained(vit_folder)(pixels, return_tensors="pt").pixel_values
    torch.testing.assert_close(network.preprocessing(pixels / 255), expected, atol=1e-5, rtol=0)


def test_the_clip_tower_is_frozen_and_the_head_is_not(clip_folder: Path) -> None:
    network, _ = new_network(f"clip:{clip_folder}", 4, prompt_conditional=True)
    trained = {name.split(".")[0] for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {"head"}
    assert not network.train().vision.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": "forest"}, "network 'forest' is unknown"),
        ({"classes": ["a", "b", "c", "d", "e"], "thresholds": []}, "does not fit the network .* 5 outputs"),
        ({"classes": ["a", "b"]}, "inconsistent"),
        ({"network_arguments": {"depht": 3}}, "cannot be built from its arguments"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    network, arguments = new_network("cnn", 4, prompt_conditional=False)
    ImageClassifier(network, kind="cnn", arguments=arguments, control="jpeg_size", spec=SPEC).save(tmp_path)
    file = tmp_path / "classifier.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        ImageClassifier.from_pretrained(tmp_path)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no classifier\.json"):
        ImageClassifier.from_pretrained(tmp_path)
    network, arguments = new_network("cnn", 4, prompt_conditional=False)
    ImageClassifier(network, kind="cnn", arguments=arguments, control="jpeg_size", spec=SPEC).save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="must come from the same fit"):
        ImageClassifier.from_pretrained(tmp_path)
    (tmp_path / "classifier.json").write_text("{}")
    with pytest.raises(ModelError, match="lacks control, classes, network"):
        ImageClassifier.from_pretrained(tmp_path)
    (tmp_path / "classifier.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        ImageClassifier.from_pretrained(tmp_path)


def test_a_backbone_that_cannot_be_found_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        new_network(f"transformers:{tmp_path / 'nowhere'}", 4, prompt_conditional=False)
