"""Files from memory, and hints of those that a page needs at once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from ldm.studio.assets import Assets, needed

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


def answer(app: Assets, path: str, method: str = "GET") -> tuple[int, bytes, dict[bytes, bytes]]:
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

    app = Assets(behind, folder, ["index.js", "index.css", "gone.js"])
    status, body, headers = answer(app, "/assets/text.css")
    assert (status, body, headers[b"content-type"]) == (200, b"1", b"text/css")
    assert answer(app, "/assets/index.js", "HEAD")[1] == b""
    assert answer(app, "/assets/index.js")[2][b"content-type"] == b"text/javascript"
    for path in ("/assets/../secret.txt", "/assets/", "/assets/none.js", "/assets//index.js", "/other"):
        assert answer(app, path)[:2] == (404, b"behind"), path
    assert answer(app, "/assets/index.js", "POST")[0] == 404
    link = answer(app, "/")[2][b"link"].decode()
    assert "</assets/index.js>; rel=modulepreload" in link and "as=style" in link and "gone" not in link


def test_the_lists_of_gradio_are_read():
    gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[ui]'")
    folder = Path(gradio.__file__).parent / "templates" / "frontend" / "assets"
    few, more = needed(folder, {"textbox"}), needed(folder, {"textbox", "gallery"})
    assert len(few) > 20 and set(few) < set(more)
    assert all((folder / name).is_file() for name in more)
