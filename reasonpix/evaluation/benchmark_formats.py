"""Formats of benchmarks: tables of pairs, MagicBrush's test folder, SmartEdit's Reason-Edit.

Each reader yields drafts of cases: their texts, and functions that read their images.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from reasonpix.core.files.encodings import read_text
from reasonpix.core.files.ignored import IgnoredCounts, why_hidden
from reasonpix.datasets.reader import PairReader
from reasonpix.errors import SourceError
from reasonpix.evaluation.cases import DIRECT
from reasonpix.evaluation.magicbrush_captions import GLOBAL, LOCAL, MagicBrushCaptions
from reasonpix.generation.components.file_source import file_bytes, others_under, read_json_mapping

REASONING = "reasoning"
"""The kind of instruction that only hints at the target."""

ReadImage = Callable[[], bytes]
"""Returns an encoded image. Raises `OSError`."""


@dataclass(frozen=True)
class Draft:
    """A row of a benchmark, unchecked. Missing cells are None."""

    row: str
    """The file and the row in it, for messages."""
    id: str
    instructions: Mapping[str, object]
    """By kind."""
    input: ReadImage
    truth: ReadImage | None = None
    mask: ReadImage | None = None
    caption: object = None
    edited_caption: object = None
    local_caption: str | None = None
    """MagicBrush's local description, see `Case`."""
    target: object = None
    box: object = None
    """XYXY in pixels of the input image."""
    groups: Mapping[str, str] = field(default_factory=dict)


DraftRow = Draft | tuple[str, str]
"""A draft, or a row's name and why it cannot be read."""


# -- Tables of pairs ------------------------------------------------------------------------------

_FACTS = ("record_id", "caption", "edited_caption", "selected", "target", "box")
_TURN = ("img_id", "turn_index")


def table(
    rows: PairReader,
    instructions: Mapping[str, str] | None,
    captions: MagicBrushCaptions | None,
) -> Iterator[DraftRow]:
    """Tables of `reasonpix benchmark` and `publish`, and others, such as MagicBrush's on the hub.

    `instructions` are columns by kind; by default direct and reasoning for a dataset of reasonpix,
    and direct for others. `captions` needs MagicBrush's columns `img_id` and `turn_index`.
    """
    kinds = instructions or _kinds(rows)
    rows.require(list(kinds.values()))
    columns = [name for name in (*_FACTS, *_TURN) if name in rows.columns]
    if captions is not None and not set(_TURN) <= set(columns):
        raise SourceError(
            f"captions: {rows.where} lacks the columns img_id and turn_index to look them up by"
        )
    read = list(dict.fromkeys([*kinds.values(), *columns]))
    try:
        for number, cells in enumerate(rows.texts(read)):
            name = rows.name(number)
            if isinstance(cells, OSError):
                yield name, str(cells)
                continue
            texts = {kind: cells[column] for kind, column in kinds.items()}
            try:
                turn = _turn(cells, captions) if set(_TURN) <= set(columns) else {}
            except (OSError, ValueError) as error:
                yield name, str(error)
                continue
            yield Draft(
                row=name,
                instructions=texts,
                input=partial(_read_pair_image, rows, number, 0),
                truth=partial(_read_pair_image, rows, number, 1),
                mask=partial(rows.mask, number) if rows.has_masks else None,
                target=cells.get("target"),
                box=cells.get("box"),
                **({"id": f"row-{number:06d}"} | _own_facts(cells) | turn),
            )
    finally:  # a limit may end it early
        rows.log_ignored(read)


def _kinds(rows: PairReader) -> Mapping[str, str]:
    if "direct_instruction" in rows.columns:
        return {DIRECT: "direct_instruction", REASONING: rows.instruction}
    return {DIRECT: rows.instruction}


def _read_pair_image(rows: PairReader, number: int, index: int) -> bytes:
    return rows.images(number)[index]


