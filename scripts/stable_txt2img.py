"""Generate images with Stable Diffusion v1 and embeddings learned for it; see --help."""

import sys

if not __package__:
    import checkout  # noqa: F401

from ldm.commands.generate import stable_main as main

if __name__ == "__main__":
    sys.exit(main())
