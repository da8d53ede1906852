# SPDX-License-Identifier: AGPL-3.0-or-later

"""One run of the stand-in that several tests share, on small pools of the built-in refuser."""

from typing import Any

import pytest

from tests.conftest import DATA, small_pool

MODEL = str(DATA / "refuser")


@pytest.fixture(scope="session")
def modifier_table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The table of a small configuration: one direction per category, differences in means."""

    directory = tmp_path_factory.mktemp("pools")
    return {
        "classes": "category",
        "row_normalization": "none",
        "residual_cache": str(directory / "residuals"),
        "bad_prompts": {"dataset": small_pool(directory, "harmful", "train", 6)},
        "good_prompts": {"dataset": small_pool(directory, "harmless", "train", 40)},
        "matched_prompts": {"dataset": small_pool(directory, "matched", "train", 1)},
    }


@pytest.fixture(scope="session")
def scorer_tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tables of the scorers, with small pools."""

    directory = tmp_path_factory.mktemp("evaluation")
    harmful = {"dataset": small_pool(directory, "harmful", "test", 2)}
    harmless = {"dataset": small_pool(directory, "harmless", "test", 16)}
    return {
        "RefusalTiers": {"prompts": harmful},
        "TeacherForcedDivergence": {"prompts": harmless, "n_tokens": 8, "top_k": 5000},
        "FalseRefusals": {"prompts": harmless},
    }


@pytest.fixture(scope="session")
def run(modifier_table: dict[str, Any], scorer_tables: dict[str, Any]) -> Any:
    """A finished run with two trials."""

    from tests.contract.standin import StandIn, make_settings

    tables = {"modifier": {"ContrastAbliteration": modifier_table}, "scorer": scorer_tables}
    standin = StandIn(
        make_settings(MODEL, tables),
        scorers=[f"heretic_contrast.{name}" for name in scorer_tables],
    ).start()
    standin.optimize(2)
    return standin
