"""The page in a real browser: Playwright drives the system's Chromium. Run with `make test-browser`."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from ldm.training.record import runs_in

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[ui]'")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
    pytest.mark.filterwarnings("ignore"),
]

ROOT = Path(__file__).resolve().parents[2]
BOBO = sorted((ROOT / "data" / "concepts" / "bobo").glob("0*.png"))
# More than are done before the run is stopped; the continued run ends after a few.
STEPS = 2_000
FURTHER = 15
MINUTES = 60_000  # milliseconds
# The folder that screenshots of the tabs are written to, if there is one.
SHOTS = os.environ.get("STUDIO_SCREENSHOTS")


class Server:
    """The page's process on a free port."""

    def __init__(self, root: Path, *further: str) -> None:
        self.root, self.further = root, further
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    @property
    def address(self) -> str:
        return f"http://localhost:{self.port}"

    def start(self) -> None:
        words = [sys.executable, str(ROOT / "scripts" / "studio.py"), "--port", str(self.port), *self.further]
        self.log = (self.root / "server.log").open("ab")
        self.process = subprocess.Popen(
            [*words, "--root", str(self.root)], stdout=self.log, stderr=self.log, start_new_session=True
        )
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=1).close()
                return
            except urllib.error.HTTPError as error:
                if error.code == 401:
                    return
            except OSError:
                assert self.process.poll() is None, (self.root / "server.log").read_text()
            time.sleep(0.25)
        raise AssertionError("the page did not open")

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("root"))
    yield server
    server.kill()
    for run in runs_in(server.root / "logs"):
        if run.live:
            from ldm.training.run_folder import holder

            os.kill(holder(run.folder) or 0, signal.SIGKILL)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Server, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, opened; a console error, a request to elsewhere or an uncaught exception fails the test."""
    context = browser.new_context(
        viewport={"width": 1280, "height": 800}, color_scheme=getattr(request, "param", "light")
    )
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda entry: problems.append(entry.text) if entry.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request",
        lambda sent: (
            None if sent.url.startswith((server.address, "data:", "blob:")) else problems.append(sent.url)
        ),
    )
    page.set_default_timeout(30_000)
    open_page(page, server)
    yield page
    context.close()
    # What the browser says while the server is killed, and of what a reload ends; "network error" is an answer that
    # breaks off while it is read, "Failed to fetch" a request that nobody answers.
    ended = (
        "ERR_CONNECTION",
        "ERR_INCOMPLETE",
        "AbortError",
        "errored out",
        "network error",
        "Failed to fetch",
    )
    assert [problem for problem in problems if not any(text in problem for text in ended)] == []


def open_page(page: Any, server: Server) -> None:
    page.goto(server.address)
    until_open(page)


def until_open(page: Any) -> None:
    page.wait_for_selector("#start", timeout=MINUTES)
    page.wait_for_timeout(500)


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()
    page.wait_for_timeout(700)


def shot(page: Any, name: str) -> None:
    if SHOTS:
        page.wait_for_timeout(1200)
        page.screenshot(path=Path(SHOTS) / f"{name}.png")


def fill(page: Any, field: str, text: str) -> None:
    box = page.locator(f"#{field} input, #{field} textarea").first
    box.fill(text)
    box.blur()


def text_of(page: Any, field: str) -> str:
    return page.locator(f"#{field}").inner_text()


def until_shown(page: Any, field: str, part: str, seconds: int = 240) -> None:
    page.locator(f"#{field}").get_by_text(re.compile(part)).first.wait_for(timeout=seconds * 1000)


def test_train_from_dropped_files_to_a_concept_and_generate(page: Any, server: Server) -> None:
    shot(page, "train-empty")
    page.locator("#drop input[type=file]").set_input_files([str(path) for path in BOBO])
    page.wait_for_function(
        "document.querySelector('#folder textarea, #folder input').value.includes('uploads')"
    )
    until_shown(page, "findings", "5 images")
    assert "data/uploads/bobo-" in page.locator("#folder textarea, #folder input").input_value()
    fill(page, "steps", str(STEPS))
    fill(page, "init", "grey bear")
    until_shown(page, "tokens", "bear")
    assert page.locator("#vectors textarea, #vectors input").first.get_attribute("placeholder") == "1"
    page.get_by_role("button", name="More").click()
    fill(page, "settings", "lightning.callbacks.image_logger.params.batch_frequency=15")
    page.wait_for_function(
        f"document.querySelector('#command textarea').value.includes('--max_train_steps {STEPS}')"
    )
    assert page.locator("#start").is_visible()
    box = page.locator("#start").bounding_box()
    assert box["y"] + box["height"] <= 800  # without scrolling
    shot(page, "train")
    page.locator("#start").click()
    page.locator("#run-head").get_by_text(re.compile("training|starting|step")).first.wait_for(
        timeout=2 * MINUTES
    )
    until_shown(page, "run-head", f"step [1-9][0-9]* of {STEPS}")
    page.wait_for_function("document.querySelectorAll('.strip img').length > 1")
    shot(page, "runs-busy")
    page.locator(".strip img").first.click()  # steps back to the first preview
    first = page.locator(".strip img").first.get_attribute("title")
    page.locator(".previews figcaption", has_text=re.compile(f"^{first} *$")).wait_for()
    open_page(page, server)  # reload in the middle
    tab(page, "Runs")
    until_shown(page, "run-head", f"of {STEPS}")
    page.locator("#stop").click()
    until_shown(page, "run-head", "stopped")
    stopped = runs_in(server.root / "logs")[0]
    assert stopped.state == "stopped" and 0 < stopped.step < STEPS
    # The page's server dies and comes back; the open page sees it and loads itself anew. (A `goto` here would race with
    # that, and wait for ever when it loses.)
    server.kill()
    with page.expect_event("load", timeout=MINUTES):
        server.start()
    until_open(page)
    tab(page, "Runs")
    until_shown(page, "run-head", "stopped")
    last = stopped.step + FURTHER
    fill(page, "until", str(last))
    page.locator("#continue").click()
    until_shown(page, "run-head", "finished")
    finished = runs_in(server.root / "logs")[0]
    assert finished.folder == stopped.folder and finished.step == last
    shot(page, "runs-finished")
    page.locator("#keep").click()
    page.get_by_text(re.compile("is saved as embeddings/")).first.wait_for()
    assert list((server.root / "embeddings").glob("bobo*"))


def test_captions_and_all_settings_are_edited(page: Any, server: Server) -> None:
    page.locator("#drop input[type=file]").set_input_files([str(path) for path in BOBO])
    page.wait_for_function("document.querySelector('#folder textarea').value.includes('uploads')")
    page.locator("#thumbnails [data-folder*=uploads]").wait_for()
    caption = page.locator("#thumbnails textarea").nth(1)
    caption.fill("<b>[name]</b> & a friend")
    caption.blur()
    page.wait_for_function("document.querySelector('#command textarea').value.includes('use_captions=true')")
    (written,) = (server.root / "data" / "uploads").glob("*/*.txt")
    assert written.read_text() == caption.input_value() + "\n" == "<b>[name]</b> & a friend\n"
    page.locator("#personalization input").click()
    page.get_by_role("option", name="/prospect.yaml").click()
    until_shown(page, "tokens", "quarter of the denoising")
    page.get_by_role("button", name="More").click()
    page.locator("#merge").click()
    page.locator("#yaml .cm-content").get_by_text("ProSpect").first.wait_for()
    page.wait_for_function("document.querySelector('#command textarea').value.includes('.studio/settings-')")
    page.locator("#discard").click()
    page.wait_for_function("!document.querySelector('#command textarea').value.includes('.studio/settings-')")
    written.unlink()


def test_generate_plot_and_get_settings_back(page: Any, server: Server) -> None:
    tab(page, "Generate")
    page.wait_for_timeout(1000)
    shot(page, "generate-empty")
    fill(page, "prompt", "a photo of {} on a beach")
    fill(page, "gen-steps", "4")
    fill(page, "count", "2")
    page.locator("#prompt textarea").press("Control+Enter")
    until_shown(page, "gen-status", "2 images, saved")
    assert "a photo of <bobo> on a beach" in page.locator("#image-settings textarea").input_value()
    made = sorted((server.root / "outputs" / "studio").glob("*.png"))
    assert len(made) == 2
    shot(page, "generate")
    fill(page, "prompt", "something else")
    fill(page, "gen-steps", "9")
    page.locator("#drop-settings input[type=file]").set_input_files(str(made[1]))
    page.wait_for_function("document.querySelector('#prompt textarea').value.includes('beach')")
    assert page.locator("#gen-steps textarea, #gen-steps input").first.input_value() == "4"
    page.get_by_text("X/Y plot").click()
    fill(page, "x-values", "1, 3")
    page.locator("#plot").click()
    until_shown(page, "gen-status", "saved as outputs/studio/00002.png")
    shot(page, "generate-plot")
    fill(page, "prompt", "a photo of <nobody>")
    page.locator("#generate-button").click()
    until_shown(page, "gen-status", "mentions '<nobody>'")
    shot(page, "generate-failed")


def test_an_image_is_edited_and_its_settings_come_back(page: Any, server: Server) -> None:
    tab(page, "Generate")
    page.wait_for_timeout(1000)
    for name in ("Strength of the word", "Edit an image"):
        page.get_by_role("button", name=name).click()
    page.locator("#init-img input[type=file]").set_input_files(str(BOBO[0]))
    page.locator("#init-img").get_by_text(BOBO[0].stem).first.wait_for()
    for field, text in (("prompt", "a creature"), ("gen-steps", "2"), ("count", "1"), ("strength", "0.5")):
        fill(page, field, text)
    page.locator("#generate-button").click()
    page.wait_for_function(
        "document.querySelector('#image-settings textarea').value.includes('Init image: 01')"
    )
    made = max((server.root / "outputs" / "studio").glob("*.png"))
    shot(page, "generate-edit")
    fill(page, "strength", "0.9")
    fill(page, "dials", "truncation")
    page.locator("#generate-button").click()
    until_shown(page, "gen-status", "'truncation' is not a NAME=NUMBER")
    page.locator("#drop-settings input[type=file]").set_input_files(str(made))
    page.locator(".toast-wrap").get_by_text("drop 01.png to edit it again").wait_for()
    page.wait_for_function("document.querySelector('#strength textarea, #strength input').value == '0.5'")
    assert page.locator("#dials textarea, #dials input").first.input_value() == ""


def test_words_are_listed_and_converted(page: Any, server: Server) -> None:
    tab(page, "Words")
    page.locator("#words-table [role=gridcell]", has_text="<bobo>").first.click()
    until_shown(page, "about-word", "nearest words")
    fill(page, "rename", "<my-bear>")
    page.locator("#convert").click()
    page.locator("#converted").get_by_text(re.compile("my-bear")).first.wait_for()
    shot(page, "words")
    assert list((server.root / "outputs" / "studio" / "words").glob("*/my-bear.safetensors"))


def test_bad_uploads_and_a_missing_folder_are_said_in_a_line(
    page: Any, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "evil.png").write_bytes(b"\x80\x04cposix\nsystem\n.")
    page.locator("#drop input[type=file]").set_input_files([str(tmp_path / "evil.png")])
    page.get_by_text("'evil.png' is not an image").first.wait_for()
    fill(page, "folder", "nowhere")
    until_shown(page, "findings", "image folder not found")
    page.locator("#start").click()
    page.locator(".toast-wrap").get_by_text("image folder not found").wait_for()
    shot(page, "train-failed")
    assert len(runs_in(server.root / "logs")) == 1


@pytest.mark.parametrize("page", ["dark"], indirect=True)
def test_dark_mode(page: Any) -> None:
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(part) for part in re.findall(r"\d+", colour)[:3]) < 60
    for name in ("Train", "Runs", "Generate", "Words"):
        tab(page, name)
        shot(page, f"dark-{name.lower()}")


def ask(
    server: Server, method: str, path: str, headers: dict[str, str], body: Any = None
) -> tuple[int, bytes]:
    """Send a request whose path is not tidied up, as a browser would; the status and body of the answer."""
    connection = http.client.HTTPConnection("localhost", server.port, timeout=60)
    connection.putrequest(method, path, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    try:
        for part in body or ():
            connection.send(part)
    except OSError:  # the server has answered and closed
        pass
    try:
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def test_nothing_outside_is_served(server: Server, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    images = server.root / "logs" / "linked" / "images" / "train"
    images.mkdir(parents=True)
    (images.parents[1] / "checkpoints").mkdir()
    (images / "prompts_gs-000001_e-000000_b-000000.jpg").symlink_to(secret)
    up = "/".join([".."] * 12)
    places = [
        str(secret),
        f"{up}{secret}",
        quote(f"{up}{secret}", safe=""),
        quote(quote(str(secret), safe="")),
    ]
    paths = [f"/gradio_api/file={place}" for place in places]
    paths += [
        f"/file={secret}",
        f"/{up}{secret}",
        f"/static/{up}{secret}",
        f"/assets/{quote(up + str(secret), safe='')}",
    ]
    paths += [f"/view/run/{quote(up, safe='')}/1", "/view/run/../1", "/view/run/linked/1"]
    for path in paths:
        status, body = ask(server, "GET", path, {})
        assert status in (400, 403, 404, 405, 422, 307) and b"the secret" not in body, (path, status)
    shutil.rmtree(images.parents[1])


def test_large_uploads_and_other_sites_are_refused(server: Server) -> None:
    upload, gigabyte = "/gradio_api/upload", 2**30
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    status, body = ask(server, "POST", upload, form | {"Content-Length": str(gigabyte)})
    assert status == 413 and b"MB at once" in body
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    block = b"%x\r\n" % 2**20 + b"0" * 2**20 + b"\r\n"
    chunks = chain([b"%x\r\n" % len(head) + head + b"\r\n"], repeat(block, 1024))
    status, _ = ask(server, "POST", upload, form | {"Transfer-Encoding": "chunked"}, chunks)
    assert status in (0, 413)  # 0: the connection was closed in the middle
    kept = sum(path.stat().st_size for path in server.root.rglob("*") if path.is_file())
    assert kept < gigabyte / 2
    for path in (upload, "/gradio_api/queue/join"):
        status, body = ask(server, "POST", path, {"Origin": "http://evil.example", "Content-Length": "0"})
        assert status == 403 and b"another site" in body


def test_listening_needs_a_password(tmp_path: Path, browser: Any) -> None:
    words = [sys.executable, str(ROOT / "scripts" / "studio.py"), "--listen", "--root", str(tmp_path)]
    refused = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and "--auth" in refused.stderr and refused.stderr.count("\n") == 1
    server = Server(tmp_path, "--listen", "127.0.0.1", "--auth", "ann:secret")
    try:
        for credentials, status in ((None, 401), ({"username": "ann", "password": "no"}, 401),
                                    ({"username": "ann", "password": "secret"}, 200)):  # fmt: skip
            context = (
                browser.new_context(http_credentials=credentials) if credentials else browser.new_context()
            )
            page = context.new_page()
            try:
                assert page.goto(server.address).status == status
            except playwright.Error as error:  # Chromium asks again and gives up
                assert status == 401 and "INVALID_AUTH" in str(error)
            context.close()
    finally:
        server.kill()
