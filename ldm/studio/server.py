"""The page's server: what is let in, what is served, and the command that starts it."""

from __future__ import annotations

import argparse
import asyncio
import base64
import functools
import hmac
import importlib.util
import ipaddress
import logging
import mimetypes
import os
import re
import threading
import webbrowser
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ldm.console import Parser, positive, set_up_logging, write_line
from ldm.front_ends import speaking_as
from ldm.util import UsageError, UserError

if TYPE_CHECKING:
    from ldm.studio.workspace import Workspace

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HERE, PORT = "127.0.0.1", 7860
# The most bytes of one request: a few photos.
MOST_UPLOADED = 256 * 2**20
_FAILED_LOGIN_SECONDS = 0.5
_PREFIX, _THEME = "/assets/", "/theme.css"
# A list of chunks that a script may fetch, as vite writes it: m.f=["./a.js","./b.css"]
_CHUNKS = re.compile(r'm\.f=\[((?:"\./[^"]+",?)+)\]')
# The chunks of one kind of component, as places in that list: textbox:{... component:()=>...__vite__mapDeps([1,2])
_COMPONENT = re.compile(r"[{,](\w+):\{(?:\w+:\(\)=>[^{}]*?__vite__mapDeps\(\[[\d,]*\]\)[^{}]*?)+\}")
_PLACES = re.compile(r"__vite__mapDeps\(\[([\d,]*)\]\)")
# Nothing is loaded from elsewhere, and no other page may frame this one.
_HEADERS = {
    b"content-security-policy": b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"same-origin",
}


def main(argv: Sequence[str] | None = None, prog: str = "studio.py") -> int:
    """Run the command line of scripts/studio.py; returns the exit code.

    Raises:
        UserError: the page cannot be opened.
    """
    options = make_parser(prog).parse_args(argv)
    serve(options)
    return 0


def make_parser(prog: str) -> Parser:
    """The parser of the command that opens the page."""
    parser = Parser(
        prog=prog,
        description="Open a page on this machine to learn words from images and to generate with them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--root",
        default=".",
        metavar="FOLDER",
        help="folder with logs/, data/, models/ (default: this folder)",
    )
    parser.add_argument("--port", type=positive, default=PORT, help="default: %(default)s")
    parser.add_argument(
        "--listen",
        nargs="?",
        const="0.0.0.0",
        metavar="ADDRESS",
        help="let other machines in (default address: all of this machine); needs --auth, and paths stay in --root",
    )
    parser.add_argument(
        "--auth", metavar="NAME:PASSWORD", help="who is let in, or a file with one NAME:PASSWORD per line"
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    return parser


def serve(options: argparse.Namespace) -> None:
    """Check the options, and serve the page until Ctrl-C; runs go on afterwards."""
    users = read_users(options.auth) if options.auth else {}
    address = options.listen or HERE
    if not is_local(address) and not users:
        raise UsageError(
            "--listen lets other machines in, so it needs --auth NAME:PASSWORD, or a file of them"
        )
    if not 0 < options.port < 65536:
        raise UsageError(f"--port {options.port} is not between 1 and 65535")
    if not Path(options.root).is_dir():
        raise UserError(f"--root '{options.root}' is not a folder; name one")
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs gradio; install it with: pip install -e '.[ui]'")

    from ldm.studio.queue import STATE_FOLDER
    from ldm.studio.workspace import Workspace

    workspace = Workspace(options.root, confined=options.listen is not None)
    os.chdir(workspace.root)  # YAMLs name paths relative to it, as on the command line
    prepare_environment(workspace)
    set_up_logging()
    logging.getLogger("httpx").setLevel(logging.WARNING)

    import uvicorn

    from ldm.studio.service import Service
    from ldm.training.run_folder import locked

    with ExitStack() as stack:
        stack.enter_context(speaking_as("page"))
        try:
            stack.enter_context(locked(workspace.logs / STATE_FOLDER))
        except UserError as error:
            raise UserError(f"the page is open already for '{workspace.root}': {error}"[:280]) from error
        service = Service(workspace)
        listener = listening_socket(address, options.port)
        stack.callback(listener.close)
        app = make_app(service, users, local=is_local(address))
        service.queue.start()
        stack.callback(service.queue.close)
        threading.Thread(target=_warm_up, daemon=True).start()
        where = f"http://{'localhost' if is_local(address) else address}:{options.port}"
        write_line(f"the page is at {where} (Ctrl-C ends it; runs go on)")
        if options.open:
            threading.Timer(0.5, webbrowser.open, [where]).start()
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
        uvicorn.Server(config).run(sockets=[listener])


def prepare_environment(workspace: Workspace) -> None:
    """Set what gradio reads when it is imported: no statistics, no records of calls, and where uploads are kept."""
    from ldm.studio.queue import STATE_FOLDER

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(workspace.logs / STATE_FOLDER / "uploads")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def listening_socket(address: str, port: int) -> Any:
    """A socket bound to the address; UserError if the port is taken."""
    import socket

    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # Named, because asyncio sends without delay only over connections of this protocol: with it unnamed, each small
    # answer waits 40 ms for the other side's acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen at {address}:{port} ({error.strerror}); choose another --port"
        ) from error
    return listener


