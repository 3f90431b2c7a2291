"""Inspect, convert, merge and split embedding files of any tool; see --help."""

import sys

if not __package__:
    import checkout  # noqa: F401

from ldm.commands.embeddings import main

if __name__ == "__main__":
    sys.exit(main())
