"""The guard in front of the page, and its command line; no gradio is needed."""

from __future__ import annotations

import asyncio
import base64
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from ldm.front_ends import setting
from ldm.generate.request import check_mentions
from ldm.studio import server
from ldm.studio.server import Assets, Guard, is_local, make_parser, needed, read_users, serve
from ldm.util import UsageError, UserError

MOST = 1000


class Page:
    """The application behind the guard: it reads the whole request and says so."""

    def __init__(self) -> None:
        self.bodies: list[int] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        size = 0
        while True:
            event = await receive()
            size += len(event.get("body") or b"")
            if event["type"] == "http.disconnect" or not event.get("more_body"):
                break
        self.bodies.append(size)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"page"})


def answer(
    headers: dict[str, str],
    *,
    method: str = "POST",
    users: dict[str, str] | None = None,
    local: bool = True,
    chunks: int = 1,
    kind: str = "http",
) -> tuple[int, str, dict[bytes, bytes]]:
    """The status, text and headers of the answer to a request in chunks of 100 bytes."""
    left = [chunks]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        left[0] -= 1
        return {"type": "http.request", "body": b"x" * 100, "more_body": left[0] > 0}

    async def send(event: dict[str, Any]) -> None:
        sent.append(event)

    pairs = [(key.encode(), value.encode()) for key, value in headers.items()]
    scope = {"type": kind, "method": method, "path": "/", "headers": pairs}
    asyncio.run(Guard(Page(), users or {}, local=local, most=MOST)(scope, receive, send))
    if kind == "websocket":
        return int(sent[0]["code"]), "", {}
    return sent[0]["status"], sent[-1]["body"].decode(), dict(sent[0]["headers"])


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:7860"}, 200),
        ({"host": "127.0.0.1:7860"}, 200),
        ({"host": "[::1]:7860"}, 200),
        ({"host": "localhost:7860", "origin": "http://localhost:7860"}, 200),
        ({"host": "localhost:7860", "origin": "http://evil.example"}, 403),
        ({"host": "localhost:7860", "origin": "http://localhost:7861"}, 403),
        ({"host": "localhost:7860", "origin": "null"}, 403),
        ({"host": "localhost:7860", "sec-fetch-site": "cross-site"}, 403),
        ({"host": "evil.example:7860"}, 403),  # a name that was pointed at this machine
        ({"host": "localhost.evil.example"}, 403),
        ({}, 403),
        ({"host": "localhost", "content-length": str(MOST + 1)}, 413),
        ({"host": "localhost", "content-length": "many"}, 413),
    ],
)
def test_what_is_let_through(headers, status):
    assert answer(headers)[0] == status
    if status == 403:
        assert answer(headers, kind="websocket")[0] == 4403


