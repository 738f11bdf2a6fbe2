"""The page of `reasonpix serve`: edit an image in the browser, compare, go on from the result.

`page` builds it; `mount` puts it into the server's app, behind all other routes. What is uploaded
goes through the server's own reading and editing, so that the limits of the REST API hold here too;
`reasonpix.deployment.server.gradio_guard` says what of it reaches Gradio.

Importing this module takes seconds: do it where the page is served.
"""

from __future__ import annotations

import asyncio
import atexit
import hmac
import html
import logging
import os
import random
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import gradio as gr
from fastapi import FastAPI
from gradio.utils import get_upload_folder
from PIL import Image

from reasonpix.core.images import UndecodableImage, decode, encode_png
from reasonpix.deployment.server.gradio_guard import Gate, PageRoute, make_room
from reasonpix.editing.config import SamplingSettings
from reasonpix.errors import ReasonpixError

EditImage = Callable[[Image.Image, str, int, float, float, int], Image.Image]
"""(image, instruction, seed, guidance_scale, image_guidance_scale, steps) -> the edited image."""
Read = Callable[[bytes], Image.Image]
"""An encoded image as RGB, or an `UndecodableImage` or `ReasonpixError` that says why not."""

HISTORY = 30
"""Edits that a session keeps, the newest first."""
SESSIONS = 1000
"""Sessions whose history is held; the one that was idle longest goes first."""
KEPT_S = 6 * 3600
"""Seconds that uploads and results lie on the server's disk, unless room is needed."""
TOGETHER = 16
"""Edits of all sessions that are handed to the server at once; as many as that wait once more."""
SEEDS = 2**31
"""Random seeds are below it; others may be larger."""
HEIGHT = 380
"""Of both images on the page, in pixels."""

_STYLE = Path(__file__).parents[2] / "pages" / "serve.css"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Edit:
    """One edit of a session. Images are files, or thirty of them would fill the memory."""

    upload: str
    files: tuple[str, str]
    """Before and after."""
    thumbnail: str
    instruction: str
    seed: int
    guidance_scale: float
    image_guidance_scale: float
    steps: int

    @property
    def settings(self) -> str:
        return (
            f"Seed {self.seed} · guidance {self.guidance_scale:g} · "
            f"image guidance {self.image_guidance_scale:g} · {self.steps} steps"
        )


