"""Open the page to learn words from images and to generate with them; see --help."""

import sys

if not __package__:
    import checkout  # noqa: F401

from ldm.commands.base import guarded
from ldm.studio.server import main

if __name__ == "__main__":
    sys.exit(guarded(main))
