# SPDX-License-Identifier: AGPL-3.0-or-later

"""Those of Heretic 1.4's helpers that 2.0 still has, and loading lists of datasets."""

from typing import Any

from datasets import load_dataset

from .released import released

RELEASED = released("utils")
Prompt = RELEASED.Prompt
batchify = RELEASED.batchify
format_duration = RELEASED.format_duration
format_exception = RELEASED.format_exception
is_hf_path = RELEASED.is_hf_path
print = RELEASED.print


def load_prompts(settings: Any, specification: Any) -> list[Any]:
    if isinstance(specification, list):
        return [prompt for single in specification for prompt in load_prompts(settings, single)]
    # A test in the process of Heretic 1.4 has 1.4's own specifications.
    if getattr(specification, "config", None) is None:
        return list(RELEASED.load_prompts(settings, specification))
    dataset = load_dataset(
        specification.dataset, name=specification.config, split=specification.split
    )
    system = specification.system_prompt
    return [
        Prompt(system=settings.system_prompt if system is None else system, user=text)
        for text in dataset[specification.column]
    ]


def format_dataset_specification(specification: Any) -> str:
    if isinstance(specification, list):
        return ", ".join(single.dataset for single in specification)
    return str(specification.dataset)
