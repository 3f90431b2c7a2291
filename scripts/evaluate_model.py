"""Measure learned concepts in generated images; see --help."""

import sys

if not __package__:
    import checkout  # noqa: F401

from ldm.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
