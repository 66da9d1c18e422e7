"""Judges of prompts."""

import json

import numpy as np
import pytest
import torch

from ctrl_ray.errors import ModelError
from ctrl_ray.evaluation import fidelity
from ctrl_ray.evaluation.fidelity import (
    ClipFidelity,
    RecogniserFidelity,
    check_clip_model,
    choose_judges,
)
from ctrl_ray.evaluation.recogniser import Recogniser
from ctrl_ray.offline.shapes import PROMPTS
from ctrl_ray.policy.device import fastest_device
from tests.unit.evaluation.helpers import write_model


def test_recogniser_scores_are_its_answers_in_batches():
    torch.manual_seed(0)
    recogniser = Recogniser(width=4).eval()
    images = np.random.default_rng(0).integers(0, 256, size=(7, 64, 64, 3), dtype=np.uint8)
    pixels = torch.tensor(images / 255.0, dtype=torch.float32).permute(0, 3, 1, 2)
    colours, shapes = recogniser.recognise(pixels)
    prompts = [f"a {colour} {shape}" for colour, shape in zip(colours, shapes)]
    prompts[2] = next(prompt for prompt in PROMPTS if prompt != prompts[2])
    scores = RecogniserFidelity(recogniser, batch_size=3)(images, prompts)
    assert scores.tolist() == [1, 1, 0, 1, 1, 1, 1]


def test_no_judge_for_other_prompts_or_sizes(tmp_path, monkeypatch):
    assert choose_judges(["a cat"], (64, 64)).fidelity is None
    assert choose_judges(["a red circle"], (32, 32)).fidelity is None
    monkeypatch.setattr(fidelity, "RECOGNISER", tmp_path)
    assert choose_judges(["a red circle"], (64, 64)).fidelity is None


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny random CLIP model with a tokenizer of letters."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokens), "max_position_embeddings": 12}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    vision = {**tower, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    config = CLIPConfig(text_config={**text, **ends}, vision_config=vision, projection_dim=6)
    CLIPModel(config).save_pretrained(folder)
    return folder


def test_clip_score_is_the_models_own_similarity(clip_folder):
    judge = ClipFidelity(str(clip_folder), batch_size=2)
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, size=(3, 8, 8, 3), dtype=np.uint8)  # the model's size: no resizing
    prompts = ["red", "a blue box", "red"]  # within the context of 12 tokens
    mean, std = np.array(fidelity._CLIP_MEAN), np.array(fidelity._CLIP_STD)
    pixels = torch.tensor(((images / 255 - mean) / std).transpose(0, 3, 1, 2), dtype=torch.float32)
    tokens = judge.tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = judge.model(
            pixel_values=pixels, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).logits_per_image
        expected = (logits / judge.model.logit_scale.exp()).diagonal()
    assert judge(images, prompts) == pytest.approx(expected.numpy(), abs=1e-5)
    assert judge(np.zeros((1, 20, 32, 3), np.uint8), ["a very long prompt indeed"]).shape == (1,)


def test_a_clip_model_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        ClipFidelity(str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match="cannot be loaded"):
        ClipFidelity(str(tmp_path))


def test_a_clip_model_is_checked_without_its_weights(clip_folder, tmp_path):
    """What a run looks at before it starts."""
    check_clip_model(str(clip_folder))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    check_clip_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match="is a 'vit' model; give a folder or hub id of a CLIPModel"):
        check_clip_model(str(tmp_path))
    with pytest.raises(ModelError, match=r"CLIP model '.*nothing' cannot be loaded .*or no clip_model"):
        check_clip_model(str(tmp_path / "nothing"))


def test_the_recogniser_judges_its_prompts_and_clip_all_others(clip_folder, tmp_path):
    """clip_score is there either way; brisque with its folder alone."""
    write_model(tmp_path)
    drawn = choose_judges(["a red circle"], (64, 64), str(clip_folder), str(tmp_path))
    assert isinstance(drawn.fidelity, RecogniserFidelity) and set(drawn.scorers) == {"clip_score", "brisque"}
    animals = choose_judges(["a cat"], (64, 64), str(clip_folder))
    assert animals.fidelity is animals.scorers["clip_score"] and set(animals.scorers) == {"clip_score"}
    assert choose_judges(["a cat"], (64, 64), None, str(tmp_path)).fidelity is None
    assert choose_judges(["a cat"], (64, 64)) == (None, {})


def test_images_are_judged_on_the_first_accelerator_that_is_here(clip_folder, monkeypatch):
    assert choose_judges(["a cat"], (64, 64), str(clip_folder)).fidelity.device.type == fastest_device() == "cpu"
    monkeypatch.setattr("ctrl_ray.policy.device.devices_here", lambda: ["cpu", "meta:0", "meta:1"])
    assert fastest_device() == "meta:0"
    found = choose_judges(["a cat"], (64, 64), str(clip_folder)).fidelity
    assert found.device == torch.device("meta:0") and next(found.model.parameters()).device.type == "meta"
