"""The page: four tabs of gradio components, each of which calls one method of `Service`.

The layout is not formatted by ruff, which would give every argument of a component a line of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ldm.files import in_checkout
from ldm.generate.session import WEIGHTS
from ldm.studio import views
from ldm.studio.service import Service
from ldm.studio.tabs import generate_tab, in_root, models, or_line, shown_error, words_tab, yamls
from ldm.training.record import RunRecord
from ldm.util import UserError

# fmt: off

STYLE = Path(__file__).with_name("style.css")
SCRIPT = Path(__file__).with_name("page.js")
SAMPLE = "data/concepts/bobo"
# A caption that was edited is saved when its field is left, beside the image that it was shown with.
SAVE_CAPTION = """
element.addEventListener("change", (event) => {
  const field = event.target.closest("textarea");
  const folder = element.querySelector("[data-folder]")?.dataset.folder;
  if (field) trigger("submit", {folder, image: field.name, text: field.value});
});
"""
# Seconds between two looks at the runs.
PERIOD = 2.0


def page_script() -> str:
    """The page's own script, for its head."""
    return f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>"


def theme() -> gr.themes.Base:
    """A quiet theme with the fonts of the machine, so that nothing is fetched."""
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="gray",
        spacing_size="sm",
        text_size="sm",
        radius_size="sm",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )


def make_page(service: Service) -> gr.Blocks:
    """The page of a service."""
    with gr.Blocks(title="Textual inversion", analytics_enabled=False, delete_cache=(3600, 86_400)) as page:
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Train", id="train"):
                train = _train_tab(service, page)
            with gr.Tab("Runs", id="runs") as runs_tab:
                runs = _runs_tab(service)
            with gr.Tab("Generate", id="generate") as third:
                refresh_words, word_choices = generate_tab(service)
            with gr.Tab("Words", id="words") as fourth:
                refresh_table, table_outputs = words_tab(service)
        def look(found: list[RunRecord]) -> list[Any]:
            return [*runs.refresh(found), *_now(found)]

        looks: dict[str, Any] = {
            "fn": lambda: look(service.runs()), "outputs": [*runs.outputs, *train.strip],
            "show_progress": "hidden", "queue": False,
        }
        for event in (page.load, runs_tab.select, gr.Timer(PERIOD).tick):
            event(**looks)
        third.select(refresh_words, inputs=word_choices, outputs=word_choices, show_progress="hidden")
        fourth.select(refresh_table, outputs=table_outputs, show_progress="hidden")
        train.started.then(
            lambda: (gr.Tabs(selected="runs"), ""), outputs=[tabs, runs.chosen], show_progress="hidden"
        ).then(**looks)
        train.stop.click(or_line(lambda: stop_run(service, "")), show_progress="hidden").then(**looks)
        train.resume.click(or_line(lambda: resume_run(service, "", "")), show_progress="hidden").then(**looks)
        runs.kept.then(refresh_words, inputs=word_choices, outputs=word_choices, show_progress="hidden")
    # No program calls these by name; a description of each would be sent to every visitor.
    for function in page.fns.values():
        function.api_visibility = "private"
    return page


def first_kinds(page: gr.Blocks) -> set[str]:
    """The kinds of components that the page shows first: those of its first tab, with what holds them."""
    tabs = next(block for block in page.children if isinstance(block, gr.Tabs))
    kinds, waiting = {tabs.get_block_name()}, [tabs.children[0]]
    while waiting:
        block = waiting.pop()
        if getattr(block, "visible", True) is False:
            continue
        kinds.add(block.get_block_name())
        waiting += getattr(block, "children", [])
    return kinds


def _now(runs: list[RunRecord]) -> list[Any]:
    """What the tab Train shows of the run that goes on or was stopped last, and whether its buttons are there."""
    if not runs:
        return ["", gr.Button(visible=False), gr.Button(visible=False)]
    ends = runs[0].state in ("stopped", "failed", "lost")
    return [views.run_line(runs[0]), gr.Button(visible=runs[0].live), gr.Button(visible=ends and not runs[0].live)]


def stop_run(service: Service, name: str) -> None:
    """Stop a run of this name, or the newest."""
    service.queue.stop_run(service.workspace.logs / _current(service, name))
    gr.Info("it saves and ends after this step", title="")


