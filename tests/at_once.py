"""Programs in a process of their own that answer one command line after another, for tests of answers without torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def answers_of(program: str, lines: Sequence[str]) -> list[str]:
    """What `program`, Python's text, prints for each line of its standard input: a line each."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        input="\n".join(lines),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert len(answers) == len(lines)
    return answers
