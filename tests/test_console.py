"""Streams that no message breaks, argument types, and the log handler."""

from __future__ import annotations

import argparse
import gc
import importlib
import io
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.console import (
    ConsoleHandler,
    argument,
    importing,
    is_out_of_files,
    make_streams_lasting,
    most_loader_processes,
    raise_file_limit,
    too_many_loaders,
)

pytestmark = pytest.mark.refused_first
ROOT = Path(__file__).resolve().parents[1]
TALK = """
import logging, sys, warnings
from ldm import console
console.make_streams_lasting()
console.make_streams_lasting()
print("\\u05e7 \\U0001f600 \\udcff")
for line in range(3000):
    print("line", line)
sys.stderr.write("\\u05e7\\n")
warnings.warn("\\u05e7")
logging.getLogger("ldm").addHandler(console.ConsoleHandler())
logging.getLogger("ldm").warning("\\u05e7")
console.write_line("\\u05e7")
console.Parser(prog="\\u05e7", description="\\u05e7").print_help()
open(sys.argv[1], "w").write("finished")
"""


def talk(tmp_path: Path, redirection: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    done = tmp_path / "done"
    result = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$0" -c "$1" "$2" {redirection}', sys.executable, TALK, str(done)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        check=False,
    )
    assert done.read_text() == "finished"
    return result


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp1252:strict"},
        {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"},
    ],
)
def test_a_console_in_another_code_page_shows_escapes(tmp_path, environment):
    result = talk(tmp_path, "", **environment)
    assert result.returncode == 0 and b"Traceback" not in result.stderr
    assert result.stdout.splitlines()[0] == b"\\u05e7 \\U0001f600 \\udcff"
    assert result.stdout.count(b"\\u05e7") == 4 and result.stderr.count(b"\\u05e7") >= 3


@pytest.mark.parametrize(
    "redirection", ["| head -1", ">&-", "2>&-", "<&- >&- 2>&-", "> /dev/full", "> /dev/full 2>&1"]
)
def test_a_console_that_is_gone_ends_no_run(tmp_path, redirection):
    result = talk(tmp_path, redirection, PYTHONIOENCODING="utf-8")
    assert result.returncode == 0 and b"Traceback" not in result.stderr and b"Broken" not in result.stderr
    if "head" in redirection:
        assert result.stdout == "ק \U0001f600 \\udcff\n".encode()


@pytest.mark.parametrize(("redirection", "code"), [("> /dev/full", 1), ("| true", 0), ("", 0)])
def test_lost_results_are_known(redirection, code):
    program = (
        "from ldm import console; console.make_streams_lasting(); print(1); console.check_results_written()"
    )
    result = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$0" -c "$1" {redirection}', sys.executable, program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert result.returncode == code
    assert (b"the results cannot be written: No space left" in result.stderr) == bool(code)


def test_a_stream_of_a_notebook_or_a_test_stays_the_same_object(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", line_buffering=True)
    monkeypatch.setattr(sys, "stdout", stream)
    make_streams_lasting()
    assert sys.stdout is stream
    print("ק")
    assert stream.buffer.getvalue() == b"\\u05e7\n"


@pytest.mark.parametrize(
    ("limits", "raised"),
    [
        ((256, 1_000_000), (4096, 1_000_000)),
        ((256, 1024), (1024, 1024)),
        ((256, resource.RLIM_INFINITY), (4096, resource.RLIM_INFINITY)),
        ((8192, 8192), None),
        ((1024, 1024), None),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None),
    ],
)
def test_the_limit_of_open_files_is_raised_as_far_as_it_may(monkeypatch, limits, raised):
    calls = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: calls.append(wanted))
    assert raise_file_limit() == min(4096, (raised or limits)[0] if limits[0] > 0 else 4096)
    assert calls == ([] if raised is None else [raised])


@pytest.mark.parametrize(("limit", "most"), [(20, 0), (64, 0), (128, 2), (1_000_000, 126)])
def test_loader_processes_need_open_files(monkeypatch, limit, most):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert most_loader_processes() == most
    assert too_many_loaders(None) is None and too_many_loaders(most) is None
    why = too_many_loaders(most + 1)
    assert why is not None and f"is {most + 1}, and the limit of open files has room for {most}" in why
    # Where it is at its most, to raise it changes nothing.
    assert ("ulimit -n 4096" in why) == (limit < 4096)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(24, "Too many open files"), True),
        (RuntimeError("Too many open files. Communication with the workers is no longer possible."), True),
        (RuntimeError("received 0 items of ancdata"), True),
        (OSError(2, "No such file"), False),
        (RuntimeError("boom"), False),
    ],
)
def test_errors_about_open_files_are_known(error, expected):
    assert is_out_of_files(error) == expected


def test_warnings_are_short_and_in_one_line(capsys):
    handler = ConsoleHandler()
    handler.handle(logging.makeLogRecord({"levelno": logging.WARNING, "msg": f"a\n{'b' * 1000}"}))
    handler.handle(logging.makeLogRecord({"levelno": logging.INFO, "msg": "c" * 1000}))
    out, err = capsys.readouterr()
    assert err.startswith("warning: a bbb") and err.count("\n") == 1 and len(err) < 320
    assert len(out) == 1001


def test_imports_are_not_interrupted_by_the_garbage_collector(tmp_path, monkeypatch) -> None:
    (tmp_path / "heavy_package.py").write_text("import gc\ncollects = gc.isenabled()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    frozen: list[bool] = []
    monkeypatch.setattr("gc.freeze", lambda: frozen.append(gc.isenabled()))
    for _ in range(2):  # the second time nothing is new
        with importing():
            heavy_package = importlib.import_module("heavy_package")
    assert not heavy_package.collects
    assert frozen == [True]
    assert gc.isenabled()
    monkeypatch.delitem(sys.modules, "heavy_package")


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("ddim_steps", int, "0"),
        ("ddim_steps", int, "2.5"),
        ("ddim_eta", float, "1.1"),
        ("scale", float, "nan"),
        ("scale", float, "1e400"),
        ("image_seed", int, "-1"),
        ("height", int, "x"),
        ("n_samples", int, str(10**12)),
    ],
)
def test_flags(name: str, kind: type, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a"):
        argument(name, kind)(text)
    assert argument("scale", float)("-2.5") == -2.5
