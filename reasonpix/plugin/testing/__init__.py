"""Contract tests for plugin authors: what a component of each slot must satisfy.

A contract is a class of pytest tests. Subclass it, name your component, and run pytest:

```python
from reasonpix.plugin.testing import CaptionerContract

class TestMyCaptioner(CaptionerContract):
    component = MyCaptioner
    options = {"model": "tests/tiny"}
```
"""

from reasonpix.plugin.testing.base import ComponentContract, photographs
from reasonpix.plugin.testing.data import ScorerContract, SourceContract
from reasonpix.plugin.testing.editing import EditorContract, MethodContract
from reasonpix.plugin.testing.perception import (
    CaptionerContract,
    EncoderContract,
    EntityExtractorContract,
    GrounderContract,
)
from reasonpix.plugin.testing.planning import PlannerContract

__all__ = [
    "CaptionerContract",
    "ComponentContract",
    "EditorContract",
    "EncoderContract",
    "EntityExtractorContract",
    "GrounderContract",
    "MethodContract",
    "PlannerContract",
    "ScorerContract",
    "SourceContract",
    "photographs",
]
