"""The page: its fields and buttons, and what happens when they are used. engine.py does the work."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr

from cogvid.run.enhance import chat_address
from cogvid.run.errors import judged, line_of
from cogvid.run.record import read_record
from cogvid.run.settings import OPTIONS
from cogvid.ui import fields, views
from cogvid.ui.engine import Ask, Engine, Run
from cogvid.ui.past import Gallery, Past
from cogvid.ui.pictures import Pictures

HERE = Path(__file__).parent
SANS = ["system-ui", "sans-serif"]  # of the visitor's machine: nothing is fetched
_SHOWN = 24  # cards at first, and how many more a press shows
_EVERY = 0.5  # seconds between two looks at a run
_AS_RECOMMENDED = ""
_PICTURE = """
<div class="drop">
  <label>First frame (optional) <input type="file" accept="image/png,image/jpeg,image/webp,image/gif,image/bmp"></label>
  ${value ? `<img src="pictures/${value}" alt="The picture that was given">
    <button type="button" data-remove>Remove the picture</button>` : "<p>Choose one, drop it here, or paste it.</p>"}
  <p class="alert" role="alert" data-error hidden></p>
</div>"""
_TAKE = "cogvidPicture(element, (name) => { props.value = name; trigger('input'); });"
_PRESS = """element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-act]");
  if (button) trigger("click", { act: button.dataset.act, name: button.dataset.name || "" });
});"""


def theme() -> gr.themes.Base:
    """Return Gradio's plain theme with the fonts of the visitor's machine."""
    mono = ["ui-monospace", "monospace"]
    made = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=SANS, font_mono=mono)
    # Its own colours have too little contrast for small texts.
    return made.set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
    )


class Page:
    """What a visitor sees. His run is found by a name that his browser keeps, so it is found again after a reload."""

    def __init__(self, engine: Engine, gallery: Gallery, pictures: Pictures) -> None:
        self.engine, self.gallery, self.pictures = engine, gallery, pictures

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="cogvid", analytics_enabled=False) as blocks:
            self._visitor = gr.BrowserState("", storage_key="cogvid-visitor", secret="cogvid")
            self._shown = gr.State("")  # what the result shows, see `_look`
            self._picked = gr.State(())
            self._count = gr.State(_SHOWN)
            self._timer = gr.Timer(_EVERY, active=False)
            gr.HTML("<h1>cogvid</h1>", elem_classes="cog")
            with gr.Tabs(elem_id="tabs") as self._tabs:
                with gr.Tab("Make a video", id="make"), gr.Row(equal_height=False):
                    with gr.Column(min_width=320):
                        self._make_form()
                    with gr.Column(min_width=320, elem_id="outcome"):
                        self._make_result()
                with gr.Tab("Gallery", id="gallery") as self._gallery_tab:
                    self._make_gallery()
            self._connect(blocks)
        return blocks

    # -- what there is -------------------------------------------------------------------------------------------------

    def _make_form(self) -> None:
        self._picture = gr.HTML("", html_template=_PICTURE, js_on_load=_TAKE, elem_classes="cog", elem_id="picture")
        with gr.Row(elem_id="by-address"):
            self._address = gr.Textbox(
                label="Or the picture's address", placeholder="https://…", scale=4, min_width=180, elem_id="address"
            )
            self._fetch = gr.Button("Fetch it", size="md", scale=0, min_width=90, elem_id="fetch")
        self._prompt = gr.Textbox(
            label="Prompt", lines=3, placeholder="the red circle moves right", elem_id="prompt", max_length=20_000
        )
        asked = self.engine.url is not None
        host = urlsplit(chat_address(self.engine.url)).netloc if asked else ""
        self._enhance = gr.Checkbox(label=f"Enhance: send the prompt to {host}, which lengthens it", visible=asked)
        with gr.Row():
            first = ("Shipped, by the task", "")
            models = [first, *((name, name) for name in self.engine.models)]
            named = [name for name, source in self.engine.models.items() if name not in ("tiny-i2v", "tiny-t2v")]
            chosen = named[0] if named else ""
            self._model = gr.Dropdown(models, value=chosen, label="Model", elem_id="model", scale=2, filterable=False)
            self._seed = gr.Textbox(label="Seed", placeholder="drawn", elem_id="seed", min_width=110, max_lines=1)
        self._options: dict[str, gr.components.Component] = {}
        for number, (title, names) in enumerate(fields.groups().items()):
            with gr.Accordion(title, open=False):
                if number == 1:
                    self._negative = gr.Textbox(label="Negative prompt", placeholder="none", elem_id="negative")
                self._make_fields(names)
        self._plan = gr.HTML(elem_classes="cog", elem_id="plan")
        self._message = gr.HTML(elem_classes="cog", elem_id="message")
        with gr.Row():
            self._generate = gr.Button("Generate", variant="primary", interactive=False, elem_id="generate")
            self._cancel = gr.Button("Cancel", interactive=False, elem_id="cancel")

    def _make_fields(self, names: Sequence[str]) -> None:
        with gr.Row():
            for name in names:
                metadata, label = OPTIONS[name].metadata, fields.label(name)
                common: dict[str, Any] = {"label": label, "elem_id": f"option-{name}", "min_width": 130}
                choices = fields.choices(name)
                if choices is not None:
                    listed = [("default", _AS_RECOMMENDED), *((each, each) for each in choices)]
                    common["min_width"] = 200
                    made: Any = gr.Dropdown(listed, value=_AS_RECOMMENDED, filterable=False, **common)
                elif metadata["kind"] is bool:
                    made = gr.Checkbox(value=bool(OPTIONS[name].default), **common)
                else:
                    made = gr.Textbox(max_lines=1, **common)
                self._options[name] = made
        lines = "".join(
            f"<dt>{fields.label(name)}</dt><dd>{views.escape(OPTIONS[name].metadata['help'])}</dd>" for name in names
        )
        gr.HTML(f"<details><summary>What these mean</summary><dl>{lines}</dl></details>", elem_classes="cog")

    def _make_result(self) -> None:
        self._progress = gr.HTML(elem_classes="cog", elem_id="progress")
        self._preview = gr.HTML(elem_classes="cog", elem_id="preview")
        self._result = gr.HTML(views.result(None), elem_classes="cog", elem_id="result")
        with gr.Row():
            self._next = gr.Button("Again with the next seed", interactive=False, size="md", elem_id="next")
            self._replay = gr.Button("Replay", interactive=False, size="md", elem_id="replay")

    def _make_gallery(self) -> None:
        with gr.Row():
            self._by_prompt = gr.Textbox(label="Words of the prompt", elem_id="by-prompt", min_width=180)
            self._by_model = gr.Dropdown([("all", "")], value="", label="Made by the model", filterable=False,
                                         allow_custom_value=True, elem_id="by-model", min_width=150)  # fmt: skip
            self._by_seed = gr.Textbox(label="With the seed", elem_id="by-seed", min_width=110, max_lines=1)
        self._gallery_message = gr.HTML(elem_classes="cog", elem_id="gallery-message")
        self._pick_message = gr.HTML(elem_classes="cog", elem_id="pick-message")
        self._pair = gr.HTML(elem_classes="cog", elem_id="pair")
        self._cards = gr.HTML(elem_classes="cog", elem_id="cards", js_on_load=_PRESS)

    # -- what happens --------------------------------------------------------------------------------------------------

    def _connect(self, blocks: gr.Blocks) -> None:
        # Each is answered at once. Gradio's queue would hold a connection, and loses an answer now and then: when the
        # browser closes the stream of one event, it drops the messages of the next.
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
        ask = [self._picture, self._prompt, self._negative, self._model, self._seed, self._enhance]
        ask += self._options.values()
        run = [self._timer, self._progress, self._preview, self._result, self._shown, self._cancel, self._next]
        run += [self._replay]
        look = {"inputs": [self._visitor, self._shown], "outputs": run, **quiet}
        seen = [self._cards, self._gallery_message]
        by = [self._by_prompt, self._by_model, self._by_seed, self._picked, self._count]
        # Before the visitor has a name, a run of his could not be found again.
        entered = blocks.load(self._enter, self._visitor, self._visitor, **quiet).then(self._look, **look)
        entered.then(lambda: gr.Button(interactive=True), None, self._generate, **quiet)
        blocks.load(self._foresee, ask, [self._plan, *self._options.values()], **quiet)
        self._timer.tick(self._look, **look)

        said = {"outputs": [self._visitor, self._message], **quiet}
        self._generate.click(self._begin, [self._visitor, *ask], **said).then(self._look, **look)
        self._next.click(self._again, [self._visitor, self._shown], **said).then(self._look, **look)
        self._replay.click(self._make_again, [self._visitor, self._shown], **said).then(self._look, **look)
        self._cancel.click(self._stop, self._visitor, self._message, **quiet).then(self._look, **look)
        fetched = [self._picture, self._message]
        fetch = gr.on(
            [self._fetch.click, self._address.submit],
            self._fetch_picture,
            [self._address, self._picture],
            fetched,
            **quiet,
        )
        foresee = {"inputs": ask, "outputs": [self._plan, *self._options.values()], **quiet}
        fetch.then(self._foresee, **foresee)
        gr.on([self._picture.input, self._model.change], self._foresee, **foresee)
        changed = [each.change for each in self._options.values()]  # pyright: ignore[reportAttributeAccessIssue]
        gr.on(changed, self._cost, ask, self._plan, trigger_mode="always_last", **quiet)

        filters = [self._by_prompt.change, self._by_model.change, self._by_seed.change]
        gr.on(filters, self._list, by, seen, trigger_mode="always_last", **quiet)
        self._gallery_tab.select(self._models, None, self._by_model, **quiet).then(self._list, by, seen, **quiet)
        pressed = self._cards.click(
            self._press, [self._picked, self._count],
            [self._picked, self._count, self._pair, self._pick_message, self._shown, self._tabs],
            **quiet,
        )  # fmt: skip
        pressed.then(self._list, by, seen, **quiet).then(self._look, **look)

    def _enter(self, visitor: str) -> str:
        return visitor or secrets.token_urlsafe(16)

    def _ask(
        self, picture: str, prompt: str, negative: str, model: str, seed: Any, enhance: bool, *options: Any
    ) -> Ask:
        return Ask(
            prompt=prompt or "",
            negative_prompt=negative or "",
            model=model or "",
            image=self.pictures.get(picture) if picture else None,
            seed=fields.whole("seed", seed),
            options=fields.read(dict(zip(self._options, options, strict=True))),
            enhance=bool(enhance),
        )

    def _begin(self, visitor: str, *asked: Any) -> tuple[Any, str]:
        def submit(name: str) -> None:
            ask = self._ask(*asked)
            if not ask.prompt.strip():
                raise ValueError("prompt: got none, want words")
            self.engine.submit(ask, name)

        return self._submitted(visitor, submit)

    def _again(self, visitor: str, shown: str) -> tuple[Any, str]:
        """Run what made the video that is shown with the next seed."""

        def submit(name: str) -> None:
            run = self._run_of(visitor, shown)
            if run is None or run.record is None:
                raise ValueError("run: got none of yours that is still known, want one to repeat")
            ask = dataclasses.replace(run.ask, seed=(run.record["seed"] or 0) + 1)
            self.engine.submit(ask, name)

        return self._submitted(visitor, submit)

    def _make_again(self, visitor: str, shown: str) -> tuple[Any, str]:
        return self._submitted(visitor, lambda name: self.engine.submit(Ask(replay=_name_of(shown)), name))

    def _submitted(self, visitor: str, submit: Callable[[str], Any]) -> tuple[Any, str]:
        name = self._enter(visitor)
        try:
            submit(name)
        except Exception as error:
            return name, _alert(error)
        return name, ""

    def _stop(self, visitor: str) -> str:
        self.engine.cancel(visitor)
        return ""

    def _look(self, visitor: str, shown: str) -> tuple[Any, ...]:
        """Return what changed since the last look.

        shown: the id of the run and the name of the file that the result shows, with a space between; of a video of the
        gallery the name alone.
        """
        run = self.engine.latest(visitor) if visitor else None
        active = run is not None and run.active
        result: Any = gr.skip()
        if shown.startswith("+"):  # it was just opened
            shown = f"{run.id if run is not None else ''} {shown}"
            result = views.result(self._past(_name_of(shown)))
        elif run is not None and run.state == "done" and not shown.startswith((f"{run.id} +", f"{run.id} {run.name}")):
            shown = f"{run.id} {run.name}"
            result = views.result(self._past(run.name), run.notes)
        name = _name_of(shown)
        own = self._run_of(visitor, shown)
        again = own is not None and own.ask.replay is None and own.name == name
        return (
            gr.Timer(active=active),
            views.progress(run),
            views.preview(run),
            result,
            shown,
            gr.Button(interactive=active),
            gr.Button(interactive=again and not active),
            gr.Button(interactive=bool(name) and not active),
        )

    def _run_of(self, visitor: str, shown: str) -> Run | None:
        run = self.engine.latest(visitor)
        return run if run is not None and run.id == shown.partition(" ")[0] else None

    def _past(self, name: str | None) -> Past | None:
        """Return a video by its name; None where it is not there any more."""
        try:
            return Past(name, read_record(self.engine.video(name))) if name else None
        except (ValueError, OSError):
            return None

    def _fetch_picture(self, address: str, picture: str) -> tuple[str, str]:
        try:
            return self.pictures.fetch((address or "").strip()), ""
        except Exception as error:
            return picture, _alert(error)

    def _cost(self, *asked: Any) -> str:
        try:
            return views.plan(self.engine.plan(self._ask(*asked)))
        except Exception as error:
            return _alert(error)

    def _foresee(self, *asked: Any) -> list[Any]:
        """Return the plan, and the fields with what they stand for when they are empty."""
        shown: list[Any] = [gr.skip() for _ in self._options]
        try:
            ask = self._ask(*asked)
            best = fields.recommended(self.engine.subject(self.engine.source(ask)).model, ask.task)
        except Exception as error:
            return [_alert(error), *shown]
        for place, (name, field) in enumerate(self._options.items()):
            if isinstance(field, gr.Dropdown):
                listed = [(f"{best[name]} (default)", _AS_RECOMMENDED)]
                listed += [(each, each) for each in fields.choices(name) or []]
                shown[place] = gr.Dropdown(choices=listed, value=ask.options.get(name, _AS_RECOMMENDED))
            elif not isinstance(field, gr.Checkbox):
                shown[place] = type(field)(placeholder=best[name])  # pyright: ignore[reportCallIssue]
        return [self._cost(*asked), *shown]

    def _models(self) -> gr.Dropdown:
        return gr.Dropdown(choices=[("all", ""), *((name, name) for name in self.gallery.models())])

    def _list(self, prompt: str, model: str, seed: Any, picked: Sequence[str], count: int) -> tuple[str, Any]:
        try:
            runs = self.gallery.runs((prompt or "").strip(), model or "", fields.whole("seed", seed))
        except ValueError as error:
            return "", _alert(error)
        return views.cards(runs, picked, count), ""

    def _press(self, picked: Sequence[str], count: int, event: gr.EventData) -> tuple[Any, ...]:
        """Do what a button of a card says: show more of them, open a video, or pick it for a comparison."""
        data = getattr(event, "_data", None) or {}
        act, name = str(data.get("act")), str(data.get("name"))
        pair, shown, tab, said = gr.skip(), gr.skip(), gr.skip(), ""
        try:
            if act == "more":
                count += _SHOWN
            elif act == "open":
                shown, tab = f"+{self.engine.video(name).name}", gr.Tabs(selected="make")
            elif act == "pick":
                self.engine.video(name)
                rest = tuple(each for each in picked if each != name)
                picked = rest if name in picked else (*picked[-1:], name)
                said = '<p role="status">Pick one more to compare the two.</p>' if len(picked) == 1 else ""
                pair = self._compared(*picked) if len(picked) == 2 else ""
        except Exception as error:
            pair, said = "", _alert(error)
        return picked, count, pair, said, shown, tab

    def _compared(self, first: str, second: str) -> str:
        paths = self.engine.video(first), self.engine.video(second)
        found, picture = self.gallery.compare(*paths)
        a, b = (Past(path.name, read_record(path)) for path in paths)
        return views.pair(a, b, found, picture)


def _name_of(shown: str) -> str:
    """Return the file's name in what `_look` keeps."""
    return shown.rpartition(" ")[2].removeprefix("+")


def _alert(error: Exception) -> str:
    return views.alert(line_of(judged(error)[0]))
