"""What a comparison will take, before anything is loaded or fetched: calls, hours, dollars.

Calls are counted by `comparison.work`. The operations of one are counted on fake tensors where the base model is on this
machine; those of Stable Diffusion 1.5 are kept here. What a card keeps up, and what it costs, is given or remembered.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from ctrl_ray.comparison.methods import NOMINAL_TRIES, Setting
from ctrl_ray.comparison.plan import DEAR, EXACT_A_TEST_IMAGE, MOST_POOL, MethodPlan, Plan, num_joint_classes
from ctrl_ray.comparison.training import run_config
from ctrl_ray.comparison.windows import STARTS, has_window, starting_at
from ctrl_ray.comparison.work import Rows, image_rows, training_rows
from ctrl_ray.config import TrainConfig
from ctrl_ray.config.paths import absolute_model
from ctrl_ray.embedded import is_embedded
from ctrl_ray.errors import ConfigError
from ctrl_ray.planning.assumed import DATA
from ctrl_ray.planning.cost import (
    AWS_MACHINES,
    CPU_UTILISATION,
    GPU_UTILISATION,
    PRICES_OF,
    measured_cpu_flops,
)
from ctrl_ray.planning.counts import PolicyCounter
from ctrl_ray.planning.plan import num_branches
from ctrl_ray.policy.base_model import OUTLINES, outline_of
from ctrl_ray.wording import duration, text_table

TIMED_RUNS, TIMED = 2, 16
"""Timings of a method, and of plain sampling beside it, and the images of each: at least."""


@dataclass(frozen=True, kw_only=True)
class RowFlops:
    """Floating-point operations of one row, or of one image."""

    forward: float
    backward: float
    decode: float
    """Without its gradient; back to the latents it takes as much again."""

    def denoiser(self, rows: Rows) -> float:
        """Of the denoiser."""
        return rows.forwards * self.forward + rows.backwards * self.backward

    def decoder(self, rows: Rows) -> float:
        """Of the VAE's decoder. Classifiers are not counted."""
        return (rows.decodes + rows.decode_backwards) * self.decode


STABLE_DIFFUSION = RowFlops(forward=0.8044e12, backward=0.9899e12, decode=2.540e12)
"""Stable Diffusion 1.5 at 512 pixels with LoRA of rank 4 on its attention layers, as `PolicyCounter` counts it."""

KNOWN = {"stable-diffusion-v1-5/stable-diffusion-v1-5": STABLE_DIFFUSION}
"""By hub id: what need not be counted again."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What it runs on, and where that is known from."""

    num_cards: int
    """Workers that share the work evenly."""
    denoiser: float
    """Operations a second that one of them keeps up in the denoiser."""
    decoder: float
    """The same in the decoder."""
    source: str
    dollars_per_hour: float | None
    """Of all of them together; None: nobody said."""
    price_source: str = ""

    def hours(self, rows: Rows, flops: RowFlops) -> float:
        """Of all the work."""
        seconds = flops.denoiser(rows) / self.denoiser + flops.decoder(rows) / self.decoder
        return seconds / self.num_cards / 3600


@dataclass(frozen=True, kw_only=True)
class MethodEstimate:
    """One line."""

    title: str
    image: Rows
    """To draw an image with the dearest value of the knob, and decode it."""
    drawn: Rows
    """All its images, validation, test and timing, with what judges them."""
    trained: Rows
    """Its runs, with their evaluations."""

    @property
    def all(self) -> Rows:
        """Both together."""
        return self.drawn + self.trained


def estimate_plan(plan: Plan, config: TrainConfig) -> list[MethodEstimate]:
    """The line of every method, with a line before them for what all share, the exact samples, one after CTRL for the prompts
    that are held back, and a last one for methods that push each step and begin later."""
    largest = max(method.counts.test for method in plan.methods)
    plain = image_rows(Setting(), config)
    judged = plain + Rows(decodes=1)
    pool = min(MOST_POOL * largest, NOMINAL_TRIES * EXACT_A_TEST_IMAGE * largest / num_joint_classes(config))
    lines = [MethodEstimate(title="exact samples", image=plain, drawn=judged * pool, trained=Rows())]
    for method in plan.methods:
        lines.append(_method(method, config, plain))
        if method.name == "ctrl" and plan.held_out:
            held_out = dataclasses.replace(method, counts=dataclasses.replace(method.counts, validation=0))
            one = _method(dataclasses.replace(held_out, seeds=(0,), adapters=(), values=(1.0,)), config, plain)
            twice = dataclasses.replace(one, title="CTRL, prompts held back", drawn=one.drawn * 2)
            lines.append(twice)
    later = [] if plan.quick else [method for method in plan.methods if _begins_later(method)]
    if later:
        drawn = sum((_later(method, config) for method in later), Rows()) * plan.common_test
        lines.append(MethodEstimate(title="pushes that begin later", image=Rows(), drawn=drawn, trained=Rows()))
    return lines