def _own_facts(cells: Mapping[str, Any]) -> dict[str, Any]:
    """From the columns of a reasonpix dataset."""
    selected, target = cells.get("selected"), cells.get("target")
    own: dict[str, Any] = {name: cells.get(name) for name in ("caption", "edited_caption")}
    if cells.get("record_id") is not None:
        own["id"] = str(cells["record_id"])
    if selected and target:
        own["groups"] = {"category": str(selected), "edit": f"{selected} → {target}"}
    return own


def _turn(cells: Mapping[str, Any], captions: MagicBrushCaptions | None) -> dict[str, Any]:
    """From MagicBrush's columns. Raises `OSError` and `ValueError`."""
    if missing := [name for name in _TURN if cells[name] is None]:
        raise OSError(f"has no {' and no '.join(missing)}")
    image, turn = str(cells["img_id"]), int(cells["turn_index"])
    facts: dict[str, Any] = {"id": f"{image}-{turn}", "groups": {"turn": str(turn)}}
    if captions:
        before = f"{image}-output{turn - 1}.png" if turn > 1 else f"{image}-input.png"
        facts |= captions.of(image, before, f"{image}-output{turn}.png")
    return facts


# -- The user's own images ------------------------------------------------------------------------


def own_images(images: Sequence[tuple[Path, str]]) -> Iterator[DraftRow]:
    """Files with an instruction each, without a ground truth."""
    for number, (path, instruction) in enumerate(images, 1):
        yield Draft(
            row=f"images {number}: {path.name}",
            id=f"{number:02}-{path.stem}",
            instructions={REASONING: instruction},
            input=partial(_file, path),
        )


# -- MagicBrush -----------------------------------------------------------------------------------

SESSIONS = "edit_sessions.json"


def magicbrush(where: str, folder: Path, captions: MagicBrushCaptions) -> Iterator[DraftRow]:
    """The folder of MagicBrush's test set (OSU-NLP-Group/MagicBrush).

    ```
    edit_sessions.json         {image: [{"input", "mask", "output", "instruction"}, …]}, by turns
    local_descriptions.json    see `magicbrush_captions`
    global_descriptions.json
    images/<image>/<file>      139-input.png, 139-mask1.png, 139-output1.png, …
    ```

    Every turn is a case. Its input is the previous turn's output, as in the single-turn setting of
    MagicBrush's evaluation.
    """
    known = {SESSIONS, LOCAL, GLOBAL}
    for image, turns in read_json_mapping(folder / SESSIONS, "expected {image: [turn, …]}").items():
        for number, turn in enumerate(turns if isinstance(turns, list) else [turns], 1):
            shown = image.encode(
                errors="backslashreplace"
            ).decode()  # lone surrogates cannot be printed
            name = f"{where}/{SESSIONS} {shown} turn {number}"
            if isinstance(turn, dict):
                files = (turn.get(key) for key in ("input", "mask", "output"))
                known.update(f"images/{image}/{file}" for file in files)
            try:
                yield _session_turn(folder / "images" / image, name, image, number, turn, captions)
            except OSError as error:
                yield name, str(error)
    _log_others(where, folder, known, f"a file that {SESSIONS} does not name")


def _session_turn(
    folder: Path, name: str, image: str, number: int, turn: Any, captions: MagicBrushCaptions
) -> Draft:
    files = [turn.get(key) if isinstance(turn, dict) else None for key in ("input", "output")]
    missing = [key for key, file in zip(("input", "output"), files, strict=True) if not file]
    if missing:
        raise OSError(f"names no {' and no '.join(missing)}")
    before, after = map(str, files)
    return Draft(
        row=name,
        id=f"{image}-{number}",
        instructions={DIRECT: turn.get("instruction")},
        input=partial(_file, folder / before),
        truth=partial(_file, folder / after),
        mask=partial(_file, folder / str(turn["mask"])) if turn.get("mask") else None,
        groups={"turn": str(number)},
        **captions.of(image, before, after),
    )


# -- Reason-Edit ----------------------------------------------------------------------------------

_MASK = "_mask.jpg"
"""Suffix of a mask's file name, after the name of its image."""

