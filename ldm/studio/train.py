"""The tab that plans, checks and starts a run.

The layout is not formatted by ruff, which would give every argument of a component a line of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ldm.generate.session import WEIGHTS
from ldm.studio import views
from ldm.studio.service import Service
from ldm.studio.tabs import in_root, models, or_line, shown_error, yamls
from ldm.util import UserError
from ldm.yaml_files import in_checkout

# fmt: off

SAMPLE = "data/concepts/bobo"
# A caption that was edited is saved when its field is left.
SAVE_CAPTION = """
element.addEventListener("change", (event) => {
  const field = event.target.closest("textarea");
  if (field) trigger("submit", {image: field.name, text: field.value});
});
"""


@dataclass(frozen=True)
class TrainTab:
    """What the rest of the page needs of the tab: the event of a start, and what shows the run that goes on."""

    started: Any
    strip: list[Any]
    stop: gr.Button
    resume: gr.Button


def train_tab(service: Service, page: gr.Blocks) -> TrainTab:
    """The components and events of the tab."""
    work = service.workspace
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            upload = gr.File(
                label="Drop images, and .txt captions, here", file_count="multiple", file_types=["image", ".txt"],
                height=104, elem_id="drop",
            )
            folder = gr.Textbox(
                label="Image folder", value=in_root(service, SAMPLE) if Path(in_checkout(SAMPLE)).is_dir() else "",
                info="three to five images of one thing, or more of one style", elem_id="folder",
            )
            found = gr.HTML(elem_id="findings")
            thumbnails = gr.HTML(elem_id="thumbnails", js_on_load=SAVE_CAPTION)
            use_captions = gr.Checkbox(
                label="Train with these captions", elem_id="use-captions",
                info="[name] stands for the word; what is captioned is not learned; otherwise templates are used",
            )
        with gr.Column(scale=6, min_width=480):
            with gr.Row():
                placeholder = gr.Textbox(
                    label="Word", value="<bobo>", info="what you will write in prompts", elem_id="placeholder"
                )
                init = gr.Textbox(label="Starts from", value="bear", info="what kind of thing it is", elem_id="init")
                name = gr.Textbox(label="Name", info="of the run; empty: the word", elem_id="name")
            notes = gr.HTML(elem_id="tokens")
            with gr.Row():
                model = gr.Dropdown(
                    label="Base model", choices=models(service), value=in_root(service, WEIGHTS),
                    allow_custom_value=True, info="a file, a folder or a hub id", elem_id="model", scale=3,
                )
                kind = gr.Radio(
                    ["object", "style"], value="object", label="Learn", info="chooses the templates", elem_id="kind",
                    min_width=180,
                )
            with gr.Row():
                recipe = gr.Dropdown(
                    ["", *(Path(path).stem for path in yamls("configs/recipes"))], value="", label="Recipe",
                    info="fast stops by itself", elem_id="recipe", min_width=120,
                )
                personalization = gr.Dropdown(
                    ["", *yamls("configs/personalization")], value="", label="Personalization YAML", scale=2,
                    allow_custom_value=True, info="what is learned; empty: vectors", elem_id="personalization",
                )
                flip = gr.Checkbox(True, label="Mirror", info="off for text", elem_id="flip", min_width=90)
            with gr.Row():
                vectors = gr.Textbox(label="Vectors", info="more: less editable", elem_id="vectors", min_width=110)
                steps = gr.Textbox(label="Steps", info="empty: as shown", elem_id="steps", min_width=110)
                rate = gr.Textbox(label="Rate", info="or 5e-3:100, 1e-3:500", elem_id="rate", min_width=130)
                batch = gr.Textbox(label="Batch", info="images per step", elem_id="batch", min_width=90)
            with gr.Accordion("More", open=False):
                with gr.Row():
                    template_file = gr.Textbox(
                        label="Template file", info="one caption per line, {} is the word", elem_id="template-file",
                    )
                    seed = gr.Textbox(label="Seed", info="empty: 23", min_width=70, elem_id="seed")
                settings = gr.Textbox(
                    label="Further settings", info="model.params.key=value data.params.key=value ...",
                    elem_id="settings",
                )
                # The editor is large: it is fetched when it is opened.
                whole = gr.Code(
                    label="All settings (YAML), in place of recipe and personalization YAML", language="yaml",
                    lines=6, max_lines=14, interactive=True, visible=False, elem_id="yaml",
                )
                with gr.Row(elem_classes="line-of-buttons"):
                    merge = gr.Button("Show all settings, to edit them", size="sm", elem_id="merge")
                    discard = gr.Button("Discard the edited settings", size="sm", visible=False, elem_id="discard")
            command = gr.Textbox(
                label="The command that will run", lines=4, max_lines=5, interactive=False, buttons=["copy"],
                elem_id="command",
            )
            result = gr.HTML(elem_id="check-result")
    with gr.Row(elem_classes="actions"):
        now = gr.HTML(elem_id="now", scale=1)
        stop = gr.Button("Stop (saves)", elem_id="train-stop", min_width=150, visible=False)
        resume = gr.Button("Continue", elem_id="train-continue", min_width=120, visible=False)
        check = gr.Button("Check", elem_id="check", min_width=120)
        start = gr.Button("Start", variant="primary", elem_id="start", min_width=120)

    fields: dict[str, Any] = {
        "folder": folder, "placeholder": placeholder, "init": init, "name": name, "model": model, "kind": kind,
        "recipe": recipe, "vectors": vectors, "steps": steps, "rate": rate, "batch_size": batch, "flip": flip,
        "use_captions": use_captions, "personalization": personalization, "template_file": template_file,
        "seed": seed, "settings": settings, "yaml": whole,
    }
    inputs = list(fields.values())
    planned = [command, result, notes, vectors, steps, rate, batch]
    seen = [thumbnails, found]

    def form(values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(fields, values, strict=True))

    def show_plan(*values: Any) -> Any:
        asked = form(values)
        try:
            plan = service.plan(asked)
        except UserError as error:
            return ["", views.message(str(error), "bad"), views.tokens([], 1), *[gr.skip()] * 4]
        try:
            pieces = views.tokens(service.tokens(asked["model"], asked["init"] or ""), plan.vectors)
        except UserError as error:
            pieces = views.message(str(error), "warn")
        about = "".join(f"<p><small>{escape(text)}</small></p>" for text in plan.about)
        usual = [gr.Textbox(placeholder=text) for text in (str(plan.vectors), plan.steps, plan.rate, plan.batch)]
        return [plan.command, "", pieces + about, *usual]

    def show_images(*values: Any) -> Any:
        asked = form(values)
        path = asked["folder"]
        if not path.strip():
            return "", views.message("drop images, or name a folder")
        try:
            images, found_in_set = service.thumbnails(asked)
        except UserError as error:
            return "", views.message(str(error), "bad")
        return views.thumbnails(images), views.finding_list(found_in_set, len(images))

    def show_all(*values: Any) -> Any:
        return *show_plan(*values), *show_images(*values)

    def take(uploaded: list[str] | None, word: str) -> Any:
        if not uploaded:
            return gr.skip(), None, gr.skip()
        try:
            path, refused = work.take_images(word, uploaded)
        except UserError as error:
            gr.Warning(str(error), duration=12, title="")
            return gr.skip(), None, gr.skip()
        for line in refused:
            gr.Warning(line, duration=12, title="")
        captioned = any(Path(file).suffix.lower() == ".txt" for file in uploaded)
        return work.shown(path), None, True if captioned else gr.skip()

    def save(event: gr.EventData, *values: Any) -> Any:
        work.write_caption(form(values)["folder"], str(event.image), str(event.text))
        if not form(values)["use_captions"]:
            gr.Info("the caption is saved, and captions are used now", title="")
        return True, *show_images(*values)

    def run_check(*values: Any) -> str:
        return views.message(service.check(form(values)).text(), "good")

    def run_start(*values: Any) -> str:
        job = service.start(form(values))
        return views.message(
            f"{job.title} is in the queue and starts as soon as {job.device} is free", "good"
        )

    def open_yaml(*values: Any) -> Any:
        return gr.Code(service.merged_yaml(form(values)), visible=True), gr.Button(visible=True)

    quiet: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
    upload.upload(take, [upload, placeholder], [folder, upload, use_captions], show_progress="minimal")
    gr.on([folder.change, model.change, settings.blur], show_images, inputs, seen, **quiet)
    gr.on([c.change for c in inputs], show_plan, inputs, planned, **quiet)
    thumbnails.submit(or_line(save), inputs, [use_captions, *seen], show_progress="hidden")
    merge.click(or_line(open_yaml), inputs, [whole, discard], show_progress="minimal")
    discard.click(
        lambda: (gr.Code("", visible=False), gr.Button(visible=False)), outputs=[whole, discard],
        show_progress="hidden",
    )
    check.click(
        lambda: views.message("checking: training a few steps in a folder of its own ..."), outputs=result,
        show_progress="hidden",
    ).then(shown_error(run_check), inputs, result, show_progress="hidden", concurrency_limit=1)
    page.load(show_all, inputs, [*planned, *seen], show_progress="hidden")
    started = start.click(or_line(run_start), inputs, result, show_progress="hidden", concurrency_limit=1)
    return TrainTab(started.success(lambda: None), [now, stop, resume], stop, resume)
