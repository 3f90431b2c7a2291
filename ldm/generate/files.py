"""Generated pictures as numbered files, and grids of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ldm.files import write_whole
from ldm.images import image_grid
from ldm.util import UserError

FORMATS = {"png": "PNG", "jpg": "JPEG"}
_FORBIDDEN = '<>:"/\\|?*' if os.name == "nt" else "/"
_LONGEST = 200  # bytes, of the 255 that file systems allow


class PictureFolder:
    """A folder of pictures named by numbers of `digits` digits; new ones go on after those that are there.

    Raises:
        UserError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str | Path, format: str = "png", digits: int = 4) -> None:
        self.folder, self.format, self.digits = Path(folder), format, digits
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the folder '{folder}' ({error.strerror}); choose another"
            ) from error
        if not os.access(self.folder, os.W_OK):
            raise UserError(f"cannot write to the folder '{folder}'; choose another")
        self.next = free_number(self.folder)

    def save(self, picture: Image.Image) -> Path:
        """Write the picture under the next number."""
        path = self.folder / f"{self.next:0{self.digits}}.{self.format}"
        self.next += 1
        return save_picture(picture, path)


def save_picture(picture: Image.Image, path: Path) -> Path:
    """Write a picture whole, in the format that its suffix names; JPEGs at high quality."""
    options = {"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}
    return write_whole(path, lambda file: picture.save(file, FORMATS[path.suffix[1:]], **options))


def save_grid(pictures: Sequence[Image.Image], columns: int, path: Path) -> Path:
    """Write one sheet with the pictures in rows of `columns`."""
    return save_picture(image_grid(pictures, columns), path)


def free_number(folder: Path, prefix: str = "") -> int:
    """One more than the largest number of a file `prefix`NUMBER.SUFFIX; 0 without such a file."""
    stems = (file.stem.removeprefix(prefix) for file in folder.iterdir() if file.name.startswith(prefix))
    return max((int(stem) + 1 for stem in stems if stem.isascii() and stem.isdigit()), default=0)


def name_of(prompt: str) -> str:
    """A file name for a prompt: dashes for spaces, as short as file systems want it, never hidden or empty."""
    name = "".join(
        "-" if c.isspace() else "_" if c in _FORBIDDEN or not c.isprintable() else c for c in prompt
    )
    name = name.encode()[:_LONGEST].decode(errors="ignore")
    return f"_{name[1:]}" if name.startswith(".") else name or "grid"
