"""The folder of a run: its name, its parts, and how a resumed run finds them again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ldm.util import UserError

# Processes that Lightning starts for further GPUs learn the folder of the first one from here.
_SHARED = "LDM_RUN_DIR"


@dataclass(frozen=True)
class RunDir:
    """Paths of one run. `now` is the time stamp in the names of its saved YAMLs."""

    path: Path
    now: str

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def configs(self) -> Path:
        return self.path / "configs"

    @property
    def last(self) -> Path:
        """The state that `-r` goes on from."""
        return self.checkpoints / "last.ckpt"

    @property
    def embeddings(self) -> Path:
        """The newest embeddings; `embeddings_gs-N.pt` beside it are those of step N."""
        return self.checkpoints / "embeddings.pt"

    def saved_configs(self) -> list[Path]:
        """The YAMLs of the run's starts, oldest first."""
        return sorted(self.configs.glob("*.yaml"))


def new(
    logdir: str | Path, *, name: str, data_root: Any = None, postfix: str = "", several: bool = False
) -> RunDir:
    """`<logdir>/<data's name><time>_<name><postfix>`; nothing is written yet.

    `several` processes of one run agree on one folder.
    """
    now = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    path = Path(logdir) / f"{_data_name(data_root)}{now}{f'_{name}' if name else ''}{postfix}"
    if "LOCAL_RANK" in os.environ and _SHARED in os.environ:
        path = Path(os.environ[_SHARED])
    else:
        path = _unused(path)
        if several:
            os.environ[_SHARED] = str(path)
    return RunDir(path, now)


def existing(place: str | Path, logdir: str | Path = "logs") -> tuple[RunDir, Path]:
    """The run folder and the state that `-r` names: a folder, a file in its checkpoints, or "latest".

    Raises UserError if there is nothing to go on from.
    """
    now = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    if place == "latest":
        runs = sorted(Path(logdir).glob("*/checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime)
        if not runs:
            raise UserError(f"--resume latest: there is no run with a last.ckpt in '{logdir}'")
        place = runs[-1].parent.parent
    place = Path(place)
    if not place.exists():
        raise UserError(f"--resume '{place}' does not exist; name a run folder such as logs/<run>")
    run = RunDir(place.resolve().parent.parent if place.is_file() else place, now)
    state = place if place.is_file() else run.last
    if not run.saved_configs():
        raise UserError(f"--resume '{place}': no YAML in '{run.configs}'; name a folder made by main.py")
    if not state.is_file():
        raise UserError(f"--resume '{place}': there is no '{run.last}'; the run ended before its first save")
    return run, state


def _data_name(data_root: Any) -> str:
    roots = data_root.values() if isinstance(data_root, Mapping) else [data_root] if data_root else []
    return "+".join(Path(os.path.normpath(str(root))).name for root in roots)


def _unused(path: Path) -> Path:
    """The path, or the path with a number when another run of the same second has it."""
    candidate, number = path, 2
    while candidate.exists():
        candidate = path.with_name(f"{path.name}-{number}")
        number += 1
    return candidate
