# SPDX-License-Identifier: AGPL-3.0-or-later

"""The installed Heretic 1.4, whose name this package may have taken."""

import sys
from importlib import import_module
from importlib.metadata import distribution
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

NAME = "heretic_released"


def released(module: str) -> Any:
    """Returns a module of the installed Heretic 1.4."""

    if NAME not in sys.modules:
        folder = Path(str(distribution("heretic-llm").locate_file("heretic")))
        spec = spec_from_file_location(
            NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[NAME] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
    return import_module(f"{NAME}.{module}")