def test_a_link_from_another_site_opens_the_page():
    link = {"host": "localhost", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert answer(link, method="GET")[0] == 200
    assert answer(link | {"sec-fetch-mode": "no-cors"}, method="GET")[0] == 403


def test_an_upload_without_a_length_ends_at_the_limit():
    status, _, _ = answer({"host": "localhost", "transfer-encoding": "chunked"}, chunks=10**6)
    assert status == 413
    assert answer({"host": "localhost"}, chunks=MOST // 100)[0] == 200


def test_a_password(monkeypatch):
    monkeypatch.setattr(server, "_FAILED_LOGIN_SECONDS", 0)
    users = {"ann": "secret", "bob": "påss:word"}
    for given, status in (
        (None, 401),
        (basic("ann:secret"), 200),
        (basic("bob:påss:word"), 200),
        (basic("ann:wrong"), 401),
        (basic("eve:-"), 401),
        (basic("ann:"), 401),
        ("Basic !!!", 401),
        ("Bearer " + basic("ann:secret").split()[1], 401),
    ):
        headers = {"host": "house:7860"} | ({"authorization": given} if given else {})
        got, _, told = answer(headers, users=users, local=False)
        assert got == status, given
        assert (b"www-authenticate" in told) is (status == 401)


def test_answers_forbid_frames_and_other_sites():
    _, _, told = answer({"host": "localhost"}, method="GET")
    assert {key for key, _ in server._HEADERS.items()} <= told.keys()


def test_users_of_a_file(tmp_path):
    (tmp_path / "users").write_text("ann:one\n\nbob:two:three\n")
    assert read_users(str(tmp_path / "users")) == {"ann": "one", "bob": "two:three"}
    for text in ("ann", "ann:", ":one", ""):
        with pytest.raises(UsageError, match="NAME:PASSWORD"):
            read_users(text)
    (tmp_path / "none").write_text("\n")
    with pytest.raises(UsageError, match="is empty"):
        read_users(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("address", "local"),
    [("localhost", True), ("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("x.example", False)],
)  # fmt: skip
def test_addresses_of_this_machine(address, local):
    assert is_local(address) is local


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--listen"], "needs --auth"),
        (["--port", "70000"], "between 1 and 65535"),
        (["--root", "nowhere"], "--root 'nowhere' is not a folder; name one"),
    ],
)
def test_wrong_options_are_said_before_anything_starts(words, message):
    with pytest.raises(UserError, match=message):
        serve(make_parser("studio.py").parse_args(words))


def test_small_answers_are_sent_without_delay():
    listener = server.listening_socket("127.0.0.1", 0)
    listener.listen()
    with listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        # What asyncio looks at before it switches the delay off.
        assert connection.proto == socket.IPPROTO_TCP
        connection.close()


CORE = (
    'const __vite__mapDeps=(i,m=__vite__mapDeps,d=(m.f||(m.f=["./text.js","./text.css","./plot.js","./all.js"])))=>'
    "i.map(i=>d[i]);var k={textbox:{example:()=>v(()=>import(`./text.js`).then(e=>e.n),__vite__mapDeps([0]),u),"
    "component:()=>v(()=>import(`./text.js`),__vite__mapDeps([0,1,3]),u)},plot:{component:()=>v(()=>"
    "import(`./plot.js`),__vite__mapDeps([2,3]),u)}};"
)


@pytest.fixture
def folder(tmp_path) -> Path:
    assets = tmp_path / "assets"
    assets.mkdir()
    (tmp_path / "index.html").write_text(
        '<script type="module" src="./assets/index.js"></script><link href="./assets/index.css">'
    )
    first = 'd=(m.f||(m.f=["./page.js","./core.js"])))=>i;v(()=>import(`./page.js`),__vite__mapDeps([0,1]),u)'
    later = 'd=(m.f||(m.f=["./diagram.js"])))=>i;v(()=>import(`./diagram.js`),__vite__mapDeps([0]),u)'
    contents = {"index.js": first, "core.js": CORE, "text.js": later, "index.css": "a{}"}
    for name in ("page.js", "text.css", "plot.js", "all.js", "diagram.js"):
        contents[name] = "1"
    for name, content in contents.items():
        (assets / name).write_text(content)
    return assets


def test_the_files_of_the_components_of_a_page(folder):
    first = ["index.js", "index.css", "page.js", "core.js"]
    assert needed(folder, {"textbox", "row"}) == [*first, "text.js", "text.css", "all.js"]
    assert needed(folder, set()) == first


def answer_of(app: Assets, path: str, method: str = "GET") -> tuple[int, bytes, dict[bytes, bytes]]:
    sent: list[dict[str, Any]] = []

    async def send(event: Any) -> None:
        sent.append(event)

    async def receive() -> Any:
        raise AssertionError

    asyncio.run(app({"type": "http", "method": method, "path": path, "headers": []}, receive, send))
    return sent[0]["status"], sent[1]["body"], dict(sent[0]["headers"])


def test_files_are_answered_from_memory(folder):
    (folder.parent / "secret.txt").write_text("secret")

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b"behind"})

    app = Assets(behind, folder, ["index.js", "index.css", "gone.js"], ("b{}", "0a1"))
    status, body, headers = answer_of(app, "/assets/text.css")
    assert (status, body, headers[b"content-type"]) == (200, b"1", b"text/css")
    assert answer_of(app, "/assets/index.js", "HEAD")[1] == b""
    assert answer_of(app, "/assets/index.js")[2][b"content-type"] == b"text/javascript"
    for path in ("/assets/../secret.txt", "/assets/", "/assets/none.js", "/assets//index.js", "/other"):
        assert answer_of(app, path)[:2] == (404, b"behind"), path
    assert answer_of(app, "/theme.css")[:2] == (200, b"b{}")
    assert answer_of(Assets(behind, folder), "/theme.css")[0] == 404
    assert answer_of(app, "/assets/index.js", "POST")[0] == 404
    link = answer_of(app, "/")[2][b"link"].decode()
    assert "</assets/index.js>; rel=modulepreload" in link and "as=style" in link and "gone" not in link
    assert link.endswith("</theme.css?v=0a1>; rel=preload; as=style")


def test_the_lists_of_gradio_are_read():
    gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[ui]'")
    folder = Path(gradio.__file__).parent / "templates" / "frontend" / "assets"
    few, more = needed(folder, {"textbox"}), needed(folder, {"textbox", "gallery"})
    assert len(few) > 20 and set(few) < set(more)
    assert all((folder / name).is_file() for name in more)


def test_while_the_page_is_open_messages_name_its_fields(tmp_path, monkeypatch) -> None:
    said: list[str] = []

    class Uvicorn:
        Config = staticmethod(lambda app, **options: None)

        def run(self, sockets: list[Any]) -> None:
            with pytest.raises(UserError) as caught:
                check_mentions(["a <cat>"], [])
            said.append(str(caught.value))

        @classmethod
        def Server(cls, config: None) -> Uvicorn:  # noqa: N802
            return cls()

    monkeypatch.setitem(sys.modules, "uvicorn", Uvicorn)
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(server, "make_app", lambda *arguments, **options: None)
    monkeypatch.setattr(server, "_warm_up", lambda: None)
    monkeypatch.setattr(server, "set_up_logging", lambda: None)
    monkeypatch.setattr(server, "prepare_environment", lambda workspace: None)
    monkeypatch.chdir(tmp_path)
    free = server.listening_socket("127.0.0.1", 0)
    port = free.getsockname()[1]
    free.close()
    serve(make_parser("studio.py").parse_args(["--root", str(tmp_path), "--port", str(port)]))
    assert "load its file with the field 'Words', or" in said[0]
    assert str(UserError(setting("words"))) == "words="
