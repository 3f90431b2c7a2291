"""The tabs Generate and Words, and what all tabs share.

The layout is not formatted by ruff, which would give every argument of a component a line of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ldm.embeddings import FORMATS
from ldm.files import CHECKOUT, in_checkout
from ldm.generate.images import SAMPLER_NAMES
from ldm.generate.session import WEIGHTS
from ldm.studio import views
from ldm.studio.generation import AXES
from ldm.studio.service import Service
from ldm.studio.workspace import Word
from ldm.util import UserError

# fmt: off

SAMPLERS = [(name, key) for key, name in SAMPLER_NAMES.items()]


def or_line(action: Callable[..., Any]) -> Callable[..., Any]:
    """An action whose UserError becomes a line on the page instead of a traceback."""

    @functools.wraps(action)  # gradio reads from the signature what it passes
    def act(*values: Any) -> Any:
        try:
            return action(*values)
        except UserError as error:
            raise gr.Error(str(error), duration=12, print_exception=False, title="") from error

    return act


def shown_error(action: Callable[..., str]) -> Callable[..., str]:
    """An action that returns HTML, and whose UserError is shown in its place."""

    def act(*values: Any) -> str:
        try:
            return action(*values)
        except UserError as error:
            return views.message(str(error), "bad")

    return act


def yamls(folder: str) -> list[str]:
    """The YAMLs of a folder of configs, as commands of the checkout name them."""
    place = Path(in_checkout(folder))
    return [f"{folder}/{path.name}" for path in sorted(place.glob("*.yaml"))]


def in_root(service: Service, path: str) -> str:
    return service.workspace.shown(service.workspace.path(in_checkout(path)))


def models(service: Service) -> list[tuple[str, str]]:
    """The models with the names that they have in the list: the shipped one as in commands of the checkout."""
    return [(file.removeprefix(f"{CHECKOUT}/"), file) for file in service.workspace.model_files()]


# -- Generate --------------------------------------------------------------------------------------------------


def generate_tab(service: Service) -> tuple[Callable[..., Any], Any]:
    """The tab that generates; returns the function that refreshes the list of words, and that list."""
    work = service.workspace
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=420):
            prompt = gr.Textbox(
                label="Prompt", lines=2, max_lines=4, value="a photo of {}", elem_id="prompt",
                info="{} is the first word chosen below; (word:1.3) weighs; Ctrl+Enter generates",
            )
            words = gr.Dropdown(
                [], value=[], multiselect=True, label="Words", elem_id="words-chosen",
                info="click the learned words; they are written into the prompt",
            )
            negative = gr.Textbox(
                label="Negative prompt", info="what guidance steers away from", elem_id="negative"
            )
            with gr.Row():
                model = gr.Dropdown(
                    label="Model", choices=models(service), value=in_root(service, WEIGHTS), allow_custom_value=True,
                    info="the one that the words were learned on", scale=3,
                )
                sampler = gr.Dropdown(
                    SAMPLERS, value="dpm_solver", label="Sampler", info="DPM++ needs 20 steps"
                )
            with gr.Row():
                steps = gr.Textbox("20", label="Steps", elem_id="gen-steps", info="20 to 50", min_width=90)
                scale = gr.Textbox("5", label="Guidance", info="1: none", elem_id="scale", min_width=90)
                seed = gr.Textbox("42", label="Seed", info="same, same image", elem_id="seed", min_width=110)
                count = gr.Textbox("4", label="Images", info="1 to 64", elem_id="count", min_width=90)
            with gr.Accordion("Size", open=False), gr.Row():
                width = gr.Textbox(label="Width", info="empty: the model's", min_width=90)
                height = gr.Textbox(label="Height", info="empty: the model's", min_width=90)
                number = gr.Textbox(label="Image number", info="of a dropped image", min_width=90)
            with gr.Accordion("Strength of the word", open=False, elem_id="word-strength"), gr.Row():
                concept_strength = gr.Textbox(
                    "1", label="Strength", info="0: only its class word; 2: exaggerated", elem_id="concept-strength",
                    min_width=140,
                )
                class_word = gr.Textbox(
                    label="Class word", info="cat, or <a>=cat; empty: what it began from", elem_id="class-word",
                    min_width=140,
                )
                dials = gr.Textbox(
                    label="Dials", info="of words of a method: truncation=32", elem_id="dials", min_width=140
                )
            with gr.Accordion("Edit an image", open=False, elem_id="edit"):
                with gr.Row():
                    init_img = gr.File(
                        label="Image to begin from", file_types=["image"], height=104, elem_id="init-img"
                    )
                    mask = gr.File(
                        label="Mask: white is generated", file_types=["image"], height=104, elem_id="mask"
                    )
                strength = gr.Textbox(
                    "0.75", label="Change", info="0: the image as it is; 1: almost nothing of it", elem_id="strength"
                )
            with gr.Accordion("X/Y plot", open=False, elem_id="plot-settings"):
                with gr.Row():
                    x_axis = gr.Dropdown(
                        AXES, value="guidance", label="X", info="what changes from left to right", elem_id="x-axis"
                    )
                    x_values = gr.Textbox(
                        "1, 3, 7",
                        label="X values",
                        info="separated by commas; a run's folder; dial: truncation=8, truncation=32",
                        elem_id="x-values",
                    )
                with gr.Row():
                    y_axis = gr.Dropdown(
                        AXES, value="nothing", label="Y", info="what changes from row to row", elem_id="y-axis"
                    )
                    y_values = gr.Textbox(
                        "", label="Y values", info="for words: the triggers", elem_id="y-values"
                    )
                plot = gr.Button("Draw the plot", size="sm", elem_id="plot")
            dropped = gr.File(
                label="Drop an image to get its settings back",
                file_types=["image"],
                height=104,
                elem_id="drop-settings",
            )
        with gr.Column(scale=5, min_width=420):
            status = gr.HTML(padding=False, elem_id="gen-status")
            gallery = gr.Gallery(
                label="Images", columns=4, height=400, object_fit="contain", format="png", interactive=False,
                elem_id="gallery", buttons=["download", "fullscreen"],
            )
            text = gr.Textbox(
                label="Settings of the image",
                lines=4,
                max_lines=8,
                interactive=False,
                buttons=["copy"],
                elem_id="image-settings",
            )
    with gr.Row(elem_classes="actions"):
        stop = gr.Button("Stop", min_width=100, elem_id="gen-stop")
        go = gr.Button("Generate", variant="primary", elem_id="generate-button", min_width=160)
    texts = gr.State([])
    fields: dict[str, Any] = {
        "prompt": prompt, "words": words, "negative_prompt": negative, "model": model, "sampler": sampler,
        "steps": steps, "scale": scale, "seed": seed, "count": count, "width": width, "height": height,
        "number": number, "concept_strength": concept_strength, "class_word": class_word, "dials": dials,
        "init_img": init_img, "mask": mask, "strength": strength,
    }
    inputs = list(fields.values())

    def files_of(chosen: list[str] | None) -> list[str]:
        return list(dict.fromkeys(str(value).partition("|")[2] for value in chosen or []))

    def form(values: tuple[Any, ...]) -> dict[str, Any]:
        asked = dict(zip(fields, values, strict=True))
        chosen = [str(value).partition("|") for value in asked["words"] or []]
        asked["words"] = files_of(asked["words"])
        if chosen:
            asked["prompt"] = str(asked["prompt"]).replace("{}", chosen[0][0])
        elif "{}" in str(asked["prompt"]):
            asked["prompt"] = str(asked["prompt"]).replace("{}", "a creature")
        return asked

    def generate(*values: Any, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        try:
            asked = form(values)
            made = service.generation.generate(asked, lambda done, total: progress((done, total), desc="sampling"))
        except UserError as error:
            return gr.skip(), gr.skip(), views.message(str(error), "bad"), gr.skip()
        where = work.shown(made[0][1].parent)
        said = views.message(f"{len(made)} image{'s' * (len(made) > 1)}, saved in {where}", "good")
        return [_for_gallery(image) for image, _, _ in made], [text for _, _, text in made], said, made[0][2]

    def draw(x: str, xs: str, y: str, ys: str, *values: Any, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        try:
            asked = form(values)
            if "word" in (x, y):
                asked["prompt"] = str(values[0])
            sheet, path = service.generation.grid(asked, (x, xs), (y, ys), lambda d, t: progress((d, t), desc="images"))
        except UserError as error:
            return gr.skip(), gr.skip(), views.message(str(error), "bad"), gr.skip()
        settings = sheet.info["parameters"]
        return [sheet], [settings], views.message(f"saved as {work.shown(path)}", "good"), settings

    def choose(several: list[str], event: gr.SelectData) -> str:
        index = int(event.index)
        return several[index] if index < len(several) else ""

    def settings_back(path: str | None, chosen: list[str]) -> Any:
        if not path:
            return [gr.skip()] * len(restored)
        found = service.generation.settings_of(Path(path))
        listed, _ = work.words()
        used: dict[str, str] = {}
        # Of several files with a word of the image, one that is chosen already is kept.
        for one in sorted(listed, key=lambda one: _choice(one) not in (chosen or [])):
            if one.trigger in found.prompt + found.negative_prompt:
                used.setdefault(one.trigger, _choice(one))
        labels = found.labels
        begun = labels.get("Init image", "")
        drop = f"; drop {escape(begun.rpartition(' ')[0])[:80]} to edit it again" if begun else ""
        gr.Info(f"the settings are those of the image{drop}", title="")

        def known(value: Any) -> Any:
            return gr.skip() if value is None else value

        return (
            found.prompt, list(used.values()), found.negative_prompt,
            found.sampler if found.sampler in SAMPLER_NAMES else gr.skip(), known(found.steps), known(found.scale),
            known(found.seed), 1, found.width or "", found.height or "", found.number or "",
            labels.get("Concept strength", "1"), labels.get("Class words", ""), labels.get("Dials", ""),
            # The files themselves are not in the image.
            gr.skip() if begun else None, gr.skip() if "Mask" in labels else None,
            labels.get("Denoising strength", "0.75"),
        )

    def show_dials(chosen: list[str]) -> Any:
        try:
            held = service.dials(files_of(chosen))
        except UserError:  # the list of words says what is wrong with a file
            held = ""
        return gr.Textbox(placeholder=held or ("these words have none" if chosen else ""))

    def refresh(chosen: list[str]) -> Any:
        listed, _ = work.words()
        choices = [(f"{one.trigger}  ({one.source})", _choice(one)) for one in listed]
        known = {value for _, value in choices}
        kept = [value for value in chosen or [] if value in known]
        if not kept and choices and not chosen:
            kept = [choices[0][1]]
        return gr.Dropdown(choices, value=kept)

    def write_in(asked: str, chosen: list[str]) -> str:
        triggers = [str(value).partition("|")[0] for value in chosen or []]
        held = triggers[:1] if "{}" in asked else []
        new = [word for word in triggers if word not in asked and word not in held]
        return " and ".join([asked, *new]) if asked.strip() else ", ".join(new)

    outputs = [gallery, texts, status, text]
    restored = [field for key, field in fields.items() if key != "model"]
    words.input(write_in, [prompt, words], prompt, show_progress="hidden")
    event = gr.on(
        [go.click],
        generate,
        inputs,
        outputs,
        concurrency_limit=1,
        concurrency_id="model",
        show_progress="minimal",
        show_progress_on=status,
    )
    plot.click(
        draw, [x_axis, x_values, y_axis, y_values, *inputs], outputs, concurrency_limit=1, concurrency_id="model",
        show_progress="minimal", show_progress_on=status,
    )
    assert event is not None
    stop.click(lambda: service.generation.stop.set(), show_progress="hidden", queue=False)
    gallery.select(choose, texts, text, show_progress="hidden")
    dropped.upload(
        or_line(settings_back), [dropped, words], restored, show_progress="hidden",
    )
    words.change(show_dials, words, dials, show_progress="hidden")
    return refresh, words


def _choice(word: Word) -> str:
    """A word in a file, as the list of words gives it to the form."""
    return f"{word.trigger}|{word.source}"


def _for_gallery(image: Image.Image) -> Image.Image:
    """The image; one of a few pixels is enlarged, because the page would blur it."""
    factor = max(1, 256 // image.width)
    large = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return large


# -- Words -----------------------------------------------------------------------------------------------------


def words_tab(service: Service) -> tuple[Callable[..., Any], list[Any]]:
    """The tab of learned words; returns the function that refreshes it, with its outputs."""
    work = service.workspace
    chosen, trigger = gr.State(""), gr.State("")
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=460):
            table = gr.Dataframe(
                headers=["word", "vectors", "norm", "for", "file"], datatype="str", type="array", interactive=False,
                max_height=380, elem_id="words-table", show_label=False, buttons=[], wrap=True,
                column_widths=["14%", "14%", "11%", "22%", "39%"],
            )
            problems = gr.HTML(padding=False)
            upload = gr.File(
                label="Drop embedding files of any tool here", file_count="multiple", height=104, elem_id="drop-word",
                file_types=[".pt", ".bin", ".safetensors", ".png", ".webp"],
            )
        with gr.Column(scale=5, min_width=420):
            about = gr.HTML(views.message("choose a word in the table"), padding=False, elem_id="about-word")
            named = gr.Dropdown(
                models(service), value=in_root(service, WEIGHTS), allow_custom_value=True, label="Compared with",
                info="the model whose vocabulary the nearest words are from", elem_id="vocabulary",
            )
            with gr.Row():
                new_name = gr.Textbox(label="Rename to", info="empty: as it is", elem_id="rename")
                format = gr.Dropdown(
                    list(FORMATS),
                    value="safetensors",
                    label="Format",
                    info="of the tool it is for",
                    elem_id="format",
                )
            also = gr.Dropdown(
                [], value=[], multiselect=True, label="Merge with", info="files whose words go into the same file",
                elem_id="merge-with",
            )
            convert = gr.Button("Convert", variant="primary", elem_id="convert")
            result = gr.File(
                label="Download", interactive=False, file_count="multiple", height=104, elem_id="converted"
            )
            lines = gr.Code(
                label="How to load it", language="shell", interactive=False, lines=8, elem_id="lines"
            )

    def refresh() -> Any:
        listed, bad = work.words()
        rows = [views.word_row(one) for one in listed]
        said = "".join(views.message(line, "warn") for line in bad[:5])
        if not listed and not bad:
            said = views.message("no words yet: learn one in Train, or drop a file of any tool")
        return rows, said, gr.Dropdown(list(dict.fromkeys(one.source for one in listed)))

    def choose(named: str, event: gr.SelectData) -> Any:
        row = [str(value) for value in event.row_value]
        return row[4], row[0], *show_word(row[4], row[0], named)

    def show_word(file: str, word: str, named: str) -> Any:
        if not file:
            return gr.skip(), gr.skip()
        try:
            method = service.method(file)
            if method:
                shown = views.message("more than vectors: it is used here, not in other tools") + views.facts(method)
            else:
                reports = service.inspect(file, named)
                shown = "".join(views.nearest(one.trigger, one.norms, one.nearest) for one in reports[:8])
                shown += views.facts(service.metadata(file))
        except UserError as error:
            return views.message(str(error), "bad"), ""
        return shown, service.lines(file, word)

    def do_convert(file: str, others: list[str], kind: str, name: str) -> Any:
        made = service.convert([*filter(None, [file]), *(others or [])], kind, name or "")
        return [str(path) for path in made]

    def take(files: list[str] | None) -> Any:
        for file in files or []:
            service.take_word(Path(file))
        return (*refresh(), None)

    named.change(show_word, [chosen, trigger, named], [about, lines], show_progress="hidden")
    table.select(choose, named, [chosen, trigger, about, lines], show_progress="hidden")
    convert.click(or_line(do_convert), [chosen, also, format, new_name], result)
    upload.upload(or_line(take), upload, [table, problems, also, upload])
    return refresh, [table, problems, also]