def _begins_later(plan: MethodPlan) -> bool:
    return has_window(plan) and max(map(plan.cost, plan.values)) <= DEAR


def _later(plan: MethodPlan, config: TrainConfig) -> Rows:
    """An image from each of STARTS on, judged."""
    value = max(plan.values, key=plan.cost)
    later = (dataclasses.replace(plan, method=starting_at(plan.method, start)) for start in STARTS)
    return sum((image_rows(_setting(method, value, config), config, judged=True) for method in later), Rows())


def _method(plan: MethodPlan, config: TrainConfig, plain: Rows) -> MethodEstimate:
    trains = bool(plan.seeds) and plan.method.training is not None
    adapter = trains or bool(plan.adapters)
    images = {value: image_rows(_setting(plan, value, config), config, adapter=adapter) for value in plan.values}
    judged = {
        value: image_rows(_setting(plan, value, config), config, adapter=adapter, judged=True) for value in plan.values
    }
    dearest = max(plan.values, key=lambda value: (plan.cost(value), images[value].forwards))
    validation = sum((judged[value] for value in plan.values), Rows()) * (plan.counts.validation * plan.chooses)
    timing = (images[dearest] + plain) * (TIMED_RUNS * TIMED)
    trained = Rows()
    if trains:
        assert plan.method.training is not None
        with_data = dataclasses.replace(config, data=config.data or DATA)
        run = run_config(with_data, plan.method.training, Path(config.output_dir), seed=0)
        trained = training_rows(run) * len(plan.seeds)
    return MethodEstimate(
        title=plan.method.title,
        image=images[dearest],
        drawn=(validation + judged[dearest] * plan.counts.test) * plan.copies + timing,
        trained=trained,
    )


def _setting(plan: MethodPlan, value: float, config: TrainConfig) -> Setting:
    noised = tuple(f"{name}=nowhere" for name in config.controls)
    return plan.method.at(value, noised)


def row_flops(config: TrainConfig) -> RowFlops:
    """Of the base model; ConfigError where it is neither on this machine nor known."""
    if config.base_model in KNOWN:
        return KNOWN[config.base_model]
    base_model = outline_of(config.base_model) or absolute_model(config.base_model)
    if not is_embedded(base_model) and not Path(base_model).is_dir():
        raise ConfigError(
            f"what {config.base_model} computes is not known here, and --dry-run fetches nothing; expected 'shapes', a folder, "
            f"or {', '.join(OUTLINES)}: give --base-model FOLDER"
        )
    scaling = dataclasses.replace(config.scaling, gradient_checkpointing=False, num_workers=1)
    counted = dataclasses.replace(
        config,
        base_model=base_model,
        scaling=scaling,
        estimator=dataclasses.replace(config.estimator, keep_graphs=False),
    )
    counter = PolicyCounter(counted, counted.controls)
    step, branches = counter.flops(1), num_branches(counted)
    return RowFlops(
        forward=step.forward / branches,
        backward=step.backward / branches,
        decode=counter.counts().decoder.operations / 2,
    )


