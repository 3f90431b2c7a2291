"""Command lines and terminals: argument types, one-line errors, log output and exit codes."""

from __future__ import annotations

import argparse
import errno
import gc
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from ldm import values
from ldm.util import UsageError, UserError, brief


class Interrupted(BaseException):
    """A signal asked the run to stop. Not an Exception, so that `except Exception` does not catch it.

    `exit_code` is 128 plus the signal number, as in shells: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.exit_code = 128 + signum


class _LastingStream(io.RawIOBase):
    """Writes to a raw stream until that fails, as a closed pipe or a full disk does; drops what comes afterwards."""

    def __init__(self, raw: Any) -> None:
        super().__init__()
        self._raw = raw
        self.failure: OSError | None = None
        self.name = getattr(raw, "name", "")

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return bool(self._raw.isatty())

    def fileno(self) -> int:
        return int(self._raw.fileno())

    def write(self, data: Any) -> int:
        if self.failure is None:
            try:
                return self._raw.write(data) or 0  # None, if it would block: the caller tries again
            except OSError as error:
                self.failure = error
        return len(data)


def make_streams_lasting() -> None:
    """Let no message end a run: characters that a console lacks are escaped, and one that is closed is not written to.

    Streams that are not the process's own, such as those of a test or a notebook, are only made to escape.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the start, as by `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            if stream is getattr(sys, f"__{name}__"):
                raw = _LastingStream(getattr(stream.buffer, "raw", stream.buffer))
                lasting = io.TextIOWrapper(
                    io.BufferedWriter(raw),
                    stream.encoding,
                    "backslashreplace",
                    line_buffering=stream.line_buffering,
                    write_through=stream.write_through,
                )
                setattr(sys, name, lasting)


FILES = 4096  # open at once, more than any run needs


# What a run has open without loader processes, and what each of them adds: pipes, and the batches on their way.
_OWN_FILES, _FILES_OF_LOADER = 64, 32


def raise_file_limit() -> int:
    """Raise this process's own limit of open files to `FILES`, as far as it may; shells start with 256 on some systems.

    Loader processes hand their batches over as open files. Returns the limit, at most `FILES`.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # macOS allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return FILES if soft == resource.RLIM_INFINITY else min(soft, FILES)


def most_loader_processes() -> int:
    """How many loader processes the limit of open files has room for; with more, a run ends or waits for ever."""
    return max(0, (raise_file_limit() - _OWN_FILES) // _FILES_OF_LOADER)


def too_many_loaders(asked: int | None) -> str | None:
    """Why a run cannot have as many loader processes as are asked for, and what to do; None if it can."""
    most = most_loader_processes()
    if asked is None or asked <= most:
        return None
    remedy = "" if raise_file_limit() >= FILES else f"raise it with 'ulimit -n {FILES}', or "
    return (
        f"is {asked}, and the limit of open files has room for {most} loader processes; {remedy}choose fewer"
    )


@contextmanager
def importing() -> Iterator[None]:
    """Import heavy packages in this block without the garbage collector, which takes a fifth of that time.

    Modules are no garbage, and with every few thousand new objects the collector goes through all of them again. What
    is there at the end of the block is never looked through again, so later collections are short too.
    """
    modules, enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        if len(sys.modules) > modules:  # else a second command of one process, which has garbage of its own
            gc.freeze()


def is_out_of_files(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that too many files are open."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return True
    return "Too many open files" in str(error) or "items of ancdata" in str(error)


class Parser(argparse.ArgumentParser):
    """A parser that raises UsageError instead of exiting the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def boolean(text: str) -> bool:
    """Argument type: a bool from yes/no, true/false, on/off or 1/0."""
    word = text.lower()
    if word in ("yes", "true", "t", "y", "1", "on"):
        return True
    if word in ("no", "false", "f", "n", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")


def argument(name: str, kind: type) -> Callable[[str], Any]:
    """Argument type: the values of a flag with the range of `name` in `ldm.values`; `kind` is int or float."""

    def read(text: str) -> Any:
        try:
            value: Any = kind(text)
        except ValueError:
            value = text
        for _, _, requirement in values.misfits(name, value, kind):
            raise argparse.ArgumentTypeError(f"'{text}' is not {requirement}")
        return value

    return read


def positive(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive whole number")
    return number


_HANDLER_NAME = "_ldm_console"


class ConsoleHandler(logging.Handler):
    """Writes messages to stdout, warnings and errors to stderr, without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        stream = sys.stderr if warning else sys.stdout
        from tqdm import tqdm

        with tqdm.external_write_mode(file=stream):
            text = self.format(record)
            if warning:
                text = f"warning: {text if record.exc_info else brief(text)}"
            stream.write(f"{text}\n")
            stream.flush()


def set_up_logging(debug: bool = False) -> None:
    """Show the messages of `ldm` and the warnings of Lightning; with `debug`, everything.

    In a run of several processes, all but the first show warnings only. Nothing heavy is imported; a run calls
    `quieten_lightning` too.
    """
    secondary = int(os.environ.get("LOCAL_RANK", 0)) > 0
    library = logging.getLogger("ldm")
    library.setLevel(logging.DEBUG if debug else logging.WARNING if secondary else logging.INFO)
    if not any(getattr(handler, _HANDLER_NAME, False) for handler in library.handlers):
        handler = ConsoleHandler()
        setattr(handler, _HANDLER_NAME, True)
        library.addHandler(handler)
    if debug:
        return
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")


def quieten_lightning() -> None:
    """Hide Lightning's advice and warnings that mean nothing here."""
    from lightning_fabric.utilities.warnings import PossibleUserWarning  # takes seconds to import

    # Advice on worker counts, log intervals and frozen modules; all three are intended.
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    # A run may have no validation images.
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")


def write_line(text: str) -> None:
    """Write a line of a command's results to stdout, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(text)


def check_results_written() -> None:
    """Raise UserError if lines of results were lost, as on a full disk; a reader may close its pipe early."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    failure = raw.failure if isinstance(raw, _LastingStream) else None
    if failure is not None and failure.errno != errno.EPIPE:
        raise UserError(
            f"the results cannot be written: {os.strerror(failure.errno or 0)}; send them elsewhere"
        )
