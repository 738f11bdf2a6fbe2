"""The images that a model is made for, and a warning when a run uses it on others.

A folder of weights says it in `intended_images.json`:

```json
{"domain": "sticker-world", "description": "scenes of the sticker world"}
```

A source says what it gives by `Source.domain`, and a published dataset by `image_domain` at the top
of its README.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, ValidationError

from reasonpix.core.files.encodings import read_front_matter
from reasonpix.errors import WeightsError, problems_of
from reasonpix.plugin.model_files import find_cached, read_json_file
from reasonpix.plugin.types import Record

if TYPE_CHECKING:
    from reasonpix.plugin.components import ModelOptions

FILE = "intended_images.json"
CARD_KEY = "image_domain"
"""Key at the top of a dataset's README.md."""


class IntendedImages(Record):
    """The images that a model is made for."""

    domain: str = Field(min_length=1)
    """Name that is compared with that of a source, such as "sticker-world"."""
    description: str = Field(min_length=1)
    """Text for messages, in the plural."""


def read_intended_images(options: ModelOptions) -> IntendedImages | None:
    """The images that `options.model`, a folder or a cached hub id, is made for; None for any.

    Raises `WeightsError` if the file is damaged.
    """
    file = find_cached(options, FILE)
    if file is None:
        return None
    try:
        return IntendedImages.model_validate(read_json_file(file, options, FILE))
    except ValidationError as error:
        raise WeightsError(
            f"model: {FILE} of {options.model!r}: {problems_of(error)[0]}; it needs `domain` and "
            "`description`"
        ) from error


def domain_of_dataset(path: str | Path) -> str:
    """The domain of the images of a published dataset in a folder; empty if it is unknown."""
    domain = read_front_matter(Path(path, "README.md")).get(CARD_KEY)
    return domain if isinstance(domain, str) else ""


def domain_warnings(
    made_for: Iterable[tuple[str, IntendedImages | None]], domain: str, images: str
) -> list[str]:
    """A line for each kind of intended images that `images`, of `domain`, may not be.

    `made_for` are the names of models with what they are made for.
    """
    names: dict[IntendedImages, dict[str, None]] = {}
    for name, intended in made_for:
        if intended is not None and intended.domain != domain:
            names.setdefault(intended, {})[name] = None
    return [
        f"{', '.join(models)}: made for {intended.description} only; if {images} show something "
        "else, the results are meaningless, and filters do not detect it"
        for intended, models in names.items()
    ]
