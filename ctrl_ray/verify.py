"""`python -m ctrl_ray.verify`: does training reach the distribution that CTRL promises? On problems with a known answer, and
for any adapter against exact samples of its target."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ctrl_ray import command
from ctrl_ray.config import FlowSDE
from ctrl_ray.config.fields import above, at_least, check_fields
from ctrl_ray.errors import ConfigError

if TYPE_CHECKING:
    from ctrl_ray.exact.suite import Case
    from ctrl_ray.verification.cases import ReachedLaw
    from ctrl_ray.verification.table import CaseResult

EstimatorName = Literal["full", "sticking_the_landing", "last_k", "random_suffix", "adjoint_matching", "reinforce"]
DENSITIES, BIASES = "densities.png", "bias.png"
_OF_ONE_PROBLEM = (
    *("means", "stds", "weights", "reward_slope", "reward_target", "reward_std", "guidance_strength", "kl_coef"),
    *(
        "num_steps",
        "eta",
        "sde",
        "dimension",
        "estimator",
        "latent_reduction",
        "num_updates",
        "batch_size",
        "learning_rate",
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Train on problems with a known answer, with the code that trains image pipelines, and compare the results with
    the answers. Or compare a finished run's adapter with exact samples of its target."""

    problem: (
        Literal["gaussian", "mixture", "component", "logistic", "two-controls", "dimension", "prompt-dependent"] | None
    ) = None
    """Run one problem, which the flags below can change. Default: the Gaussian, the logistic and the two-controls
    problem. prompt-dependent: labels that depend on the prompt, with and without the prompt in the classifier."""
    all: bool = False
    """Run every problem and every estimator (about half an hour on two cores)."""
    means: tuple[float, ...] | None = None
    """Means of the mixture's components."""
    stds: Annotated[tuple[float, ...] | None, above(0)] = None
    """Standard deviations of the components."""
    weights: Annotated[tuple[float, ...] | None, at_least(0)] = None
    """Weights of the components. They are normalised. prompt-dependent: the same for every prompt."""
    reward_slope: float | None = None
    """logistic, mixture, two-controls: p(y|x) = sigmoid(slope · x). prompt-dependent: sigmoid(slope · x ± 2)."""
    reward_target: float | None = None
    """gaussian, dimension, two-controls: the reward is log N(target; x, reward_std²)."""
    reward_std: Annotated[float | None, above(0)] = None
    """Standard deviation in that reward."""
    guidance_strength: Annotated[tuple[float, ...] | None, at_least(0)] = None
    """gamma, one for each control."""
    kl_coef: Annotated[float | None, above(0)] = None
    """beta. The target's exponent is gamma / beta."""
    num_steps: Annotated[int | None, at_least(1)] = None
    """Denoising steps."""
    kernel: Literal["ddim", "flow"] = "ddim"
    """Sampler of every problem: DDIM on the noise schedule of Stable Diffusion, or flow matching, shifted as in SD3."""
    sde: FlowSDE | None = None
    """With --kernel flow: where a step's noise comes from. The default is ancestral, DDIM's step in other variables. For the
    others choose eta too (Flow-GRPO's is 0.7)."""
    eta: Annotated[float | None, above(0)] = None
    """Stochasticity. Below 1 (flow_grpo: below the root of 2) the sampler remembers its initial noise and misses the target."""
    dimension: Annotated[int | None, at_least(1)] = None
    """Number of independent coordinates. The reward depends on the first one (two-controls: on the first two;
    prompt-dependent: on all, which are repeats of one training)."""
    estimator: EstimatorName | None = None
    """Gradient estimator."""
    estimator_steps: Annotated[int, at_least(0)] = 0
    """last_k: how many of the last steps have a gradient. adjoint_matching: how many steps are matched (0 means
    all)."""
    latent_reduction: Literal["sum", "mean"] | None = None
    """'mean' shows what happens when the KL is divided by the dimension."""
    num_updates: Annotated[int | None, at_least(1)] = None
    """Optimizer updates."""
    batch_size: Annotated[int | None, at_least(1)] = None
    """Trajectories per update."""
    learning_rate: Annotated[float | None, above(0)] = None
    """Peak learning rate of the pushes, in standard deviations of a step. Fewer steps need larger pushes."""
    seed: Annotated[int, at_least(0)] = 0
    """Seed of every random draw."""
    error_budget: bool = False
    """Split the distance to the true conditional into its causes, on the logistic problem with a fitted classifier."""
    labels: Annotated[int, at_least(1)] = 300
    """With --error-budget: how many labelled samples the classifier is fitted on."""
    adapter: str | None = None
    """Instead of solving problems, compare the samples of this adapter with exact samples of its target, class by class.
    The exact samples come from the pre-trained model by rejection."""
    pipeline: Literal["shapes"] | None = None
    """Without --adapter: first train one on the shapes, with the preset shapes-exact (about an hour), then compare it."""
    num_samples: Annotated[int, at_least(16)] = 2048
    """With --adapter: samples of each joint class (a class of every control), on each side."""
    max_pool_samples: Annotated[int | None, at_least(20)] = None
    """With --adapter: the most pre-trained samples to draw. Drawing ends earlier when every class has enough exact samples.
    None: 8 × num_samples × joint classes."""
    prompts_file: str | None = None
    """With --adapter: file of prompts, one per line. None: the prompts of the run that made the adapter."""
    encoding: str = "utf-8"
    """Encoding of prompts_file, such as cp1252. A byte order mark in the file has priority."""
    classifier: tuple[str, ...] = ()
    """With --adapter: NAME=FOLDER for each control, the classifier it was trained with. Empty: RUN/classifier/NAME."""
    json: bool = False
    """Print only JSON: the numbers of each case's coordinate 0; with --adapter, the content of results.json."""
    output_dir: str = "runs/verify"
    """Folder of the pictures and results.json."""
    num_workers: Annotated[int, at_least(1)] = 2
    """Workers that share every batch of a problem's training."""
    use_gpu: bool = False
    """One GPU for each of these workers. --adapter uses a GPU where there is one."""

    def __post_init__(self) -> None:
        check_fields(self)
        judged = self.adapter is not None or self.pipeline is not None
        if judged and (self.problem or self.all or self.error_budget):
            raise ConfigError(
                "--adapter and --pipeline are a comparison of their own; leave out --problem, --all and --error-budget"
            )
        of_adapters = [name for name in ("max_pool_samples", "prompts_file", "classifier") if getattr(self, name)]
        if of_adapters and not judged:
            raise ConfigError(
                f"{_flags(of_adapters)} belong to the comparison of an adapter; give --adapter RUN/adapter"
            )
        if self.kernel != "ddim" and (judged or self.error_budget):
            raise ConfigError("--kernel is of the problems with a known answer; leave it out here")
        if self.error_budget and (self.problem or self.all):
            raise ConfigError("--error-budget is about one problem, the logistic; leave out --problem and --all")
        if self.all and (self.problem or self._changes()):
            raise ConfigError("--all runs every problem as it is; leave out --problem and its flags")
        if self._changes() and not self.problem:
            from ctrl_ray.exact.suite import PROBLEMS

            raise ConfigError(
                f"{_flags(self._changes())} belong to one problem; give --problem, one of {', '.join(PROBLEMS)}"
            )

    def cases(self) -> list[Case]:
        """What is to be run."""
        from ctrl_ray.exact.suite import all_cases, default_cases, named_cases
        from ctrl_ray.verification.changes import changed, with_flow

        def chosen(cases: list[Case]) -> list[Case]:
            return [with_flow(case) for case in cases] if self.kernel == "flow" else cases

        if self.problem:
            changes = {name: getattr(self, name) for name in self._changes()}
            cases = chosen(named_cases(self.problem))
            names = [self.problem] if len(cases) == 1 else [case.problem.name for case in cases]
            steps = self.estimator_steps
            return [
                changed(case, changes, name=name, estimator_steps=steps, seed=self.seed)
                for case, name in zip(cases, names, strict=True)
            ]
        cases = chosen(all_cases() if self.all else default_cases())
        return [dataclasses.replace(case, seed=self.seed) for case in cases]

    def _changes(self) -> list[str]:
        return [name for name in _OF_ONE_PROBLEM if getattr(self, name) is not None]


