"""Generate images from prompts, with learned embeddings; see --help."""

import sys

if not __package__:
    import checkout  # noqa: F401

from ldm.commands.generate import main

if __name__ == "__main__":
    sys.exit(main())
