"""The hooks a plugin may implement.

A plugin is a module named by an entry point of the group `reasonpix`:

```toml
[project.entry-points.reasonpix]
my-captioner = "my_package"
```

The entry point's name is the word after `use:` in a recipe and the `name` of the class. Each slot
has a hook that returns classes of components, such as

```python
@hookimpl
def captioners() -> list[type[Captioner]]:
    return [MyCaptioner]
```

A new slot comes from a module named by an entry point of the group `reasonpix.slots`, under the
slot's name. The module implements the hooks `slots` and, for what runs in the slot, `stages`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pluggy

from reasonpix.plugin.components import Component
from reasonpix.plugin.slots import SLOTS, SlotSpec
from reasonpix.plugin.stages import StageSpec

hookspec = pluggy.HookspecMarker("reasonpix")
hookimpl = pluggy.HookimplMarker("reasonpix")


@hookspec
def checkpoints() -> dict[str, Path]:  # type: ignore[empty-body]
    """Return the folders or files of weights this plugin carries, by names like `mini/blip2`."""


@hookspec
def slots() -> list[SlotSpec]:  # type: ignore[empty-body]
    """Return the slots this plugin adds to recipes."""


@hookspec
def stages() -> list[StageSpec]:  # type: ignore[empty-body]
    """Return the stages this plugin adds, each for a slot that it adds."""


def component_hooks(added: Mapping[str, SlotSpec]) -> dict[str, Callable[..., Any]]:
    """The hook specification of each slot, by the name of the hook."""
    return {slot.hook: _component_hook(slot) for slot in added.values() if not slot.filled_by}


def _component_hook(slot: SlotSpec) -> Callable[..., Any]:
    def offer() -> list[type[Component[Any]]]:  # type: ignore[empty-body]
        pass

    offer.__name__ = offer.__qualname__ = slot.hook
    offer.__doc__ = f"Return the classes this plugin offers for the slot `{slot.name}`."
    return hookspec(offer)


globals().update(component_hooks(SLOTS))
