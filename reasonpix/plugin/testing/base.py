"""What every component must satisfy, whatever its slot."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from reasonpix.plugin.components import Component


def photographs() -> list[Image.Image]:
    """RGB images of awkward shapes: wide, tall, tiny and odd-sized, the same in every run."""
    rng = np.random.default_rng(0)
    sizes = [(64, 64), (101, 37), (33, 97), (17, 16), (128, 80)]
    return [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).resize((w, h))
        for w, h in sizes
    ]


def middle(width: int, height: int) -> dict[str, Any]:
    """The fields of a `Box` in the middle of an image of this size."""
    return {
        "x0": width / 4,
        "y0": height / 4,
        "x1": width * 0.8,
        "y1": height * 0.7,
        "width": width,
        "height": height,
    }


class ComponentContract:
    """The base of all contracts. `component` and `options` select what is tested."""

    component: ClassVar[type[Component[Any]]]
    options: ClassVar[Mapping[str, Any]] = {}

    @cached_property
    def subject(self) -> Any:
        """The component, loaded."""
        subject = self.component(self.component.Options.model_validate(dict(self.options)))
        subject.load()
        return subject

    def test_options_have_descriptions(self) -> None:
        """Every option has a description."""
        for name, field in self.component.Options.model_fields.items():
            assert field.description, f"option {name} has no description"

    def test_excluded_options_exist(self) -> None:
        """`fingerprint_exclude` names only options that exist."""
        options = self.component.Options
        assert options.fingerprint_exclude <= set(options.model_fields)

    def test_fingerprint_facts_are_json(self) -> None:
        """What enters a fingerprint can be serialized as JSON."""
        json.dumps(dict(self.subject.fingerprint_facts()))

    def test_importing_is_light(self) -> None:
        """Importing the plugin imports no torch, transformers, diffusers or spacy."""
        heavy = {"torch", "transformers", "diffusers", "spacy", "datasets", "openai"}
        code = f"import sys, {self.component.__module__}; print(*set(sys.modules) & {heavy})"
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        imported = process.stdout.strip()
        assert not imported, f"importing the plugin imports {imported}: import it in load()"

    def test_closing_twice(self) -> None:
        """An interrupted run may close a component twice; the second call does nothing."""
        _assert_no_error(self.subject.close, "the first time")
        _assert_no_error(self.subject.close, "the second time")

    def test_closing_without_load(self) -> None:
        """A component can be closed if it was never loaded, or if loading it failed."""
        _assert_no_error(self.component(self.subject.options).close, "without load()")

    def results(self, method: Callable[..., Any], *batches: Sequence[Any]) -> list[Any]:
        """The results of `method` for a batch, after checking that items do not interact.

        Each result must equal that of its item alone, and must not depend on the batch's order.
        """
        results = method(*batches)
        assert len(results) == len(batches[0])
        reverse_order = method(*(list(reversed(batch)) for batch in batches))
        for i, result in enumerate(results):
            alone = method(*([batch[i]] for batch in batches))
            assert _equal(alone[0], result), f"item {i} differs alone and in a batch"
            message = f"item {i} depends on the order of the batch"
            assert _equal(reverse_order[-1 - i], result), message
        return list(results)


def _assert_no_error(close: Callable[[], None], when: str) -> None:
    try:
        close()
    except Exception as error:
        raise AssertionError(f"close() {when} raises {type(error).__name__}: {error}") from error


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Image.Image) and isinstance(second, Image.Image):
        return first.size == second.size and first.tobytes() == second.tobytes()
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return first.shape == second.shape and bool((first == second).all())
    return bool(first == second)