def resume_run(service: Service, name: str, to: str) -> None:
    """Continue a run of this name, or the newest, up to a step if one is given."""
    service.resume(_current(service, name), to)
    gr.Info("it goes on as soon as its device is free", title="")


def _current(service: Service, name: str) -> str:
    runs = service.runs()
    if name or runs:
        return name or runs[0].folder.name
    raise UserError("there is no run yet")


# -- Train -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainTab:
    """What the rest of the page needs of the tab: the event of a start, and what shows the run that goes on."""

    started: Any
    strip: list[Any]
    stop: gr.Button
    resume: gr.Button


def _train_tab(service: Service, page: gr.Blocks) -> TrainTab:
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
                    mask_weight = gr.Textbox(
                        label="Outside of masks", info="0 to 1: its weight in the loss", min_width=150,
                        elem_id="mask-weight",
                    )
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
        "seed": seed, "mask_weight": mask_weight, "settings": settings, "yaml": whole,
    }
    inputs = list(fields.values())
    planned = [command, result, notes, vectors, steps, rate, batch, mask_weight]
    seen = [thumbnails, found]

    def form(values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(fields, values, strict=True))

    def show_plan(*values: Any) -> Any:
        asked = form(values)
        try:
            plan = service.plan(asked)
        except UserError as error:
            return ["", views.message(str(error), "bad"), views.tokens([], 1), *[gr.skip()] * 5]
        try:
            pieces = views.tokens(service.tokens(asked["model"], asked["init"] or ""), plan.vectors)
        except UserError as error:
            pieces = views.message(str(error), "warn")
        about = "".join(f"<p><small>{escape(text)}</small></p>" for text in plan.about)
        values_shown = (str(plan.vectors), plan.steps, plan.rate, plan.batch, plan.mask_weight)
        usual = [gr.Textbox(placeholder=text) for text in values_shown]
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
        return views.thumbnails(path, images), views.finding_list(found_in_set, len(images))

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
        work.write_caption(str(event.folder), str(event.image), str(event.text))
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
    page.load(show_all, inputs, [*planned, *seen], show_progress="hidden", queue=False)
    started = start.click(or_line(run_start), inputs, result, show_progress="hidden", concurrency_limit=1)
    return TrainTab(started.success(lambda: None), [now, stop, resume], stop, resume)


# -- Runs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunsTab:
    """What refreshes the tab of runs, the run that is chosen in it, and the event of a saved concept."""

    refresh: Callable[[list[RunRecord]], Any]
    outputs: list[Any]
    chosen: gr.State
    kept: Any