def hardware(
    config: TrainConfig,
    *,
    card: str,
    num_cards: int,
    teraflops: float | None,
    dollars_per_hour: float | None,
) -> Hardware:
    """What the preset would run on: cards where it uses them, else the cores of this machine, which are measured.

    card: one of AWS_MACHINES'. teraflops: 10¹² operations a second that one card (or one core) keeps up in the denoiser; None:
    GPU_UTILISATION of the card's peak. dollars_per_hour: of all cards together; None: remembered prices. ConfigError for a card
    that nothing is known of.
    """
    said = "as given"
    if not config.scaling.use_gpu:
        rate = 1e12 * teraflops if teraflops else CPU_UTILISATION * measured_cpu_flops(1)
        cores = len(os.sched_getaffinity(0))
        source = said if teraflops else "measured on this machine just now"
        return Hardware(
            num_cards=cores,
            denoiser=rate,
            decoder=rate,
            source=source,
            dollars_per_hour=dollars_per_hour,
            price_source=said,
        )
    machine = next((each for each in AWS_MACHINES if each.gpu == card), None)
    if machine is None:
        known = ", ".join(each.gpu for each in AWS_MACHINES)
        raise ConfigError(
            f"--card {card!r} is not known; expected one of {known}, the nearest with a --teraflops of yours"
        )
    precision = config.scaling.precision
    peak, scoring = machine.flops(precision), machine.flops("fp32" if precision == "fp32" else "tf32")
    rate = 1e12 * teraflops if teraflops else GPU_UTILISATION * peak
    remembered = machine.dollars_per_hour / machine.num_gpus * num_cards
    return Hardware(
        num_cards=num_cards,
        denoiser=rate,
        decoder=rate * scoring / peak,
        source=said
        if teraflops
        else f"{GPU_UTILISATION:.0%} of an {card}'s peak in {precision} (as measured on an H200)",
        dollars_per_hour=remembered if dollars_per_hour is None else dollars_per_hour,
        price_source=f"{machine.name}, {PRICES_OF}" if dollars_per_hour is None else said,
    )


def estimate_text(plan: Plan, config: TrainConfig, on: Hardware, flops: RowFlops) -> str:
    """The table, with what is assumed."""
    lines = estimate_plan(plan, config)
    total = sum((line.all for line in lines), Rows())
    hours, operations = on.hours(total, flops), flops.denoiser(total) + flops.decoder(total)
    rows = [["method", "forwards", "backwards", "decodes", "of them back", "images", "training", "hours", "dollars"]]
    for line in lines:
        image = [f"{value:,.4g}" if line.image != Rows() else "–" for value in dataclasses.astuple(line.image)]
        rows.append([line.title, *image, *_in_all(line.drawn, line.trained), *_price(on.hours(line.all, flops), on)])
    parts = (sum((getattr(line, part) for line in lines), Rows()) for part in ("drawn", "trained"))
    rows.append(["all", *[""] * 4, *_in_all(*parts), *_price(hours, on)])
    worker = "cards" if config.scaling.use_gpu else "cores"
    text = [
        "",
        "work of an image at the dearest value of the knob: rows of the denoiser (one a branch of guidance), decodes, and",
        "those with a gradient; forwards and backwards of all images, and of all training",
        text_table(rows),
        f"in all {_count(total.forwards)} forwards, {_count(total.backwards)} backwards, {_count(total.decodes)} decodes, "
        f"{_count(total.decode_backwards)} of them with a gradient: {_petaflop(operations)} PFLOP (counted), "
        f"{duration(3600 * hours)} on {on.num_cards} {worker}",
        f"assumed: {on.denoiser / 1e12:,.3g} TFLOP/s in the denoiser, {on.source}, {on.decoder / 1e12:,.3g} in the decoder",
        f"         {NOMINAL_TRIES:g} tries for an exact sample; all {worker} busy to the end",
    ]
    if on.dollars_per_hour is not None:
        text.append(f"         ${on.dollars_per_hour:,.2f} an hour for all of them, {on.price_source}")
    return "\n".join([*text, "not counted: classifiers and their fits, encoding prompts and data, loading, waiting"])


def _in_all(*parts: Rows) -> list[str]:
    """Forwards and backwards."""
    return [_count(part.forwards + part.backwards) for part in parts]


def _count(number: float) -> str:
    return "–" if not number else f"{number / 1e6:,.2f} M" if number >= 1e6 else f"{number / 1e3:,.0f} k"


def _petaflop(operations: float) -> str:
    return f"{operations / 1e15:,.0f}" if operations >= 1e17 else f"{operations / 1e15:.3g}"


def _price(hours: float, on: Hardware) -> list[str]:
    """Hours and dollars."""
    return [f"{hours:,.2f}", "–" if on.dollars_per_hour is None else f"{hours * on.dollars_per_hour:,.0f}"]