def _warm_up() -> None:
    """Import in the background what the first check or generation needs."""
    import ldm.generate.session
    import ldm.training.run  # noqa: F401


def is_local(address: str) -> bool:
    """Whether an address reaches this machine only."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def read_users(text: str) -> dict[str, str]:
    """The passwords by name, from NAME:PASSWORD or a file with one of them per line.

    Raises:
        UserError: there is no name or no password.
    """
    lines = [text]
    if Path(text).is_file():
        try:
            lines = Path(text).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--auth: the file '{text}' cannot be read") from error
    users = {}
    for line in filter(str.strip, lines):
        name, colon, password = line.strip().partition(":")
        if not (name and colon and password):
            raise UsageError("--auth needs NAME:PASSWORD, or a file with one NAME:PASSWORD per line")
        users[name] = password
    if not users:
        raise UsageError(f"--auth: the file '{text}' is empty; write NAME:PASSWORD into it")
    return users


class Guard:
    """Lets a request through to the page, or answers it.

    Refused are: a request without the name and password, if there are users; one from another site's page (by its
    Origin, or by what the browser says of it); one to a host name that is not this machine's, which another site's
    name could be pointed at; and one with more than `most` bytes.
    """

    def __init__(self, app: App, users: dict[str, str], *, local: bool, most: int = MOST_UPLOADED) -> None:
        self.app, self.users, self.local, self.most = app, users, local, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = {key.lower(): value.decode("latin-1") for key, value in scope["headers"]}
        refusal = self.refusal(scope, headers)
        if refusal is not None:
            if refusal[0] == 401 and b"authorization" in headers:
                await asyncio.sleep(_FAILED_LOGIN_SECONDS)
            return await _answer(scope, send, *refusal)
        received = 0
        too_long = False

        async def limited() -> MutableMapping[str, Any]:
            nonlocal received, too_long
            event = await receive()
            received += len(event.get("body") or b"")
            if received > self.most:
                too_long = True
                return {"type": "http.disconnect"}
            return event

        async def with_headers(event: MutableMapping[str, Any]) -> None:
            if event["type"] == "http.response.start":
                if too_long:
                    event["status"] = 413
                names = {key.lower() for key, _ in event["headers"]}
                event["headers"] = [
                    *event["headers"],
                    *((key, value) for key, value in _HEADERS.items() if key not in names),
                ]
            await send(event)

        await self.app(scope, limited, with_headers)

    def refusal(self, scope: Scope, headers: dict[bytes, str]) -> tuple[int, str] | None:
        """The status and text of the answer to a request that is not let through."""
        host = headers.get(b"host", "")
        if self.local and not is_local(_host_name(host)):
            return 403, "this page answers to localhost only"
        if self.users and not self._knows(headers.get(b"authorization", "")):
            return 401, "name and password, please"
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, "another site's page may not use this one"
        if headers.get(b"sec-fetch-site") == "cross-site" and (
            scope.get("method") != "GET" or headers.get(b"sec-fetch-mode") != "navigate"
        ):
            return 403, "another site's page may not use this one"
        length = headers.get(b"content-length", "0")
        if not length.isdigit() or int(length) > self.most:
            return 413, f"more than {self.most // 2**20} MB at once"
        return None

    def _knows(self, authorization: str) -> bool:
        scheme, _, encoded = authorization.partition(" ")
        try:
            name, _, password = base64.b64decode(encoded).decode("utf-8").partition(":")
        except (ValueError, UnicodeDecodeError):
            return False
        expected = self.users.get(name, "")
        # Compared also for an unknown name, so that the time does not tell which names there are.
        same = hmac.compare_digest(password.encode(), (expected or "-").encode())
        return scheme.lower() == "basic" and same and bool(expected)


def _host_name(host: str) -> str:
    return host.partition("]")[0].lstrip("[") if host.startswith("[") else host.rpartition(":")[0] or host


async def _answer(scope: Scope, send: Send, status: int, text: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 4403})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="studio", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


class Assets:
    """Answers a request for a script or style of gradio from memory; hands every other one to the application.

    Gradio compresses each file anew for every visitor, and a browser learns of most of them only after it has run
    others; both together take longer than everything else between the address and the page.

    Args:
        app: the application behind.
        folder: the files; their names hold a digest of their content, so that a browser may keep them.
        first: names of the files that the page needs at once, for hints beside its first answer.
        theme: the theme's style, and the digest by which the page asks for it.
    """

    def __init__(
        self, app: App, folder: Path, first: Iterable[str] = (), theme: tuple[str, str] = ("", "")
    ) -> None:
        self.app = app
        self.theme = theme[0].encode()
        self.files = {path.name: path for path in folder.iterdir() if path.is_file()}
        hints = [_hint(name) for name in first if name in self.files]
        hints += [f"<{_THEME}?v={theme[1]}>; rel=preload; as=style"] if self.theme else []
        self.hints = ", ".join(hints).encode()
        self.read = functools.lru_cache(maxsize=256)(Path.read_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            return await self.app(scope, receive, send)
        if path == "/" and self.hints:
            return await self.app(scope, receive, self._with_hints(send))
        file = self.files.get(path.removeprefix(_PREFIX)) if path.startswith(_PREFIX) else None
        if file is None and (path != _THEME or not self.theme):
            return await self.app(scope, receive, send)
        content = self.read(file) if file else self.theme
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        headers = [
            (b"content-type", ("text/javascript" if path.endswith(".js") else kind).encode()),
            (b"content-length", str(len(content)).encode()),
            (b"cache-control", b"private, max-age=31536000, immutable"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else content})

    def _with_hints(self, send: Send) -> Send:
        async def hinting(event: MutableMapping[str, Any]) -> None:
            if event["type"] == "http.response.start":
                event["headers"] = [*event["headers"], (b"link", self.hints)]
            await send(event)

        return hinting


def _hint(name: str) -> str:
    kind = "rel=modulepreload" if name.endswith(".js") else "rel=preload; as=style; crossorigin"
    return f"<{_PREFIX}{name}>; {kind}"


def needed(folder: Path, kinds: Iterable[str]) -> list[str]:
    """The files that a page with components of these kinds fetches, in the order in which it learns of them.

    They are read from gradio's own lists; an empty list, if gradio writes them otherwise one day, costs time only.
    """
    wanted = set(kinds)
    index = (folder.parent / "index.html").read_text(encoding="utf-8")
    found = level = re.findall(r'(?:src|href)="\./assets/([^"]+)"', index)
    # The first script fetches the page's own, and that one the components; what those fetch later on, as for a
    # diagram in a text, is not needed yet.
    for _ in range(2):
        found = [
            *found,
            *(level := [further for name in level for further in _fetched(folder / name, wanted)]),
        ]
    return list(dict.fromkeys(found))


def _fetched(script: Path, kinds: set[str]) -> list[str]:
    """The files that a script fetches, of the components only those of some kinds."""
    text = script.read_text(encoding="utf-8") if script.suffix == ".js" else ""
    listed = _CHUNKS.search(text)
    if listed is None:
        return []
    chunks = re.findall(r'"\./([^"]+)"', listed[1])
    components = {match[1]: match[0] for match in _COMPONENT.finditer(text)}
    if components:
        text = "".join(components[kind] for kind in components if kind in kinds)
    places = [int(place) for match in _PLACES.finditer(text) for place in match[1].split(",") if place]
    return [chunks[place] for place in places if place < len(chunks)]


def make_app(service: Any, users: dict[str, str], *, local: bool, most: int = MOST_UPLOADED) -> Guard:
    """The whole application: the page, the images of runs, and the guard in front of both."""
    import fastapi
    import gradio
    from fastapi.responses import FileResponse, PlainTextResponse, Response

    from ldm.studio.page import STYLE, first_kinds, make_page, page_script, theme

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/view/run/{name}/{step}")
    def preview(name: str, step: int) -> Response:
        try:
            run = service.workspace.run(name)
            folder = service.workspace.inside(service.workspace.logs, name)
        except UserError as error:
            return PlainTextResponse(str(error), 404)
        path = dict(run.previews()).get(step)
        # A link in a run folder must not lead out of it.
        if path is None or not path.resolve().is_relative_to(folder):
            return PlainTextResponse("there is no such preview", 404)
        return FileResponse(path, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"})

    @app.get("/health")
    def health() -> Response:
        return PlainTextResponse("ok")

    page = make_page(service)
    gradio.mount_gradio_app(
        app,
        page,
        path="/",
        show_error=True,
        max_file_size=most,
        allowed_paths=[],
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        theme=theme(),
        css=STYLE.read_text(encoding="utf-8"),
        head=page_script(),
    )
    # Gradio looks for calls a thousand times a second, which takes 6% of a core from the training beside it.
    if (queue := getattr(page, "_queue", None)) is not None:
        queue.sleep_when_free = 0.02
    folder = Path(gradio.__file__).parent / "templates" / "frontend" / "assets"
    style = page.theme_css, page.theme_hash
    return Guard(Assets(app, folder, needed(folder, first_kinds(page)), style), users, local=local, most=most)
