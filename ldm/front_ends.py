"""What the settings that messages name are called where the user is: in Python, in a command line, or on the page.

A message of the library holds `setting("words")`; `UserError` puts there what the front end in use calls it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

# The environment variable that the page sets for its training processes, because it shows their messages.
VARIABLE = "LDM_FRONT_END"


class Names(NamedTuple):
    """The names of one setting; {} is a detail that the message gives."""

    python: str
    command: str
    page: str


NAMES = {
    "base": Names("base=", "--base", "'All settings (YAML)'"),
    "begin": Names(
        'settings={"embedding_manager_ckpt": "{}"}',
        "--base YAML --embedding_manager_ckpt {}",
        "model.params.personalization_config.params.embedding_manager_ckpt={} in 'Further settings'",
    ),
    "class_word": Names(
        'class_words={"{}": "cat"}',
        "--class_word cat or --class_word '{}=cat'",
        '"cat" or "{}=cat" in \'Class word\'',
    ),
    "config": Names("config= or base=", "--config or --base", "a config.yaml beside it"),
    "embedding": Names(
        'words= to generate, settings={"embedding_manager_ckpt": ...} to train',
        "--embedding_path to generate, --embedding_manager_ckpt to train",
        "'Words'",
    ),
    "encoder": Names(
        "scripts/embeddings.py convert --encoder bert, or clip_g",
        "convert --encoder bert, or clip_g",
        "scripts/embeddings.py convert --encoder bert, or clip_g",
    ),
    "export_name": Names(
        "'<my-cat>'", "with --rename '{}=<my-cat>'", "with scripts/export_diffusers.py --rename '{}=<my-cat>'"
    ),
    "features": Names("source", "--features", "scripts/evaluate_model.py --features"),
    "folder": Names("folder", "folder with --out", "folder with scripts/export_diffusers.py --out"),
    "frozen_model": Names("model=", "--actual_resume", "'Base model'"),
    "images": Names("images=", "--data_root", "'Image folder'"),
    "inference_config": Names("config=", "--config", "a config.yaml beside it"),
    "init": Names("init=", "--init_word", "'Starts from'"),
    "less_memory": Names(
        'recipe="low-memory"', "configs/recipes/low-memory.yaml as one more --base", "low-memory as 'Recipe'"
    ),
    "logdir": Names("logdir=", "--logdir", "scripts/studio.py --root"),
    "model": Names("model=", "--ckpt_path to generate, --actual_resume to train", "'Model' or 'Base model'"),
    "placeholder": Names("placeholder=", "--placeholder_string", "'Word'"),
    "plain_syntax": Names(
        'prompt_syntax="plain"', "--prompt_syntax plain", "scripts/txt2img.py --prompt_syntax plain"
    ),
    "rename": Names("rename=", "--rename", "scripts/embeddings.py merge --rename"),
    "renaming": Names(
        'ldm.load(FILE).renamed("NEW")',
        "scripts/embeddings.py merge FILES -o OUT --rename '{}=NEW' (the last file's), or --auto_rename",
        "with 'Rename to' in the tab 'Words'",
    ),
    "resume": Names("resume=", "{}", "the run"),
    "size": Names("height= and width=", "--H and --W", "'Height' and 'Width'"),
    "steps": Names("steps={}", "--max_steps {}", "up to step {}"),
    "epochs": Names(
        'settings={"lightning.trainer.max_epochs": {}}',
        "--max_epochs {}",
        "lightning.trainer.max_epochs={} in 'Further settings'",
    ),
    "source": Names("the source", "--from", "scripts/embeddings.py transfer --from"),
    # Where a value that does not fit was given.
    "typed": Names("", " ({})", ""),
    "vae": Names(
        'scripts/txt2img.py --vae, or settings={"vae": ...} to train', "--vae", "scripts/txt2img.py --vae"
    ),
    "variant": Names('settings={"variant": ...}', "--variant", "scripts/txt2img.py --variant"),
    "word_file": Names(
        "the file with words=",
        "the folder with --embedding_dir, or the file with --embedding_path",
        "the file in 'Words'",
    ),
    "words": Names("words=", "--embedding_path", "the field 'Words'"),
}

_in_use = "python"
# Private characters around a setting and its detail.
_MARK = re.compile("\ue020([a-z_]+)\ue021([^\ue022]*)\ue022")


def setting(name: str, detail: object = "") -> str:
    """Return what stands for a setting in the message of an error, until that is raised; `name` is one of `NAMES`."""
    assert name in NAMES, name
    return f"\ue020{name}\ue021{detail}\ue022"


def spoken(message: str) -> str:
    """Return a message with the names of its settings in the front end in use."""

    def name(mark: re.Match[str]) -> str:
        return str(getattr(NAMES[mark[1]], _in_use)).replace("{}", mark[2])

    return _MARK.sub(name, message)


@contextmanager
def speaking_as(front_end: str) -> Iterator[None]:
    """Name settings as in this front end, "python", "command" or "page", in all threads of the process."""
    global _in_use
    before = _in_use
    _in_use = front_end if front_end in Names._fields else "command"
    try:
        yield
    finally:
        _in_use = before
