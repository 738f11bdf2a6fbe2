"""How well the mini BLIP-2 captions scenes of the test split."""

from __future__ import annotations

import re
from importlib import resources

from reasonpix_mini import world


def mentioned(caption: str) -> list[str]:
    """The categories that a caption names, in its order, as often as it names them."""
    return [word for word in re.findall(r"[a-z]+", caption) if word in world.categories()]


def measure(scenes: int = 200) -> dict[str, float]:
    """Caption `scenes` test scenes with the plugin `blip2` and compare with what they show.

    Shares of scenes: `exact_set`, the caption names exactly the objects present, over all scenes
    and over those of 1, 2 and 3 objects; `exact_nouns`, the same, and names each only once ("a bee
    and a bee" is a right set and a wrong caption); `exact_caption`, the caption is the world's own,
    word for word, order included. Shares of categories: `recall` of those present, `precision` of
    those named.
    """
    from PIL import Image
    from reasonpix_blip2 import Blip2, Blip2Options

    from reasonpix.plugin import Caption

    folder = str(resources.files("reasonpix_mini") / "checkpoints" / "blip2")
    captioner = Blip2(Blip2Options(model=folder, device="cpu", batch_size=32))
    captioner.load()
    shown = [world.scene("test", index) for index in range(scenes)]
    results = captioner.caption([Image.fromarray(scene.render()) for scene in shown])
    captioner.close()
    texts = [result.text if isinstance(result, Caption) else "" for result in results]
    nouns = [mentioned(text) for text in texts]
    named = [set(words) for words in nouns]
    present = [set(scene.names) for scene in shown]
    found = sum(len(a & b) for a, b in zip(named, present, strict=True))

    def exact(objects: tuple[int, ...]) -> float:
        pairs = [(a, b) for a, b in zip(named, present, strict=True) if len(b) in objects]
        return sum(a == b for a, b in pairs) / max(1, len(pairs))

    return {
        "exact_set": exact((1, 2, 3)),
        "exact_set_1": exact((1,)),
        "exact_set_2": exact((2,)),
        "exact_set_3": exact((3,)),
        "exact_nouns": sum(
            sorted(words) == sorted(scene.names) for words, scene in zip(nouns, shown, strict=True)
        )
        / scenes,
        "exact_caption": sum(
            text == scene.caption for text, scene in zip(texts, shown, strict=True)
        )
        / scenes,
        "recall": found / sum(map(len, present)),
        "precision": found / max(1, sum(map(len, named))),
    }
