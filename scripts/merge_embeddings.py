"""Merge embedding files into one that the original's code loads; see --help."""

import sys

if not __package__:
    import checkout  # noqa: F401

from ldm.commands.embeddings import merge_main as main

if __name__ == "__main__":
    sys.exit(main())
