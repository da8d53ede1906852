# SPDX-License-Identifier: AGPL-3.0-or-later

"""Prints the README's table of the plugin's options: `python examples/options_table.py`."""

import json
from typing import Any

from heretic_contrast.settings import ContrastSettings, PromptSource


def shown(value: Any) -> str:
    """Returns a default as it is written in TOML; nothing where it is unset."""

    return "unset" if value is None else f"`{json.dumps(value)}`"


def rows() -> list[str]:
    """Returns the lines of the table."""

    lines = ["| Option | Default | Meaning |", "| :----- | :------ | :------ |"]
    for name, field in ContrastSettings.model_fields.items():
        flag = name.replace("_", "-")
        description = " ".join(str(field.description).split())
        lines.append(f"| `--contrast.{flag}` | {shown(field.default)} | {description} |")
    lines.append("")
    names = ", ".join(f"`{name.replace('_', '-')}`" for name in PromptSource.model_fields)
    lines.append(
        f"The pools of prompts have fields of their own, such as `--contrast.bad-prompts.dataset`: {names}. "
        "[docs/prompts.md](docs/prompts.md) says what they may be."
    )
    return lines


if __name__ == "__main__":
    print("\n".join(rows()))