def verify(options: VerifyOptions) -> bool:
    """Run what the options ask for, print and write what was reached; returns whether every bar is met."""
    from ctrl_ray.runs.claim import claimed
    from ctrl_ray.runs.outputs import check_output

    if "://" in options.output_dir:
        raise ConfigError(
            f"output_dir of verify is {options.output_dir!r}; expected a folder; give another --output-dir"
        )
    options = dataclasses.replace(options, output_dir=check_output(options.output_dir))
    with claimed(Path(options.output_dir)):
        return _verify(options)


def _verify(options: VerifyOptions) -> bool:
    if options.adapter or options.pipeline:
        return verify_adapter(options)
    if options.error_budget:
        return verify_error_budget(options)
    return verify_problems(options)


def verify_adapter(options: VerifyOptions) -> bool:
    """Compare an adapter (or one trained for it) with exact samples of its target; returns whether every bar is met.

    DataError, at the end, where a class has too few exact samples to be compared.
    """
    from ctrl_ray.offline.prompts import read_prompts
    from ctrl_ray.verification.pipeline import Question, shortages, verify_pipeline
    from ctrl_ray.verification.summary import format_classes

    folder, started = Path(options.output_dir), time.monotonic()
    question = Question(
        adapter=options.adapter or str(train_exact(folder / "run", options.seed)),
        num_samples=options.num_samples,
        max_pool_samples=options.max_pool_samples,
        prompts=None if options.prompts_file is None else tuple(read_prompts(options.prompts_file, options.encoding)),
        classifiers=command.named_values("--classifier", options.classifier, command.CLASSIFIER_EXAMPLE),
        seed=options.seed,
    )
    results = verify_pipeline(folder, question, _Progress(quiet=options.json).say)
    if options.json:
        print(json.dumps(results))
    else:
        print(f"\n{results['headline']}\n\n{format_classes(results)}\n")
        print("\n".join(f"picture   {picture}" for picture in results["pictures"]))
        print(f"results   {folder / 'results.json'}, {time.monotonic() - started:.0f} s")
    if (error := shortages(results)) is not None:
        raise error
    return bool(results["bar"]["met"])


