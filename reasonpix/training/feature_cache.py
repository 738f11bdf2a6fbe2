"""Features that are computed once and kept in a folder, which several runs may share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from reasonpix.core.atomic import write_atomically
from reasonpix.core.parallel import THREADS, Report, Size, prefetch, quiet
from reasonpix.core.tensor_store import SHARD, Shards
from reasonpix.datasets.pairs import ImagePair, Pairs
from reasonpix.datasets.views import largest_change
from reasonpix.errors import RunError
from reasonpix.plugin import registry
from reasonpix.plugin.spec import ComponentSpec
from reasonpix.plugin.types import Problem
from reasonpix.training.features import (
    VAE_IMAGES,
    VERSION,
    Feature,
    OnlineFeatures,
    PairView,
    Request,
    hash_of,
    vae_digest,
)

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_MANY_PROBLEMS = 10
"""Problems of the encoder that stop the computation early."""


class _Missing(NamedTuple):
    """What the cache lacks for one row."""

    example: int
    """Any example of the row."""
    states: list[tuple[int, list[int]]]
    """By view, the examples without h."""
    moments: list[int]
    """The views without latents."""


class _Pending:
    """Views that wait for a full batch, each key once: rows may be alike."""

    def __init__(self) -> None:
        self.states: list[tuple[str, Image.Image, str]] = []
        self.moments: list[tuple[str, ImagePair]] = []
        self._keys: set[str] = set()

    def add_states(self, key: str, image: Image.Image, instruction: str) -> None:
        if key not in self._keys:
            self._keys.add(key)
            self.states.append((key, image, instruction))

    def add_moments(self, key: str, images: ImagePair) -> None:
        if key not in self._keys:
            self._keys.add(key)
            self.moments.append((key, images))


def _change_key(latents: str) -> str:
    """The key of how much the edit changes, beside the key of its latents."""
    return f"{latents}-change"


class CachedFeatures:
    """Features that are computed once, stored in shards of `folder`, and read from there.

    ```
    folder/h-<fingerprint>/          states of the encoder, and encoder.json, which describes it
    folder/latents-<fingerprint>/    outputs of the VAE, and how much the edit changes
    ```
    A fingerprint covers the component with its version, options, prompt and weights; keys cover the
    image's bytes, the view and the instruction. So stale features are never read, and valid ones
    never computed twice. Folders of other fingerprints may be deleted at any time.
    """

    def __init__(
        self,
        folder: Path,
        pairs: Pairs,
        encoder: ComponentSpec,
        vae: AutoencoderKL,
        stride: int,
        batch: int = 32,
        size: Size = SHARD,
    ) -> None:
        self.pairs = pairs
        self._online = OnlineFeatures(pairs, encoder, vae, stride, batch)
        self._encoder_facts = registry.fingerprint_facts("encoder", encoder.name, encoder.options)
        self._fingerprints = (
            hash_of(VERSION, self._encoder_facts),
            hash_of(VERSION, vae_digest(vae)),
        )
        self._h = Shards(folder / f"h-{self._fingerprints[0][:12]}", size)
        self._latents = Shards(folder / f"latents-{self._fingerprints[1][:12]}", size)

    @property
    def fingerprint(self) -> str:
        """Digest of encoder and VAE, equal to that of `OnlineFeatures`."""
        return self._online.fingerprint

    def _keys(self, example: int, view: int) -> tuple[str, str]:
        """The keys of h and of the latents of a view."""
        pair, geometry = self.pairs.examples[example], self.pairs.geometry(example, view)
        square = (pair.input_image, *geometry, self.pairs.data.resolution)
        h, latents = self._fingerprints
        return (
            hash_of(h, square, self._online.stride, pair.instruction)[:32],
            hash_of(latents, square, pair.edited_image)[:32],
        )

    def compute(self, report: Report = quiet, rank: int = 0, world: int = 1) -> None:
        """Compute what is missing. `world` processes share the work, each with its own `rank`.

        A killed computation continues with the first unfinished shard. The encoder is loaded only
        if h is missing, and closed at the end. With `broken: stop` a broken image stops at once,
        with all broken rows in the error; problems of the encoder stop when there are many, or at
        the end. Raises `SourceError` for these, `RunError` if the folder cannot be written.
        """
        self._refresh()
        missing = list(self._missing(rank, world))
        if not missing:
            return
        facts = json.dumps(self._encoder_facts, indent=1, ensure_ascii=False, default=str)
        write_atomically(self._h.folder / "encoder.json", f"{facts}\n".encode())
        problems: dict[str, str] = {}  # by the key of h
        try:
            self._compute_rows(missing, problems, report)
        finally:
            self._online.close()
            for shards in (self._h, self._latents):
                shards.flush()
        self.pairs.skip(self._problems_by_row(problems))

    def _problems_by_row(self, problems: Mapping[str, str]) -> dict[str, str]:
        """The problem of each example; equal examples were encoded once and share it."""
        by_row: dict[str, str] = {}
        for number in self.pairs.usable() if problems else ():
            for view in range(self.pairs.views):
                if (key := self._keys(number, view)[0]) in problems:
                    example = self.pairs.examples[number]
                    by_row[f"{example.row} ({example.column})"] = problems[key]
        return by_row

    def _refresh(self) -> None:
        self._h.refresh()
        self._latents.refresh()

    def _missing(self, rank: int, world: int) -> Iterator[_Missing]:
        """What is missing, by row, so each image is decoded once for all views and instructions."""
        rows = groupby(self.pairs.usable(), lambda number: self.pairs.examples[number].row)
        for number, (_, group) in enumerate(rows):
            if number % world != rank:
                continue
            examples = list(group)
            states: list[tuple[int, list[int]]] = []
            moments: list[int] = []
            for view in range(self.pairs.views):
                keys = [(example, *self._keys(example, view)) for example in examples]
                if without_h := [example for example, key, _ in keys if key not in self._h]:
                    states.append((view, without_h))
                if not self._has_latents(keys[0][2]):
                    moments.append(view)
            if states or moments:
                yield _Missing(examples[0], states, moments)

    def _has_latents(self, key: str) -> bool:
        return key in self._latents and _change_key(key) in self._latents

    def _load(self, row: _Missing) -> tuple[_Missing, dict[int, PairView] | str]:
        """The row's views that are needed, or why its images cannot be used."""
        images = self.pairs.opened(row.example)
        if isinstance(images, str):
            return row, images
        views = {view for view, _ in row.states} | set(row.moments)
        return row, {view: self._online.cut(images, row.example, view) for view in views}

    def _compute_rows(
        self, rows: Sequence[_Missing], problems: dict[str, str], report: Report
    ) -> None:
        """Compute rows in full batches, and collect the encoder's `problems` by key."""
        stop = self.pairs.data.broken == "stop"
        pending = _Pending()
        for done, (row, views) in enumerate(prefetch(self._load, iter(rows), THREADS), 1):
            if isinstance(views, str):
                if stop:
                    self.pairs.check()  # raises, naming all broken rows
                self.pairs.skip({self.pairs.examples[row.example].row: views})
            else:
                self._enqueue(row, views, pending)
            self._compute_batches(pending, problems, last=done == len(rows))
            report(done, len(rows))
            if stop and len(problems) >= _MANY_PROBLEMS:
                return

    def _enqueue(self, row: _Missing, views: Mapping[int, PairView], pending: _Pending) -> None:
        for view, examples in row.states:
            for example in examples:
                instruction = self.pairs.examples[example].instruction
                pending.add_states(self._keys(example, view)[0], views[view].shown, instruction)
        for view in row.moments:
            squares = (views[view].before, views[view].after)
            pending.add_moments(self._keys(row.example, view)[1], squares)

    def _compute_batches(self, pending: _Pending, problems: dict[str, str], last: bool) -> None:
        """Compute all full batches, and after the last row also what remains."""
        size = self._online.batch
        while len(pending.states) >= size or (last and pending.states):
            keys, images, texts = zip(*pending.states[:size], strict=True)
            for key, h in zip(keys, self._online.states(images, texts), strict=True):
                if isinstance(h, Problem):
                    problems[key] = h.reason
                else:
                    self._h.add(key, h)
            del pending.states[:size]
        size = VAE_IMAGES // 2
        while len(pending.moments) >= size or (last and pending.moments):
            keys, pairs = zip(*pending.moments[:size], strict=True)
            for key, pair, latents in zip(keys, pairs, self._online.moments(pairs), strict=True):
                self._latents.add(key, latents)
                self._latents.add(_change_key(key), latents.new_tensor(largest_change(*pair)))
            del pending.moments[:size]

    def usable(self) -> list[int]:
        """The numbers of the examples that have features of all their views.

        Raises `RunError` if some are missing with `broken: stop`, or all of them.
        """
        self._refresh()
        candidates = self.pairs.usable()
        complete = [
            number
            for number in candidates
            if all(self._has(number, view) for view in range(self.pairs.views))
        ]
        if not complete or (self.pairs.data.broken == "stop" and len(complete) < len(candidates)):
            raise RunError(
                f"{self._h.folder.parent} lacks features of {len(candidates) - len(complete)} of "
                f"{len(candidates)} examples; compute them"
            )
        return complete

    def _has(self, example: int, view: int) -> bool:
        h, latents = self._keys(example, view)
        return h in self._h and self._has_latents(latents)

    def change(self, example: int, view: int) -> int:
        """`largest_change` of a view that has features."""
        return int(self._latents[_change_key(self._keys(example, view)[1])])

    def view(self, example: int, view: int) -> PairView:
        """A view of an example. Raises a `SourceError` that names the row."""
        return self._online.view(example, view)

    def get(self, requests: Sequence[Request]) -> list[Feature]:
        """Read the features of the views, in order. Raises `RunError` if any is missing."""
        features: list[Feature] = []
        for example, view in requests:
            h, latents = self._keys(example, view)
            try:
                features.append(Feature(self._h[h], *self._latents[latents]))
            except KeyError as error:
                raise RunError(
                    f"{self._h.folder.parent} lacks features of "
                    f"{self.pairs.examples[example].row}; compute them"
                ) from error
        return features