_CLIP = "CLIP:"
"""Separates the instruction from the target, which CLIP should find in the mask."""

_SCENARIOS = {
    "1-Left-Right": "Left_Right_text.txt",
    "2-Relative-Size": "Size_text.txt",
    "3-Mirror": "Mirror_text.txt",
    "4-Color": "Color_text.txt",
    "5-Multiple-Objects": "MultipleObjects_text.txt",
    "6-Reasoning": "Reason_test.txt",
}
"""The folders of Reason-Edit, and their text files."""


def scenarios(folder: Path) -> dict[str, Path]:
    """The folders of Reason-Edit by name: among `folder`, its subfolders, and theirs.

    SmartEdit's scripts search for the first five at any depth.
    """
    inside = _folders(folder)
    places = [folder, *inside]
    if any(
        place.name in _SCENARIOS for place in places
    ):  # otherwise it is another folder, perhaps a large one
        places += [deeper for place in inside for deeper in _folders(place)]
    scenario_folders = {place.name: place for place in reversed(places) if place.name in _SCENARIOS}
    return dict(sorted(scenario_folders.items()))


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def reason_edit(where: str, folder: Path) -> Iterator[DraftRow]:
    """Reason-Edit, the benchmark of SmartEdit (TencentARC/SmartEdit, test/metrics_evaluation.py).

    ```
    1-Left-Right/001.png …           the images
                 001_mask.jpg …      white: where the edit may change them
                 Left_Right_text.txt a line for each image: `instruction CLIP: target`
    2-Relative-Size … 6-Reasoning    the same, with a text file of another name
    ```

    Lines and masks are matched to images by the order of the images' names, as in SmartEdit's own
    scripts; but 10_mask.jpg, which sorts before 1_mask.jpg, comes after it as 10.png does. There
    are no ground-truth images.
    """
    known: set[str] = set()
    for scenario, place in scenarios(folder).items():
        images = _visible(place, ".png")
        masks = sorted(_visible(place, _MASK), key=_marked_image)
        text = place / _SCENARIOS[scenario]
        lines = _lines(text)
        known.update(os.path.relpath(path, folder) for path in (*images, *masks, text))
        if len(lines) != len(images) or len(masks) not in (0, len(images)):
            raise SourceError(
                f"{where}/{scenario}: {len(images)} images (*.png), {len(masks)} masks "
                f"(*{_MASK}) and {len(lines)} lines in {text.name}; they are matched by order, so "
                "there must be the same number of each"
            )
        for number, (image, line) in enumerate(zip(images, lines, strict=True)):
            instruction, _, target = line.partition(_CLIP)
            yield Draft(
                row=f"{where}/{scenario}/{text.name} line {number + 1}",
                id=f"{scenario}-{image.stem}",
                instructions={REASONING: instruction.strip()},
                input=partial(_file, image),
                mask=partial(_file, masks[number]) if masks else None,
                target=target.strip() or None,
                groups={"scenario": scenario},
            )
    _log_others(where, folder, known, "not an image, mask or text of a scenario")


def _visible(folder: Path, ending: str) -> list[Path]:
    """The files with this suffix, sorted; hidden ones are left by file managers."""
    return sorted(path for path in folder.glob(f"*{ending}") if not why_hidden(path.name))


def _marked_image(mask: Path) -> str:
    return f"{mask.name.removesuffix(_MASK)}.png"


def _log_others(where: str, folder: Path, known: Collection[str], reason: str) -> None:
    """Name the files of the benchmark that are not read."""
    counts = IgnoredCounts()
    counts.add(*others_under(folder, known, reason))
    counts.log(where)


# -- Files ----------------------------------------------------------------------------------------


def _lines(path: Path) -> list[str]:
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be read: {error}") from error
    return text.rstrip().split("\n")


def _file(path: Path) -> bytes:
    try:
        return file_bytes(path)
    except OSError as error:
        raise OSError(f"{path.name}: {error.strerror}") from error
    except ValueError as error:  # such as a null byte in the name
        raise OSError(f"{path.name!r}: {error}") from error