def train_exact(folder: Path, seed: int) -> Path:
    """Train the preset shapes-exact in `folder`, or go on with it; returns the adapter."""
    from ctrl_ray.config.presets import preset
    from ctrl_ray.train import fit

    config = dataclasses.replace(preset("shapes-exact"), output_dir=str(folder), seed=seed)
    run = fit(config, resume=(folder / "config.json").is_file())
    assert run.adapter is not None
    return run.adapter


def verify_problems(options: VerifyOptions) -> bool:
    """Train on the cases, compare with their exact answers."""
    from ctrl_ray.verification.bias import find_pairs, format_biases, machine_biases, measure_biases, plot_biases
    from ctrl_ray.verification.table import format_table, machine_summary, plot_densities

    folder = Path(options.output_dir)
    started = time.monotonic()
    verified = _train_and_compare(options.cases(), options)
    summaries: dict[str, Any] = {item.case.title: machine_summary(item) for item in verified if item.coordinate == 0}
    pictures = {"densities": plot_densities(folder / DENSITIES, verified)}
    pairs = find_pairs(verified)
    biases = measure_biases(pairs)
    for pair in pairs:
        summaries[pair[0].case.title]["bias"] = machine_biases(measure_biases([pair]))
    if pairs:
        pictures["bias"] = plot_biases(folder / BIASES, pairs)
    (folder / "results.json").write_text(json.dumps(summaries, indent=2) + "\n", encoding="utf-8")
    missed = sum(not row.passed for item in verified for row in item.rows) + sum(not bias.passed for bias in biases)
    if options.json:
        print(json.dumps(next(iter(summaries.values())) if len(summaries) == 1 else summaries))
    else:
        print(format_table(verified) + (f"\n\n{format_biases(biases)}" if biases else "") + "\n")
        print("\n".join(f"{name:<9} {picture}" for name, picture in pictures.items()))
        print(f"results   {folder / 'results.json'}")
        print(f"{'every bar is met' if not missed else f'{missed} bars missed'}, {time.monotonic() - started:.0f} s")
    return missed == 0


def verify_error_budget(options: VerifyOptions) -> bool:
    """Split the distance to the true conditional into its causes; returns whether all links were measured."""
    from ctrl_ray.exact.suite import named_cases
    from ctrl_ray.verification.error_budget import budget_cases, error_budget, format_budget, plot_budget

    folder = Path(options.output_dir)
    true_case = dataclasses.replace(named_cases("logistic")[0], seed=options.seed)
    fitted_case, _ = budget_cases(true_case, options.labels, options.seed)
    fitted, exact = _train_and_compare([fitted_case, true_case], options)
    budget = error_budget(true_case.problem, fitted.solution, fitted.reached, exact.reached)
    picture = plot_budget(folder / "error_budget.png", budget)
    answer = {"links": budget.links, "switched_off": budget.switched_off}
    (folder / "error_budget.json").write_text(json.dumps(answer, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(answer) if options.json else f"{format_budget(budget)}\n\npicture {picture}")
    return True


def _train_and_compare(cases: Sequence[Case], options: VerifyOptions) -> list[CaseResult]:
    from ctrl_ray.cluster.connection import connected
    from ctrl_ray.verification.cases import train_cases
    from ctrl_ray.verification.table import verify_case

    progress = _Progress(quiet=options.json)
    verified: list[CaseResult] = []

    def compare(case: Case, reached: ReachedLaw) -> None:
        items = verify_case(case, reached.means, reached.earlier)
        verified.extend(items)
        missed = [f"{row.quantity} {row.error:+.4f}" for item in items for row in item.rows if not row.passed]
        progress.say(f"{case.title}: {'missed ' + ', '.join(missed) if missed else 'every bar is met'}")

    with connected():
        train_cases(
            cases,
            num_workers=options.num_workers,
            use_gpu=options.use_gpu,
            on_progress=progress,
            on_reached=compare,
        )
    return verified


class _Progress:
    """A line each ten seconds and at the end of each case, on stderr."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet, self._last = quiet, time.monotonic()

    def __call__(self, title: str, update: int, num_updates: int) -> None:
        now = time.monotonic()
        if not self._quiet and (now - self._last > 10 or update == num_updates):
            self._last = now
            self.say(f"{title}: update {update}/{num_updates}")

    def say(self, text: str) -> None:
        """One line, unless quiet."""
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)


def _flags(names: Sequence[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; `ctrl_ray.command` says what the exit statuses mean."""
    return command.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    import tyro

    options = tyro.cli(Annotated[VerifyOptions, tyro.conf.arg(name="")], args=argv, prog="python -m ctrl_ray.verify")
    return 0 if verify(options) else command.FAILED


if __name__ == "__main__":
    sys.exit(main())
