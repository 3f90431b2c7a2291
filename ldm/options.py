"""Values on a command line: parsers of them, and a parser of the whole whose errors are one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from ldm.util import UsageError


class Parser(argparse.ArgumentParser):
    """A parser whose errors are exceptions, so that the caller decides how a run ends."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def boolean(text: str) -> bool:
    """Yes or no, in the words people use for them."""
    word = text.lower()
    if word in ("yes", "true", "t", "y", "1", "on"):
        return True
    if word in ("no", "false", "f", "n", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")


def positive(text: str) -> int:
    """A whole number from 1 on."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no positive whole number")
    return number


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 <= number <= 1.0:
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 0 to 1")
    return number
