"""A planner that answers as a language model would, and counts what it is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Distribution

PARROT = """
import json
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.llm.types import Completion
from reasonpix.llm.planner import LLMPlanner, LLMPlannerOptions


class ParrotOptions(LLMPlannerOptions):
    fingerprint_exclude: ClassVar = LLMPlannerOptions.fingerprint_exclude | {"log", "batch"}
    log: str = Field(description="Where it notes what it was asked")
    batch: bool = Field(False, description="Whether it answers in jobs")


class Parrot(LLMPlanner[ParrotOptions]):
    "Plans what is in the picture already; asked again, it mends that."

    name = "parrot"
    Options = ParrotOptions

    @property
    def jobs(self):
        return self.options.batch

    def load(self):
        self.is_loaded = True

    def complete(self, conversations):
        assert self.is_loaded
        with open(self.options.log, "a") as log:
            log.write("asked\\n" * len(conversations))
        return [self.say(conversation) for conversation in conversations]

    def say(self, conversation):
        fields = conversation.answer_schema["properties"]
        sweet = "Something sweet, please."
        if "target" in fields:
            is_repair = '"target": "bee"' in conversation.messages[-2].content
            target = "pear" if is_repair else "bee"
            answer = {"selected": "bee", "target": target, "instruction": sweet,
                      "selected_synonyms": [], "target_synonyms": []}
        elif "best" in fields:
            answer = {"best": 1}
        else:
            answer = {"revealing": [], "instruction": f"{sweet} {conversation.seed % 1000}"}
        return Completion(text=json.dumps(answer), prompt_tokens=1000, completion_tokens=20)


@hookimpl
def planners():
    return [Parrot]
"""

PRICE = {"prompt": 1.0, "completion": 10.0}


@pytest.fixture
def parrot(distribution: Distribution, tmp_path: Path) -> dict[str, object]:
    distribution("parrot", {"parrot": "parrot_plugin"}, parrot_plugin=PARROT)
    return {"use": "parrot", "log": str(tmp_path / "asked.txt"), "price": PRICE}


def asked(tmp_path: Path) -> int:
    log = tmp_path / "asked.txt"
    return len(log.read_text().splitlines()) if log.exists() else 0
