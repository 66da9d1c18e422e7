"""`python -m ctrl_ray`, or `ctrl-ray`: the list of commands, and the way to each of them.

Nothing heavy is imported here, so that the list and --help come at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import ctrl_ray
from ctrl_ray import command
from ctrl_ray.errors import ConfigError

COMMANDS = {
    "train": ("ctrl_ray.train", "teach a model a control: classifier, fine-tuning, evaluation, adapter, report"),
    "sample": ("ctrl_ray.sample", "make images with an adapter that a run has trained"),
    "label": ("ctrl_ray.label", "measure your own images and write them as a data set"),
    "classify": ("ctrl_ray.classify", "fit the classifier of one control on a data set"),
    "evaluate": ("ctrl_ray.evaluate", "judge an adapter or a folder of its images, or compare finished runs"),
    "demo": ("ctrl_ray.demo", "a page on this machine that draws with an adapter, before and after"),
    "report": ("ctrl_ray.report", "make a run's report anew from its files, also of one that stopped"),
    "tune": ("ctrl_ray.tune", "train many times with other settings and find the best"),
    "compare": ("ctrl_ray.compare", "compare the method with every baseline on one task, knob by knob"),
    "verify": ("ctrl_ray.verify", "check the method where the answer is known, or an adapter against exact samples"),
}
"""Name to module, whose `main` takes the arguments, and one line for the list. A new command is added here."""

_LIST = """ctrl_ray teaches a pre-trained diffusion model one more control.

usage: python -m ctrl_ray COMMAND [FLAGS]      the same: ctrl-ray COMMAND [FLAGS]

{commands}

Run this first. It trains the built-in example in about eight minutes on two CPU cores, without a GPU or a download:

  python -m ctrl_ray train

Then make images with what it has trained:

  python -m ctrl_ray sample --adapter runs/shapes/adapter --prompt "a red circle" --control jpeg_size=3

`python -m ctrl_ray COMMAND --help` explains the flags of a command; --version prints the version."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of the package; `ctrl_ray.command` says what the exit statuses mean."""
    return command.run(_main, argv)


def _main(argv: Sequence[str]) -> int | None:
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(_LIST.format(commands="\n".join(f"  {name:10}{line}" for name, (_, line) in COMMANDS.items())))
        return None
    if name == "--version":
        print(f"ctrl_ray {ctrl_ray.__version__}")
        return None
    if name not in COMMANDS:
        from ctrl_ray.config.overrides import nearest

        raise ConfigError(f"{name!r} is not a command{nearest(name, COMMANDS)}")
    module, _ = COMMANDS[name]
    status: int = importlib.import_module(module).main(rest)
    return status


if __name__ == "__main__":
    sys.exit(main())
