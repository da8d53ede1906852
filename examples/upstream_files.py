# SPDX-License-Identifier: AGPL-3.0-or-later

"""Prints the tables of docs/upstream.md with the files of a default plugin: `python examples/upstream_files.py`."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "heretic_contrast"

MATHEMATICS = {
    "modifier.py": "the modifier itself",
    "settings.py": "its settings and presets",
    "search/parameters.py": "parameters of a trial, and their space",
    "directions/classes.py": "which classes get a direction of their own",
    "directions/baselines.py": "the contrast baselines",
    "directions/extraction.py": "from pools to class directions and what is ablated",
    "directions/transforms.py": "SVD, and what directions are compared with",
    "directions/directions.py": "the directions themselves",
    "directions/som.py": "self-organizing maps in the span of their samples",
    "directions/som_kernel.py": "their compiled training; imported when a map is trained, and needs Numba",
    "ablation/operator.py": "the ablation operator and its compositions",
    "ablation/writers.py": "what adds to the residual stream",
    "ablation/hooks.py": "ablation by hooks",
    "ablation/changes.py": "what adapters do not carry",
    "ablation/lora.py": "its exact LoRA factors",
    "vectors.py": "unit vectors",
}
"""The modifier and its mathematics, in the order that they are best read in."""

SUPPORT = {
    "hosts/surface.py": "all that is used of Heretic",
    "hosts/tables.py": "complaints about tables in `config.toml`",
    "hosts/unused.py": "what there has no effect",
    "hosts/lora_targets.py": "PEFT's targets in mixtures of experts",
    "directions/pools.py": "the pools that directions are fitted to",
    "prompts/__init__.py": "prompts with categories",
    "prompts/reading.py": "reading them, from the Hub or a disk",
    "prompts/rows.py": "what is read",
    "prompts/categories.py": "harm categories, by a word list",
    "builtin.py": "default pools, and those of the built-in refuser",
    "language_model.py": "a loaded model, and its residuals",
    "chat.py": "its chat format, as the model reads it",
    "weights.py": "weights in full precision, however they are stored",
    "offloading.py": "weights that are on disk or another device",
    "processes.py": "whether the process that left a file is gone",
    "identity.py": "what identifies a model, so that stored numbers are not those of another",
    "directions/residuals.py": "residuals, and keeping them on disk",
    "errors.py": "errors that are shown as one sentence",
    "files.py": "writing files whole or not at all",
}
"""What these need beside; some of it Heretic has in its own way."""

OPTIONAL = {
    "hosts/base.py": "the bases of plugins, where Heretic 1.4 has none",
    "prompts/formats.py": "the formats that files of prompts come in",
    "directions/file.py": "directions on disk, where they are loaded or saved",
    "outputs.py": "places that can be written to, where directions are saved",
    "directions/model_categories.py": "harm categories, by the model itself",
    "greedy.py": "responses under a model's own generation settings, for `drop_misbehaving`",
    "tiers/responses.py": "the tiers of a response, for `drop_misbehaving`",
    "tiers/linear.py": "the linear models behind them",
    "tiers/text.py": "the text that they look at",
}
"""What one of those files imports only where it is asked for, and a default plugin can do without."""

SCORERS = {
    "response_scorers.py": "`RefusalTiers` and `FalseRefusals`, and what all scorers share",
    "tiers/coherence.py": "whether a response is coherent",
}
"""What the scorers that need responses alone take beside the tiers and what the modifier needs."""

DATA = {
    "data/lexicon.json": "the word list of the harm categories",
    "data/matched/train.jsonl": "harmless prompts on the subjects of the harm categories",
    "data/tiers.safetensors": "the linear models behind the tiers",
}
"""What is no code."""


def n_lines(name: str) -> int:
    """Returns the number of lines of a file, to the next ten, so that the table lasts a while."""

    return round(len((PACKAGE / name).read_text(encoding="utf-8").splitlines()), -1)


def rows(files: dict[str, str]) -> list[str]:
    """Returns the lines of a table."""

    return [
        "| File | Lines | What it holds |",
        "| :--- | ----: | :------------ |",
        *(f"| `{name}` | {n_lines(name)} | {what} |" for name, what in files.items()),
        f"| together | {sum(map(n_lines, files))} | |",
    ]


def data_rows() -> list[str]:
    """Returns the lines of the table of data."""

    return [
        "| File | KiB | What it holds |",
        "| :--- | --: | :------------ |",
        *(
            f"| `{name}` | {round((PACKAGE / name).stat().st_size / 1024)} | {what} |"
            for name, what in DATA.items()
        ),
    ]


def total() -> str:
    """Returns how much all of it is."""

    needed, further = (
        sum(map(n_lines, names)) for names in ({**MATHEMATICS, **SUPPORT}, {**OPTIONAL, **SCORERS})
    )
    return f"A default modifier has {needed} lines, and {needed + further} with all of these."


if __name__ == "__main__":
    for files in (MATHEMATICS, SUPPORT, OPTIONAL, SCORERS):
        print("\n".join([*rows(files), ""]))
    print("\n".join([*data_rows(), "", total()]))
