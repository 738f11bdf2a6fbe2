"""How well mini/clip and mini/dino tell scenes of the test split apart.

python -c "from reasonpix_mini.measure.embeddings import measure; print(measure(200))"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from reasonpix_mini import stickers, world

Vectors = NDArray[np.float32]
"""Unit vectors, one a row."""

_CHECKPOINTS = Path(str(resources.files("reasonpix_mini"))) / "checkpoints"


@dataclass(frozen=True)
class Clip:
    """mini/clip."""

    images: Callable[[Sequence[world.Scene | Image.Image]], Vectors]
    texts: Callable[[Sequence[str]], Vectors]


def clip() -> Clip:
    """Load mini/clip as any CLIP of transformers."""
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    folder = _CHECKPOINTS / "clip"
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def images(pictures: Sequence[world.Scene | Image.Image]) -> Vectors:
        inputs = processor(list(map(_image, pictures)), return_tensors="pt")
        return _unit(model.get_image_features(**inputs).pooler_output.numpy())

    @torch.inference_mode()
    def texts(captions: Sequence[str]) -> Vectors:
        inputs = tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt")
        return _unit(model.get_text_features(**inputs).pooler_output.numpy())

    return Clip(images, texts)


def dino() -> Callable[[Sequence[world.Scene | Image.Image]], Vectors]:
    """Load mini/dino as any ViT of transformers: pictures to the states of their CLS tokens."""
    import torch
    from transformers import AutoImageProcessor, ViTModel

    folder = _CHECKPOINTS / "dino"
    model = ViTModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

    def embed(pictures: Sequence[world.Scene | Image.Image]) -> Vectors:
        inputs = processor(list(map(_image, pictures)), return_tensors="pt")
        with torch.inference_mode():
            return _unit(model(**inputs).last_hidden_state[:, 0].numpy())

    return embed


def _image(picture: world.Scene | Image.Image) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture.render())


def _unit(rows: Vectors) -> Vectors:
    unit: Vectors = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


@dataclass(frozen=True)
class Edits:
    """Scenes with their edits, and what could be taken for the edits."""

    before: list[world.Scene]
    after: list[world.Scene]
    redrawn: list[Image.Image]
    """`after` through the VAE of mini/gligen, as an editing model would draw it at best."""
    mistaken: list[world.Scene]
    """In the place of what should come, something else of its group."""


def edits(split: world.Split, scenes: int) -> Edits:
    """The edits of the first scenes of a split."""
    before = [world.scene(split, index) for index in range(scenes)]
    words = [stickers.edit(scene) for scene in before]
    after = [edit.after for edit in words]
    mistaken = [
        edit.after.replaced(edit.position, _other(scene, edit.after, edit.position))
        for scene, edit in zip(before, words, strict=True)
    ]
    return Edits(before, after, _redrawn(after), mistaken)


def _other(before: world.Scene, after: world.Scene, position: int) -> str:
    """A category of the target's group that is in neither scene, where there is one left."""
    target = after.placements[position].category
    group = world.categories()[target].group
    others = [c.name for c in world.categories().values() if c.group == group and c.name != target]
    absent = [name for name in others if name not in {*before.names, *after.names}]
    return str(np.random.default_rng([31, before.index]).choice(absent or others))


def _redrawn(scenes: Sequence[world.Scene]) -> list[Image.Image]:
    import torch
    from diffusers import AutoencoderKL

    from reasonpix_mini.training.vae import to_pixels, to_tensor

    vae = AutoencoderKL.from_pretrained(_CHECKPOINTS / "gligen", subfolder="vae")
    pictures = []
    with torch.inference_mode():
        for scene in scenes:
            latents = vae.encode(to_tensor(scene.render()[None])).latent_dist.mode()
            pictures.append(Image.fromarray(to_pixels(vae.decode(latents).sample)[0]))
    return pictures


