"""The commands and the Python of README and its kin, as a reader would type them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_FOLDERS = ("ctrl_ray", "tune_spaces", "cluster", "tests")  # not runs/, whose adapters have a README of their own
DOCUMENTS = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(file for name in _FOLDERS for file in (ROOT / name).rglob("README.md")),
    ]
)

_BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.M | re.S)
_RECORDED = ("python", "python3", "pip", "ray", "sbatch", "kubectl", "bash")
_RECORDER = """
record() { printf '%s\\0' "$@" >>"$RECORDED"; printf '\\n\\0' >>"$RECORDED"; }
for name in $NAMES; do eval "$name() { record $name \\"\\$@\\"; }"; done
python() { if [ "$1" = -c ]; then command python "$@"; else record python "$@"; fi; }
function . { :; } # an environment that is not made need not be entered
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: str
    """Its path below the root."""
    language: str
    text: str

    @property
    def name(self) -> str:
        """The document and the first line that is no import."""
        lines = [line for line in self.text.splitlines() if line and not line.startswith(("import ", "from "))]
        return f"{self.document}: {lines[0]}"

    def commands(self) -> list[list[str]]:
        """Words of each command in turn, as bash makes them of the text; none of them is run, but for `python -c`."""
        assert self.language == "bash"
        with tempfile.NamedTemporaryFile("r") as recorded:
            environment = {**os.environ, "RECORDED": recorded.name, "NAMES": " ".join(_RECORDED)}
            subprocess.run(["bash", "-euc", _RECORDER + self.text], env=environment, check=True, cwd=ROOT)
            words = recorded.read().split("\0")
        commands: list[list[str]] = [[]]
        for word in words[:-1]:
            if word == "\n":
                commands.append([])
            else:
                commands[-1].append(word)
        return commands[:-1]


def blocks() -> list[Block]:
    """Of all documents, in order."""
    return [
        Block(str(document.relative_to(ROOT)), language, text)
        for document in DOCUMENTS
        for language, text in _BLOCK.findall(document.read_text(encoding="utf-8"))
    ]


def block(name: str) -> Block:
    """The one whose name begins so."""
    (found,) = [each for each in blocks() if each.name.startswith(name)]
    return found


def own_commands(commands: list[list[str]]) -> list[tuple[str, list[str]]]:
    """(name, arguments) of every `python -m ctrl_ray.NAME`, also where another command is told to run it."""
    found = []
    for words in commands:
        for at, word in enumerate(words):
            if word == "-m" and words[at - 1].startswith("python") and words[at + 1].startswith("ctrl_ray."):
                found.append((words[at + 1].removeprefix("ctrl_ray."), words[at + 2 :]))
    return found
