# SPDX-License-Identifier: AGPL-3.0-or-later

"""A mixture of experts that was taught to refuse: what users of one see, in small."""

from pathlib import Path

import pytest

from examples import make_refuser


@pytest.mark.slow
@pytest.mark.thorough
def test_refusal_survives_an_ablation_of_attention_alone_but_not_of_all_writers(
    tmp_path: Path,
) -> None:
    refused = make_refuser.write_mixture(tmp_path)
    assert refused["none"] >= 104
    assert refused["attention"] >= 36
    assert refused["experts"] >= 12
    assert refused["all"] <= 5