def _runs_tab(service: Service) -> RunsTab:
    """The components and events of the tab of runs."""
    chosen = gr.State("")
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=380):
            table = gr.Dataframe(
                headers=["state", "word", "step", "time", "run"], datatype="str", type="array", interactive=False,
                max_height=250, column_widths=["17%", "14%", "16%", "18%", "35%"], elem_id="runs-table",
                show_label=False, buttons=[], wrap=True,
            )
            compare = gr.Dropdown(
                [], value=[], multiselect=True, label="Compare with", info="its curves and previews beside",
                elem_id="compare",
            )
            curves = gr.HTML(elem_id="curves")
            with gr.Column(visible=False, elem_id="queue") as queued:
                queue = gr.Dataframe(
                    headers=["state", "word", "device", "message", "id"], datatype="str", type="array",
                    interactive=False, max_height=150, label="Queue", elem_id="queue-table", buttons=[], wrap=True,
                )
                with gr.Row(elem_classes="line-of-buttons"):
                    job = gr.Dropdown([], label="Queued run", show_label=False, container=False, scale=3)
                    earlier = gr.Button("Earlier", size="sm", min_width=60, elem_id="earlier")
                    later = gr.Button("Later", size="sm", min_width=60, elem_id="later")
                    remove = gr.Button("Remove", size="sm", min_width=70, elem_id="remove")
        with gr.Column(scale=6, min_width=480):
            head = gr.HTML(
                views.message("no runs yet: start one in Train, or with main.py"), elem_id="run-head"
            )
            with gr.Row(elem_classes="line-of-buttons"):
                stop = gr.Button("Stop (saves)", size="sm", elem_id="stop", min_width=90)
                resume = gr.Button("Continue", size="sm", elem_id="continue", min_width=90)
                until = gr.Textbox(
                    show_label=False, container=False, min_width=150, placeholder="up to step (empty: its own)",
                    elem_id="until",
                )
            previews = gr.HTML(padding=False, elem_id="previews")
            place = gr.Slider(
                0, 1, 0, step=1, label="Preview", info="step through the previews", elem_id="preview"
            )
            with gr.Row(elem_classes="line-of-buttons"):
                kept_as = gr.Textbox(
                    show_label=False, container=False, placeholder="word of the concept (as it is)", scale=3
                )
                keep = gr.Button("Save this step as the concept", size="sm", elem_id="keep", scale=2)
            with gr.Accordion("Log", open=False):
                log = gr.Textbox(lines=10, max_lines=10, show_label=False, interactive=False, elem_id="log")

    outputs = [table, queued, queue, job, compare]
    details = [head, curves, previews, place, log, stop, resume]

    def refresh(runs: list[RunRecord]) -> Any:
        rows = [views.run_row(run) for run in runs]
        jobs = [one for one in service.queue.jobs() if one.folder is None or one.state != "running"]
        waiting = [(f"{one.title} ({one.id})", one.id) for one in jobs]
        names = [run.folder.name for run in runs]
        shown = gr.Column(visible=bool(jobs))
        return rows, shown, [views.job_row(one) for one in jobs], gr.Dropdown(waiting), gr.Dropdown(names)

    def detail(name: str, others: list[str], number: float | None, choose_place: bool = False) -> Any:
        if not name:
            runs = service.runs()
            if not runs:
                return [gr.skip()] * len(details)
            name = runs[0].folder.name
        try:
            run = service.workspace.run(name)
        except UserError as error:
            return views.message(f"{error}: its folder vanished", "bad"), "", "", gr.skip(), "", gr.skip(), gr.skip()
        several = [run]
        for other in others or []:
            try:
                several.append(service.workspace.run(other))
            except UserError:
                continue
        count = len(run.previews())
        last = max(count - 1, 0)
        # A new preview is shown to whoever looks at the newest one.
        at = min(int(number or 0), last) if choose_place or int(number or 0) < last - 1 else last
        shown = views.preview(several, at) + views.strip(run)
        slider = gr.Slider(0, max(last, 1), at, visible=count > 1)
        ends = gr.Button(interactive=run.live), gr.Button(interactive=not run.live)
        return views.run_head(run), views.curves(several), shown, slider, run.log(), *ends

    def choose(event: gr.SelectData) -> str:
        return str(event.row_value[4])

    def do_keep(name: str, number: float, word: str) -> None:
        run = service.workspace.run(_current(service, name))
        previews = run.previews()
        step: int | str | None = "last"
        if previews:
            step = service.nearest_saved(run, previews[min(int(number), len(previews) - 1)][0])
        path = service.keep(run.folder.name, "last" if step is None else step, word or "")
        gr.Info(f"{'the last step' if step == 'last' else f'step {step}'} is saved as {service.workspace.shown(path)}")

    table.select(choose, None, chosen, show_progress="hidden").then(
        lambda name, others: detail(name, others, 10**9), [chosen, compare], details, show_progress="hidden"
    )
    compare.change(detail, [chosen, compare, place], details, show_progress="hidden")
    place.release(
        lambda n, o, p: detail(n, o, p, True), [chosen, compare, place], details, show_progress="hidden"
    )
    stop.click(or_line(lambda name: stop_run(service, name)), chosen, show_progress="hidden")
    resume.click(or_line(lambda name, to: resume_run(service, name, to)), [chosen, until], show_progress="hidden")
    kept = keep.click(or_line(do_keep), [chosen, place, kept_as], show_progress="hidden")
    for button, action in (
        (earlier, lambda id: service.queue.move(id, -1)),
        (later, lambda id: service.queue.move(id, 1)),
        (remove, service.queue.remove),
    ):
        button.click(or_line(action), job, show_progress="hidden").then(
            lambda: refresh(service.runs()), outputs=outputs, show_progress="hidden"
        )
    table.change(
        detail, [chosen, compare, place], details, show_progress="hidden", trigger_mode="always_last"
    )
    return RunsTab(refresh, outputs, chosen, kept)
