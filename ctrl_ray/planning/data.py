"""What a run takes of its data set."""

from __future__ import annotations

import dataclasses

import torch

from ctrl_ray.classifiers.checks import check_fit
from ctrl_ray.config import TrainConfig
from ctrl_ray.embedded import is_embedded
from ctrl_ray.offline.plan import plan_reading
from ctrl_ray.offline.prompts import has_prompts
from ctrl_ray.wording import size_text


def check_labelled_images(config: TrainConfig) -> None:
    """A method that is trained on the data itself needs of it what a fit of each classifier does, given ones too."""
    data_alone = dataclasses.replace(config, classifier=dataclasses.replace(config.classifier, num_pipeline_samples=0))
    for name in config.controls:
        check_fit(data_alone, name)


def data_lines(config: TrainConfig, latent_elements: int) -> list[str]:
    """What of the data set is not read, where a person may think that it is; of a method that is trained on it, what it takes
    of memory, and what it loses. latent_elements: of one image."""
    if not config.draws_trajectories:
        latents = num_images(config) * latent_elements * torch.float32.itemsize
        lines = [
            f"data       {num_images(config):,} labelled images, encoded at the first update: every worker keeps "
            f"{size_text(latents)} of latents in host memory"
        ]
        if has_prompts(config.data):
            return lines
        return [
            *lines,
            f"data       warning: {config.data} has no prompts: training_method cfg trains with the empty prompt, so the "
            "policy loses what a prompt asks for; give images with prompts beside their labels, or take training_method "
            "ctrl, which needs no prompts there",
        ]
    return _unread_data(config)


def num_images(config: TrainConfig) -> int:
    """Labelled images of a run with data, bad rows among them."""
    drawn = is_embedded(config.data)
    number = config.num_drawn_images if drawn else plan_reading(config.data or "", {}).num_rows
    return min(number, config.classifier.max_images or number)


def _unread_data(config: TrainConfig) -> list[str]:
    fitted = {name: control.classifier for name, control in config.controls.items() if control.classifier is not None}
    if config.data is None or is_embedded(config.data) or len(fitted) < len(config.controls):
        return []
    read = "nothing of it is read" if config.prompts_file else "only its prompts are read"
    classifiers = ", ".join(f"{name} ({folder})" for name, folder in fitted.items())
    return [
        f"data       {config.data}: {read}, no image and no label: there are classifiers already, of {classifiers}; to fit "
        "them on the data: --refit-classifier"
    ]