def page(
    edit: EditImage,
    settings: SamplingSettings,
    title: str,
    *,
    max_steps: int = 200,
    read: Read = decode,
) -> gr.Blocks:
    """The page as Gradio's blocks; `mount` serves them as they are meant to be.

    `settings` are what the page begins with. `edit` and `read` are called in threads, for up to
    `TOGETHER` edits at once; what they raise as `ReasonpixError` is shown to who asked.
    """
    blocks: gr.Blocks = gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, KEPT_S))
    with blocks:
        history = gr.State(())
        shown = gr.State(None)
        gr.Markdown("# " + _plain(title), latex_delimiters=[], elem_id="title")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=300):
                image = gr.Image(
                    label="Image",
                    type="filepath",
                    format="png",
                    sources=["upload", "clipboard"],
                    buttons=[],
                    height=HEIGHT,
                    alt_text="The image to edit",
                    elem_id="image",
                )
                instruction = gr.Textbox(
                    label="Instruction",
                    placeholder="What should change? Enter edits the image",
                    max_lines=4,
                    max_length=2000,
                    elem_id="instruction",
                )
                start = gr.Button("Edit", variant="primary", elem_id="edit")
                with gr.Accordion("SamplingSettings", open=False, elem_id="settings"):
                    guidance = gr.Slider(
                        0,
                        max(20, 2 * settings.guidance_scale),
                        settings.guidance_scale,
                        step=0.1,
                        label="Guidance",
                        info="How much the instruction counts",
                        elem_id="guidance",
                    )
                    image_guidance = gr.Slider(
                        0,
                        max(5, 2 * settings.image_guidance_scale),
                        settings.image_guidance_scale,
                        step=0.05,
                        label="Image guidance",
                        info="How much is kept of the image",
                        elem_id="image-guidance",
                    )
                    steps = gr.Slider(
                        1,
                        max(max_steps, settings.num_inference_steps),
                        settings.num_inference_steps,
                        step=1,
                        label="Steps",
                        info="More take longer",
                        elem_id="steps",
                    )
                    with gr.Row(elem_id="seed-row"):
                        seed = gr.Number(
                            0, label="Seed", precision=0, minimum=0, scale=3, elem_id="seed"
                        )
                        draw = gr.Button("Random", size="sm", min_width=80, elem_id="random")
            with gr.Column(min_width=300):
                result = gr.ImageSlider(
                    label="Before and after",
                    type="filepath",
                    format="png",
                    interactive=False,
                    buttons=["fullscreen"],
                    max_height=HEIGHT,
                    elem_id="result",
                )
                caption = gr.Markdown(elem_id="caption")
                with gr.Row():
                    again = gr.Button(
                        "Use as input", interactive=False, min_width=120, elem_id="again"
                    )
                    save = gr.DownloadButton(
                        "Download PNG", interactive=False, min_width=120, elem_id="save"
                    )
        gallery = gr.Gallery(
            label="History",
            fit_columns=False,
            height="auto",
            object_fit="cover",
            allow_preview=False,
            buttons=[],
            format="png",
            interactive=False,
            visible=False,
            elem_id="history",
        )
        answer = [result, caption, again, save, shown]
        choices = [image, instruction, seed, guidance, image_guidance, steps]

        def run(*given: Any) -> list[Any]:
            *values, before = given
            done = _edited(edit, read, *values)
            kept = (done, *before)[:HISTORY]
            tiles = [(it.thumbnail, f"{it.instruction} · seed {it.seed}") for it in kept]
            # None is chosen in the new row, or the old one would seem to be shown.
            return [*_shown(done), kept, gr.Gallery(tiles, visible=True, selected_index=None)]

        def recall(kept: tuple[_Edit, ...], choice: gr.SelectData) -> list[Any]:
            it = kept[choice.index]
            scales = [it.guidance_scale, it.image_guidance_scale]
            return [*_shown(it), it.upload, it.instruction, it.seed, *scales, it.steps]

        gr.on(
            [start.click, instruction.submit],
            run,
            [*choices, history],
            [*answer, history, gallery],
            preprocess=False,  # Gradio would open the file with whatever Pillow knows
            show_progress="full",
            show_progress_on=result,
            scroll_to_output=True,
            trigger_mode="once",
            concurrency_limit=TOGETHER,
            api_visibility="private",
        )
        for event, function, inputs, outputs in (
            (gallery.select, recall, [history], [*answer, *choices]),
            (again.click, lambda it: [it.files[1], ""], [shown], [image, instruction]),
            (draw.click, lambda: random.randrange(SEEDS), [], [seed]),
        ):
            event(
                function,
                inputs,
                outputs,
                show_progress="hidden",
                concurrency_limit=None,
                api_visibility="private",
            )
    blocks.queue(api_open=False, max_size=2 * TOGETHER)
    return blocks


def _plain(words: str) -> str:
    """Words that Markdown shall show as they are."""
    return re.sub(r"([^\w\s])", r"\\\1", " ".join(words.split()))


def _shown(it: _Edit) -> list[Any]:
    """What is said of an edit: both images, a line of settings, the buttons, the edit itself."""
    active = gr.Button(interactive=True)
    return [
        it.files,
        it.settings,
        active,
        gr.DownloadButton(value=it.files[1], interactive=True),
        it,
    ]


