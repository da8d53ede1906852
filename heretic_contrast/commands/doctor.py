# SPDX-License-Identifier: AGPL-3.0-or-later

"""`heretic-contrast doctor`: says what this installation can do, and what mends it."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from .. import __version__
from ..errors import ContrastError, one_line
from ..outputs import require_writable_directory


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, whether it is fine, and the command that mends it."""

    subject: str
    fine: bool
    detail: str
    remedy: str = ""
    required: bool = True


def heretic_findings() -> list[Finding]:
    """Looks at which commands work with the installed Heretic, and imports what they need of it."""

    try:
        installed = version("heretic-llm")
    except PackageNotFoundError:
        return [Finding("Heretic", False, "not installed", 'pip install "heretic-llm>=1.4"')]
    from ..hosts.installed import installed_surface, obstacle

    surface = installed_surface()
    offers = {
        "1.4": "no plugins, so that heretic-contrast hosts the plugin",
        "scorers": "scorers, but no modifiers",
        "2.0": "modifiers and scorers",
    }
    found = [Finding("Heretic", True, f"{installed}, with {offers[surface]}")]
    hosting = "heretic20" if surface == "2.0" else "heretic14"
    needs = {
        "run": hosting,
        "rebuild": "rebuilding",
        **dict.fromkeys(("extract", "sweep"), "loading"),
        **dict.fromkeys(("audit", "judge"), "surface"),
        "demo": hosting,
    }
    for command, module in needs.items():
        sentence, remedy = obstacle(command, surface), ""
        if sentence is None:
            try:
                import_module(f"heretic_contrast.hosts.{module}")
            except Exception as error:
                # Heretic's development state may have changed whatever it likes.
                reason = one_line(str(error))
                sentence = f"this Heretic is another one than {command} knows ({reason})"
                remedy = 'pip install "heretic-llm>=1.4,<2"'
                if isinstance(error, ImportError) and not str(error.name).startswith("heretic"):
                    sentence = f"{error.name} cannot be imported as {command} needs it ({reason})"
                    remedy = "pip install --upgrade --upgrade-strategy eager heretic-contrast"
        fine = sentence is None
        found.append(Finding(f"Command {command}", fine, sentence or "works", remedy, False))
    return found


def torch_finding() -> Finding:
    import torch

    from ..vectors import gpu_or_cpu

    kind = gpu_or_cpu()
    if kind == "cpu":
        device = f"CPU with {torch.get_num_threads()} threads"
    elif kind == "mps":
        device = "Apple GPU"
    else:
        device = torch.get_device_module(kind).get_device_name(0)
    return Finding("PyTorch", True, f"{torch.__version__}, {device}")


MODULES = (
    ("numba", "Self-organizing maps", "pip install numba", True),
    ("matplotlib", "Plots", 'pip install "heretic-contrast[plot]"', False),
    ("bitsandbytes", "4-bit models", "pip install bitsandbytes", False),
)
"""What else may be installed: the module, what it is for, the command that installs it, and whether it is required."""


def cache_finding() -> Finding:
    from ..directions.residuals import default_directory

    directory = default_directory()
    try:
        require_writable_directory(directory)
    except ContrastError as error:
        detail = f"{directory} is not writable ({getattr(error.__cause__, 'strerror', error)})"
        remedy = "give --contrast.residual-cache DIR"
        return Finding("Residual cache", False, detail, remedy, required=False)
    return Finding("Residual cache", True, str(directory))


def findings() -> list[Finding]:
    return [
        Finding("heretic-contrast", True, __version__),
        torch_finding(),
        *heretic_findings(),
        *(
            Finding(purpose, there, module if there else "not installed", remedy, required)
            for module, purpose, remedy, required in MODULES
            for there in [find_spec(module) is not None]
        ),
        cache_finding(),
    ]


def main(arguments: Sequence[str]) -> None:
    """Prints what was found. Raises `ContrastError` when something required is missing, or an argument is given."""

    parser = ArgumentParser(
        prog="heretic-contrast doctor",
        description="Says what this installation can do, and what mends it.",
    )
    _, superfluous = parser.parse_known_args(arguments)
    if superfluous:
        raise ContrastError(
            f"doctor takes no arguments, but {superfluous[0]} was given: leave it out."
        )
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(
        "", "Subject", Column("Found", overflow="fold"), Column("Remedy", overflow="fold")
    )
    found = findings()
    for finding in found:
        bad = "[red]No[/]" if finding.required else "[yellow]No[/]"
        table.add_row(
            "[green]Ok[/]" if finding.fine else bad,
            finding.subject,
            escape(finding.detail),
            "" if finding.fine else escape(finding.remedy),
        )
    Console(highlight=False).print(table)
    missing = [finding for finding in found if finding.required and not finding.fine]
    if missing:
        raise ContrastError(
            f"{missing[0].subject} is required but {missing[0].detail}: {missing[0].remedy}."
        )
