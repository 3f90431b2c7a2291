"""Calls of scripts/embeddings.py, and what they write to stderr."""

from __future__ import annotations

from ldm.commands.embeddings import main


def run(arguments: list[str]) -> None:
    """Run scripts/embeddings.py, which must succeed."""
    assert main(arguments) == 0


def fails(capsys, code: int, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error