def measure(scenes: int = 200, split: world.Split = "test") -> dict[str, float]:
    """Shares in [0, 1] over `scenes` scenes and their edits: one object replaced by its like.

    `clip_recall`: captions whose nearest picture, of all scenes, has that caption.
    `clip_zero_shot`: categories present that are among the `k` nearest of the 32 prompts "a bee",
    for a scene of `k` objects. `*_probe`: the same by ridge regression on the image embeddings of
    1,000 training scenes.
    `clip_t_ordered`: edits nearer to the edited caption than their input is.
    `*_i_over_input`: edits redrawn by a VAE that are nearer to the edit than the input is;
    `*_i_over_mistake`: … than the same edit with a wrong category of the group is.
    `*_neighbours`: scenes of one object each whose nearest neighbour shows the same category.
    """
    pairs = edits(split, scenes)
    language, silent = clip(), dino()
    captions = np.array([scene.caption for scene in pairs.before])
    near = (language.texts(list(captions)) @ language.images(pairs.before).T).argmax(1)
    prompts = language.texts([world.indefinite(name) for name in world.categories()])
    edited = language.texts([scene.caption for scene in pairs.after])
    true, unchanged = _likeness(edited, language.images, pairs.after, pairs.before)
    return {
        "clip_recall": float((captions[near] == captions).mean()),
        "clip_zero_shot": _found(language.images(pairs.before) @ prompts.T, pairs.before),
        "clip_t_ordered": float((true > unchanged).mean()),
        **{f"clip_{name}": value for name, value in _pictures(language.images, pairs).items()},
        **{f"dino_{name}": value for name, value in _pictures(silent, pairs).items()},
    }


def _pictures(
    images: Callable[[Sequence[world.Scene | Image.Image]], Vectors], pairs: Edits
) -> dict[str, float]:
    """The figures that need no words."""
    redrawn, unchanged, mistaken = _likeness(
        images(pairs.after), images, pairs.redrawn, pairs.before, pairs.mistaken
    )
    training = [world.scene("train", index) for index in range(1000)]
    split, count = pairs.before[0].split, len(pairs.before)
    single = [world.scene(split, index, objects=1) for index in range(count)]
    likeness = images(single) @ images(single).T
    np.fill_diagonal(likeness, -1)
    names = np.array([scene.names[0] for scene in single])
    return {
        "i_over_input": float((redrawn > unchanged).mean()),
        "i_over_mistake": float((redrawn > mistaken).mean()),
        "neighbours": float((names[likeness.argmax(1)] == names).mean()),
        "probe": _found(_probe(images(training), training, images(pairs.before)), pairs.before),
    }


def _likeness(
    references: Vectors,
    images: Callable[[Sequence[world.Scene | Image.Image]], Vectors],
    *candidates: Sequence[world.Scene | Image.Image],
) -> list[Vectors]:
    """For each list of candidates, the cosine of each with the reference of its row."""
    return [(references * images(pictures)).sum(1) for pictures in candidates]


def _present(scenes: Sequence[world.Scene]) -> NDArray[np.bool_]:
    """Which categories are in each scene: (scenes, categories)."""
    return np.array([[name in scene.names for name in world.categories()] for scene in scenes])


def _found(scores: Vectors, scenes: Sequence[world.Scene]) -> float:
    """Of the categories present, the share with one of the scene's `k` best scores for `k`."""
    rank = (-scores).argsort(1).argsort(1)
    present = _present(scenes)
    return float((rank < present.sum(1, keepdims=True))[present].mean())


def _probe(states: Vectors, scenes: Sequence[world.Scene], asked: Vectors) -> Vectors:
    """Scores (asked, categories) of a ridge regression fitted on the scenes' states."""
    centre = states.mean(0)
    known, wanted = states - centre, _present(scenes).astype(np.float32)
    # Small beside the states' variance, large enough where they hardly vary.
    ridge = 1e-3 * np.trace(known.T @ known) * np.eye(known.shape[1]) / known.shape[1]
    weights = np.linalg.solve(known.T @ known + ridge, known.T @ (wanted - wanted.mean(0)))
    return np.asarray((asked - centre) @ weights + wanted.mean(0), np.float32)
