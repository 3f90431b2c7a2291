"""The page: four tabs of gradio components, each of which calls one method of `Service`.

The layout is not formatted by ruff, which would give every argument of a component a line of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from ldm.generate.session import WEIGHTS
from ldm.studio import views
from ldm.studio.service import Service
from ldm.studio.tabs import generate_tab, in_root, models, or_line, words_tab
from ldm.util import UserError
from ldm.yaml_files import in_checkout

# fmt: off

STYLE = Path(__file__).with_name("style.css")
SCRIPT = Path(__file__).with_name("page.js")
RECIPES = ["", "fast", "paper", "low-memory", "previews", "direction"]
SAMPLE = "data/concepts/bobo"
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
                started = _train_tab(service)
            with gr.Tab("Runs", id="runs") as runs_tab:
                refresh_runs, runs_outputs, use_buttons = _runs_tab(service)
            with gr.Tab("Generate", id="generate") as third:
                refresh_words, word_choices = generate_tab(service)
            with gr.Tab("Words", id="words") as fourth:
                refresh_table, table_outputs = words_tab(service)
        runs_tab.select(refresh_runs, outputs=runs_outputs, show_progress="hidden")
        third.select(refresh_words, inputs=word_choices, outputs=word_choices, show_progress="hidden")
        fourth.select(refresh_table, outputs=table_outputs, show_progress="hidden")
        page.load(refresh_runs, outputs=runs_outputs, show_progress="hidden")
        page.load(refresh_words, inputs=word_choices, outputs=word_choices, show_progress="hidden")
        started.then(lambda: gr.Tabs(selected="runs"), outputs=tabs, show_progress="hidden").then(
            refresh_runs, outputs=runs_outputs, show_progress="hidden"
        )
        use_buttons.then(refresh_words, inputs=word_choices, outputs=word_choices, show_progress="hidden")
        gr.Timer(PERIOD).tick(refresh_runs, outputs=runs_outputs, show_progress="hidden", queue=False)
    return page


# -- Train -----------------------------------------------------------------------------------------------------


def _train_tab(service: Service) -> Any:
    """The tab that plans and starts a run; returns the event after a successful start."""
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
            shown = gr.Gallery(
                label="As training sees them", columns=5, height=176, object_fit="contain", interactive=False,
                elem_id="thumbnails", buttons=[],
            )
            found = gr.HTML(padding=False, elem_id="findings")
            with gr.Accordion("Captions", open=False):
                use_captions = gr.Checkbox(
                    label="Use captions", info="[name] stands for the word; what is captioned is not learned"
                )
                captions = gr.Dataframe(
                    headers=["image", "caption"], datatype="str", type="array", interactive=True, max_height=180,
                    static_columns=[0], elem_id="captions", show_label=False, buttons=[],
                )
                save_captions = gr.Button("Save captions", size="sm")
        with gr.Column(scale=6, min_width=480):
            with gr.Row():
                placeholder = gr.Textbox(
                    label="Word", value="<bobo>", info="what you will write in prompts", elem_id="placeholder"
                )
                init = gr.Textbox(label="Starts from", value="bear", info="what kind of thing it is", elem_id="init")
                name = gr.Textbox(label="Name", info="of the run; empty: the word", elem_id="name")
            pieces = gr.HTML(padding=False, elem_id="tokens")
            with gr.Row():
                model = gr.Dropdown(
                    label="Base model", choices=models(service), value=in_root(service, WEIGHTS),
                    allow_custom_value=True, info="a file, a folder or a hub id", elem_id="model", scale=3,
                )
                kind = gr.Radio(
                    ["object", "style"], value="object", label="Learn", info="chooses the captions", elem_id="kind",
                    min_width=180,
                )
                recipe = gr.Dropdown(
                    RECIPES, value="", label="Recipe", info="fast stops by itself", elem_id="recipe", min_width=120
                )
            with gr.Row():
                vectors = gr.Textbox("1", label="Vectors", info="more: less editable", elem_id="vectors", min_width=110)
                steps = gr.Textbox(label="Steps", info="empty: the YAML's", elem_id="steps", min_width=110)
                rate = gr.Textbox(label="Rate", info="or 5e-3:100, 1e-3:500", elem_id="rate", min_width=130)
                batch = gr.Textbox(label="Batch", info="images per step", elem_id="batch", min_width=90)
                flip = gr.Checkbox(True, label="Mirror", info="off for text", elem_id="flip", min_width=90)
            with gr.Accordion("More", open=False):
                with gr.Row():
                    personalization = gr.Dropdown(
                        ["", *_yamls("configs/personalization")], value="", label="Personalization YAML",
                        allow_custom_value=True, info="progressive, one per image, two concepts, your own",
                    )
                    template_file = gr.Textbox(label="Template file", info="one caption per line, {} is the word")
                    seed = gr.Textbox(label="Seed", info="empty: 23", min_width=70)
                settings = gr.Textbox(
                    label="Further settings", info="model.params.key=value data.params.key=value ...",
                    elem_id="settings",
                )
                whole = gr.Code(label="All settings (YAML)", language="yaml", lines=6, max_lines=14, interactive=True)
                merge = gr.Button("Show all settings, to edit them", size="sm")
            command = gr.Textbox(
                label="The command that will run", lines=5, max_lines=5, interactive=False, buttons=["copy"],
                elem_id="command",
            )
            result = gr.HTML(padding=False, elem_id="check-result")
    with gr.Row(elem_classes="actions"):
        check = gr.Button("Check", elem_id="check", min_width=120)
        start = gr.Button("Start", variant="primary", elem_id="start", min_width=120)

    fields: dict[str, Any] = {
        "folder": folder, "placeholder": placeholder, "init": init, "name": name, "model": model, "kind": kind,
        "recipe": recipe, "vectors": vectors, "steps": steps, "rate": rate, "batch_size": batch, "flip": flip,
        "use_captions": use_captions, "personalization": personalization, "template_file": template_file,
        "seed": seed, "settings": settings, "yaml": whole,
    }
    inputs = list(fields.values())

    def form(values: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(fields, values, strict=True))

    def show_command(*values: Any) -> Any:
        try:
            return service.command(form(values)), ""
        except UserError as error:
            return "", views.message(str(error), "bad")

    def show_images(path: str) -> Any:
        if not path.strip():
            return [], views.message("drop images, or name a folder"), []
        try:
            thumbnails, found_in_set = service.thumbnails(path)
            rows = [[p.name, text] for p, text in work.captions(path).items()]
        except UserError as error:
            return [], views.message(str(error), "bad"), []
        return thumbnails, views.finding_list(found_in_set, len(thumbnails)), rows

    def take(files: list[str] | None, word: str) -> Any:
        if not files:
            return gr.skip(), gr.skip()
        try:
            path, refused = work.take_images(word, files)
        except UserError as error:
            gr.Warning(str(error), duration=12)
            return gr.skip(), None
        if refused:
            gr.Warning("; ".join(refused)[:400], duration=12)
        return work.shown(path), None

    def show_tokens(path: str, text: str, count: str) -> str:
        try:
            return views.tokens(service.tokens(path, text or ""), int(count) if str(count).isdigit() else 1)
        except UserError as error:
            return views.message(str(error), "warn")

    def save(path: str, rows: list[list[str]]) -> Any:
        changed = work.write_captions(path, [row[1] for row in rows])
        gr.Info(f"{changed} caption{'s' * (changed != 1)} saved")
        return show_images(path)

    def run_check(*values: Any) -> str:
        return views.message(service.check(form(values)).text(), "good")

    def run_start(*values: Any) -> str:
        job = service.start(form(values))
        return views.message(
            f"{job.title} is in the queue and starts as soon as {job.device} is free", "good"
        )

    upload.upload(take, [upload, placeholder], [folder, upload], show_progress="minimal")
    folder.change(
        show_images, folder, [shown, found, captions], show_progress="hidden", trigger_mode="always_last"
    )
    gr.on(
        [c.change for c in inputs],
        show_command,
        inputs,
        [command, result],
        show_progress="hidden",
        trigger_mode="always_last",
    )
    gr.on(
        [init.change, model.change, vectors.change], show_tokens, [model, init, vectors], pieces,
        show_progress="hidden", trigger_mode="always_last",
    )
    save_captions.click(or_line(save), [folder, captions], [shown, found, captions])
    merge.click(or_line(lambda *values: service.merged_yaml(form(values))), inputs, whole)
    check.click(
        lambda: views.message("checking: training a few steps in a folder of its own ..."), outputs=result,
        show_progress="hidden",
    ).then(_shown_error(run_check), inputs, result, show_progress="hidden", concurrency_limit=1)
    context = gr.context.Context.root_block
    assert context is not None
    context.load(show_images, folder, [shown, found, captions], show_progress="hidden")
    context.load(show_command, inputs, [command, result], show_progress="hidden")
    context.load(show_tokens, [model, init, vectors], pieces, show_progress="hidden")

    event = start.click(or_line(run_start), inputs, result, show_progress="hidden", concurrency_limit=1)
    return event.success(lambda: None)


def _shown_error(action: Callable[..., str]) -> Callable[..., str]:
    """An action that returns HTML, and whose UserError is shown in its place."""

    def act(*values: Any) -> str:
        try:
            return action(*values)
        except UserError as error:
            return views.message(str(error), "bad")

    return act


def _yamls(folder: str) -> list[str]:
    place = Path(in_checkout(folder))
    return [f"{folder}/{path.name}" for path in sorted(place.glob("*.yaml"))]


# -- Runs ------------------------------------------------------------------------------------------------------


def _runs_tab(service: Service) -> tuple[Callable[..., Any], list[Any], Any]:
    """The tab of runs; returns the function that refreshes it with its outputs, and the event of a saved concept."""
    chosen = gr.State("")
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=380):
            table = gr.Dataframe(
                headers=["state", "word", "step", "time", "run"], datatype="str", type="array", interactive=False,
                max_height=330, column_widths=["98px", "72px", "80px", "98px", "120px"], elem_id="runs-table",
                show_label=False, buttons=[], wrap=False,
            )
            compare = gr.Dropdown(
                [], value=[], multiselect=True, label="Compare with", info="its curves and previews beside"
            )
            with gr.Column(visible=False, elem_id="queue") as queued:
                queue = gr.Dataframe(
                    headers=["state", "word", "device", "message", "id"], datatype="str", type="array",
                    interactive=False, max_height=150, label="Queue", elem_id="queue-table", buttons=[], wrap=True,
                )
                with gr.Row(elem_classes="line-of-buttons"):
                    job = gr.Dropdown([], label="Queued run", show_label=False, container=False, scale=3)
                    earlier = gr.Button("Earlier", size="sm", min_width=60)
                    later = gr.Button("Later", size="sm", min_width=60)
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
            curves = gr.HTML(padding=False, elem_id="curves")
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
    details = [head, curves, previews, place, log]

    def refresh() -> Any:
        runs = service.runs()
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
            run = service.run(name)
        except UserError as error:
            return views.message(f"{error}: its folder vanished", "bad"), "", "", gr.skip(), ""
        several = [run]
        for other in others or []:
            try:
                several.append(service.run(other))
            except UserError:
                continue
        count = len(run.previews())
        last = max(count - 1, 0)
        # A new preview is shown to whoever looks at the newest one.
        at = min(int(number or 0), last) if choose_place or int(number or 0) < last - 1 else last
        shown = views.preview(several, at) + views.strip(run)
        slider = gr.Slider(0, max(last, 1), at, visible=count > 1)
        return views.run_head(run), views.curves(several), shown, slider, run.log()

    def choose(rows: list[list[str]], event: gr.SelectData) -> str:
        return str(rows[event.index[0]][4])

    def current(name: str) -> str:
        runs = service.runs()
        if name or runs:
            return name or runs[0].folder.name
        raise UserError("there is no run yet")

    def do_stop(name: str) -> None:
        service.queue.stop_run(service.workspace.logs / current(name))
        gr.Info("it saves and ends after this step")

    def do_resume(name: str, to: str) -> None:
        service.resume(current(name), to)
        gr.Info("it goes on as soon as its device is free")

    def do_keep(name: str, number: float, word: str) -> None:
        run = service.run(current(name))
        previews = run.previews()
        step: int | str | None = "last"
        if previews:
            step = service.nearest_saved(run, previews[min(int(number), len(previews) - 1)][0])
        path = service.keep(run.folder.name, "last" if step is None else step, word or "")
        gr.Info(f"step {step} is saved as {service.workspace.shown(path)}")

    table.select(choose, table, chosen, show_progress="hidden").then(
        lambda name, others: detail(name, others, 10**9), [chosen, compare], details, show_progress="hidden"
    )
    compare.change(detail, [chosen, compare, place], details, show_progress="hidden")
    place.release(
        lambda n, o, p: detail(n, o, p, True), [chosen, compare, place], details, show_progress="hidden"
    )
    stop.click(or_line(do_stop), chosen, show_progress="hidden")
    resume.click(or_line(do_resume), [chosen, until], show_progress="hidden")
    kept = keep.click(or_line(do_keep), [chosen, place, kept_as], show_progress="hidden")
    for button, action in (
        (earlier, lambda id: service.queue.move(id, -1)),
        (later, lambda id: service.queue.move(id, 1)),
        (remove, service.queue.remove),
    ):
        button.click(or_line(action), job, show_progress="hidden").then(
            refresh, outputs=outputs, show_progress="hidden"
        )
    table.change(
        detail, [chosen, compare, place], details, show_progress="hidden", trigger_mode="always_last"
    )
    return refresh, outputs, kept
