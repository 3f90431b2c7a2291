"""The time that the page takes to be shown, and its list of runs with 200 run folders, in the system's Chromium.

    python -m benchmarks.page

The server is a process of its own, idle before each measurement. Needs the extras `ui` and `browser`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.machine import ROOT
from benchmarks.report import Report, verdict
from ldm.commands.base import guarded
from ldm.console import Parser, positive
from ldm.studio.server import HERE
from ldm.training.record import CURVES, STATUS
from ldm.util import UserError

EMPTY = "gradio's own page with one field, from its address"
SHOWN = "the page, from its address to its buttons"
FILLED = "the page, from its address to its images and the command line"
LISTED = "the tab Runs, from the click to its curves"
BARS = {SHOWN: 1.0, LISTED: 2.0}  # seconds
# What is seen is noted in the page itself, at the first frame in which it has a place: whoever asks from outside asks
# at intervals of up to half a second.
WATCH = """
window.seen = {};
const things = {
  shown: () => document.querySelector("#start")?.getBoundingClientRect().height,
  filled: () => document.querySelector("#thumbnails img") && document.querySelector("#command textarea")?.value,
};
const look = () => {
  for (const name in things) if (!(name in window.seen) && things[name]()) window.seen[name] = performance.now();
  requestAnimationFrame(look);
};
requestAnimationFrame(look);
"""
EMPTY_PAGE = """
import os, sys
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
import fastapi, gradio, uvicorn
with gradio.Blocks(analytics_enabled=False) as page:
    gradio.Textbox(elem_id="start")
app = fastapi.FastAPI()
app.get("/health")(lambda: "ok")
gradio.mount_gradio_app(app, page, path="/", ssr_mode=False, footer_links=[])
uvicorn.run(app, port=int(sys.argv[-1]), log_level="warning")
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=positive, default=5, help="times that the page is opened (default: %(default)s)"
    )
    parser.add_argument(
        "--runs", type=positive, default=200, help="number of run folders (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    return guarded(lambda: measure(parser.parse_args(argv)))


def measure(options: argparse.Namespace) -> None:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise UserError("playwright is not installed; pip install -e '.[ui,browser]'") from error
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise UserError("there is no Chromium on this machine; install it by the system's package manager")
    report = Report(
        "page",
        "The page: time until it is shown",
        ("what is shown", "seconds, median", "longest", "bar"),
        {"rounds": options.rounds, "run folders": options.runs},
        notes=[
            "Each opening is in a new browser context, without a cache; the server has been idle for 3 seconds."
        ],
    )
    times: dict[str, list[float]] = {EMPTY: [], SHOWN: [], FILLED: [], LISTED: []}
    with tempfile.TemporaryDirectory() as name, sync_playwright() as driver:
        make_runs(Path(name) / "logs", options.runs)
        studio = [str(ROOT / "scripts" / "studio.py"), "--root", name, "--port"]
        with serving(studio) as address, serving(["-c", EMPTY_PAGE]) as empty:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for _ in range(options.rounds):
                page = opened(browser, empty)
                times[EMPTY].append(seen(page, "shown"))
                page.context.close()
                page = opened(browser, address)
                times[SHOWN].append(seen(page, "shown"))
                times[FILLED].append(seen(page, "filled"))
                page.wait_for_timeout(3000)
                times[LISTED].append(clocked(lambda page=page: listed(page, options.runs)))
                page.context.close()
            browser.close()
    for what, values in times.items():
        middle = sorted(values)[len(values) // 2]
        bar = verdict(middle, BARS[what], at_most=True) if what in BARS else ""
        report.rows.append((what, f"{middle:.2f}", f"{max(values):.2f}", bar))
    report.data = dict(times)
    sys.stdout.write(report.markdown())
    report.write(options.out)


def clocked(action: Callable[[], None]) -> float:
    """The seconds that an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def opened(browser: Any, address: str) -> Any:
    """A page in a new context, watched, after the server was idle for 3 seconds."""
    time.sleep(3)
    page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
    page.add_init_script(WATCH)
    page.goto(address, wait_until="commit")
    return page


def seen(page: Any, what: str) -> float:
    """The seconds from the start of the navigation until something of WATCH was seen."""
    return page.wait_for_function(f"window.seen?.{what}", polling=50).json_value() / 1000


def listed(page: Any, runs: int) -> None:
    page.get_by_role("tab", name="Runs", exact=True).click()
    page.locator("#runs-table [role=gridcell]", has_text="finished").first.wait_for()
    page.locator("#curves svg").first.wait_for()


def make_runs(folder: Path, count: int) -> None:
    """Write run folders as runs of 400 steps leave them."""
    steps = range(0, 400, 10)
    head = "step," + ",".join(CURVES)
    curves = "\n".join([head, *(f"{step}" + f",{1 / (step + 1):.5f}" * len(CURVES) for step in steps)]) + "\n"
    preview = Image.new("RGB", (540, 300), "teal")
    for number in range(count):
        run = folder / f"bobo2026-01-01T00-00-{number:03}_bobo"
        (run / "csv" / "version_0").mkdir(parents=True)
        (run / "images" / "train").mkdir(parents=True)
        (run / "checkpoints").mkdir()
        status = {"state": "finished", "step": 400, "total": 400, "loss": 0.25, "words": {"<bobo>": 1}}
        (run / STATUS).write_text(json.dumps(status | {"started": number + 1, "updated": number + 40}))
        (run / "csv" / "version_0" / "metrics.csv").write_text(curves)
        for step in (100, 200, 300, 400):
            preview.save(run / "images" / "train" / f"prompts_gs-{step:06}_e-000000_b-000099.jpg")


@contextmanager
def serving(words: Sequence[str]) -> Iterator[str]:
    """Run a page's server, whose last word is its port; give its address once it answers."""
    with socket.socket() as free:
        free.bind((HERE, 0))
        port = free.getsockname()[1]
    command = [sys.executable, *words, str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    address = f"http://{HERE}:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise UserError("the page did not start within 2 minutes")
        time.sleep(10)  # what it imports in the background after the start
        yield address
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
