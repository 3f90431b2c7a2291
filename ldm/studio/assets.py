"""The scripts and styles of gradio, served from memory, and hints that let a browser fetch them all at once.

Gradio compresses each file anew for every visitor, and a browser learns of most of them only after it has run others;
both together take longer than everything else between the address and the page.
"""

from __future__ import annotations

import functools
import mimetypes
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_PREFIX = "/assets/"
# A list of chunks that a script may fetch, as vite writes it: m.f=["./a.js","./b.css"]
_CHUNKS = re.compile(r'm\.f=\[((?:"\./[^"]+",?)+)\]')
# The chunks of one kind of component, as places in that list: textbox:{... component:()=>...__vite__mapDeps([1,2])
_COMPONENT = re.compile(r"[{,](\w+):\{(?:\w+:\(\)=>[^{}]*?__vite__mapDeps\(\[[\d,]*\]\)[^{}]*?)+\}")
_PLACES = re.compile(r"__vite__mapDeps\(\[([\d,]*)\]\)")


class Assets:
    """Answers a request for one of the files of a folder from memory; hands every other one to the application.

    Args:
        app: the application behind.
        folder: the files; their names hold a digest of their content, so that a browser may keep them.
        first: names of the files that the page needs at once, for hints beside its first answer.
    """

    def __init__(self, app: App, folder: Path, first: Iterable[str] = ()) -> None:
        self.app = app
        self.files = {path.name: path for path in folder.iterdir() if path.is_file()}
        self.hints = ", ".join(map(_hint, filter(self.files.__contains__, first))).encode()
        self.read = functools.lru_cache(maxsize=256)(Path.read_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            return await self.app(scope, receive, send)
        if path == "/" and self.hints:
            return await self.app(scope, receive, self._with_hints(send))
        file = self.files.get(path.removeprefix(_PREFIX)) if path.startswith(_PREFIX) else None
        if file is None:
            return await self.app(scope, receive, send)
        content = self.read(file)
        kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        headers = [
            (b"content-type", ("text/javascript" if file.suffix == ".js" else kind).encode()),
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
