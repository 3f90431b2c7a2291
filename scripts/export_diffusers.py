"""Write a model with learned words as a pipeline of diffusers; see --help."""

import sys

if not __package__:
    import checkout  # noqa: F401

from ldm.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