def _edited(edit: EditImage, read: Read, upload: Any, instruction: Any, *numbers: Any) -> _Edit:
    """An edit of what the browser sent, which may be anything."""
    if not isinstance(upload, dict) or not upload.get("path"):
        raise _refused("Choose an image first.")
    if not isinstance(instruction, str) or not instruction.strip():
        raise _refused("Write what should change.")
    try:
        seed, guidance, image_guidance, steps = (float(it) for it in numbers)
        seed, steps = int(seed), int(steps)
    except (TypeError, ValueError, OverflowError):
        raise _refused("Seed, steps and both guidances are numbers.") from None
    instruction = instruction.strip()
    try:
        before = read(Path(upload["path"]).read_bytes())
        after = edit(before, instruction, seed, guidance, image_guidance, steps)
    except FileNotFoundError:
        raise _refused("The image is no longer on the server: upload it again.") from None
    except UndecodableImage as error:
        raise _refused(f"The image cannot be read: {error}.") from None
    except ReasonpixError as error:
        raise _refused(str(error)) from None
    except Exception as error:
        _log.exception("an edit of the page failed")
        raise _refused("The server failed to edit the image; its log says why.") from error
    small = after.copy()
    small.thumbnail((320, 320))
    names = ("before", f"edit-seed-{seed}", "small")
    files = [encode_png(picture) for picture in (before, after, small)]
    make_room(Path(get_upload_folder()), sum(map(len, files)))
    folder = Path(get_upload_folder()) / uuid4().hex
    folder.mkdir(parents=True)
    paths = [folder / f"{name}.png" for name in names]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    shown = (str(paths[0]), str(paths[1]))
    scales = (guidance, image_guidance)
    return _Edit(upload["path"], shown, str(paths[2]), instruction, seed, *scales, steps)


def _refused(words: str) -> gr.Error:
    # They are shown as HTML.
    return gr.Error(html.escape(words), print_exception=False)


def mount(
    app: FastAPI,
    edit: EditImage,
    settings: SamplingSettings,
    title: str,
    *,
    token: str | None = None,
    max_bytes: int = 20 * 2**20,
    max_steps: int = 200,
    read: Read = decode,
) -> Callable[[], None]:
    """Serve the page at `/` of `app`, for the paths that no other route of `app` has.

    With a `token` the page is behind a login: any user name, the token as the password. Uploads
    have `max_bytes` at most. Call what is returned when the server is to stop, from any thread: it
    ends the pages' open connections, which would otherwise be waited for.
    """
    folder = _own_folder()
    blocks = page(edit, settings, title, max_steps=max_steps, read=read)
    blocks.state_session_capacity = SESSIONS
    inner = FastAPI()
    gr.mount_gradio_app(
        inner,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        auth=(lambda user, given: _same(given, token)) if token else None,
        auth_message="Any user name; the password is the server's token." if token else None,
        show_error=False,
        max_file_size=max_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Base(
            primary_hue="blue",
            neutral_hue="zinc",
            radius_size="lg",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ).set(
            button_primary_background_fill="*primary_600",
            button_primary_background_fill_hover="*primary_700",
            button_primary_background_fill_dark="*primary_600",
            button_primary_background_fill_hover_dark="*primary_700",
        ),
        css_paths=_STYLE,
    )
    # Gradio looks at the paths that clients name only when it was launched by itself.
    blocks.has_launched = True
    gradio = inner.routes[-1].app  # type: ignore[attr-defined]
    app.router.routes.append(PageRoute("", Gate(gradio, folder, max_bytes)))
    loops: list[asyncio.AbstractEventLoop] = []
    outer = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with outer(app) as state, inner.router.lifespan_context(inner):
            loops.append(asyncio.get_running_loop())
            yield state
        shutil.rmtree(folder, ignore_errors=True)

    app.router.lifespan_context = lifespan

    def stop() -> None:
        for loop in loops:
            loop.call_soon_threadsafe(gradio.stop_event.set)

    return stop


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _own_folder() -> Path:
    """Where uploads and results lie: nobody else's, and gone with the process."""
    folder = tempfile.mkdtemp(prefix="reasonpix-", dir=os.environ.get("GRADIO_TEMP_DIR"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # Gradio reads it from there alone, whenever it makes a component anew.
    os.environ["GRADIO_TEMP_DIR"] = str(Path(folder).resolve())
    return Path(folder).resolve()
