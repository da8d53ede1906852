# SPDX-License-Identifier: AGPL-3.0-or-later

"""A search with components apart, through the real Heretic 1.4 on the built-in refuser, which has linear and full attention."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from heretic_contrast.directions.directions import Directions
from tests.command_server import Server
from tests.conftest import DATA
from tests.hosts.test_warm_start import write_study
from tests.small_runs import COMMON, WholeRuns, pools, study

pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")

PARTS = {
    "attn.o_proj": "self_attn.o_proj",
    "linear_attn.out_proj": "linear_attn.out_proj",
    "mlp.down_proj": "mlp.down_proj",
}


def kernel_weight(kernel: dict[str, float], layer: int) -> float:
    """Heretic's kernel, written down again."""

    distance = abs(layer - kernel["max_weight_position"])
    if distance > kernel["min_weight_distance"]:
        return 0.0
    share = distance / kernel["min_weight_distance"]
    return (1 - share) * kernel["max_weight"] + share * kernel["min_weight"]


@pytest.mark.slow
def test_search_save_and_rebuild(
    command_server: Server, whole_runs: WholeRuns, tmp_path: Path
) -> None:
    sweep = whole_runs.directory("sweep") / "output" / "sweep.json"
    space = {"linear_attn.out_proj.max_weight": [0.1, 0.2], "attn.o_proj.max_weight": [0.5, 1.0]}
    search = [
        *COMMON,
        *pools(tmp_path),
        "--contrast.writers=apart",
        "--row-normalization=none",
        f"--contrast.search-space={json.dumps(space)}",
        f"--contrast.warm-start={sweep}",
        "--contrast.save-directions=directions.safetensors",
        "--n-trials=1",
        "--n-startup-trials=1",
        "--study-checkpoint-dir=checkpoints",
        "--trial-index=0",
        "--model-action=save",
        "--export-strategy=merge",
    ]
    command = command_server.run([*search, "--save-directory=first"], tmp_path)
    assert command.code == 0, command.output()[-3000:]
    (first,) = study(tmp_path / "checkpoints")
    weights = {name: first["params"][f"{name}.max_weight"] for name in PARTS}
    # That of the sweep's best cell, at the nearest end of what is searched.
    assert weights["linear_attn.out_proj"] == 0.2 and weights["attn.o_proj"] == 0.5

    # By dense algebra, from the record.
    parameters = json.loads((tmp_path / "first" / "heretic-contrast.json").read_text())[
        "parameters"
    ]
    assert set(parameters["kernels"]) == set(PARTS) and parameters["direction_index"] is None
    directions = Directions.load(str(tmp_path / "directions.safetensors"))
    scales = torch.tensor([parameters["scales"][name] for name in directions.names]).double()
    before = load_file(DATA / "refuser" / "model.safetensors")
    after = load_file(tmp_path / "first" / "model.safetensors")
    changed = set()
    for name, weight in before.items():
        parts = [part for part, path in PARTS.items() if name.endswith(f"{path}.weight")]
        expected = weight.double()
        for part in parts:
            layer = int(name.split("layers.")[1].split(".")[0])
            strength = kernel_weight(parameters["kernels"][part], layer)
            vectors = directions.tensor[layer + 1].double()
            operator = torch.einsum("k,ki,kj->ij", strength * scales, vectors, vectors)
            expected = expected - operator @ expected
            changed |= {part} if strength else set()
        assert torch.allclose(
            after[name].double(), expected, rtol=1e-2, atol=1e-3 * float(weight.std())
        )
    assert "linear_attn.out_proj" in changed

    # A study with components together has no values for those apart, and one of its trials stands for both.
    together = {name: value for name, value in first["params"].items() if "linear_attn" not in name}
    write_study(tmp_path / "together.jsonl", "builtin:refuser", [(1, 0.1)], together)
    options = [*COMMON, *pools(tmp_path), "--contrast.writers=apart", "--model-action=none"]
    options += ["--n-trials=1", "--contrast.warm-start=together.jsonl"]
    command = command_server.run([*options, "--study-checkpoint-dir=second"], tmp_path)
    assert command.code == 0, command.output()[-3000:]
    (trial,) = study(tmp_path / "second")
    assert together.items() <= trial["params"].items()
    for name in ("max_weight", "max_weight_position", "min_weight", "min_weight_distance"):
        found = {trial["params"][f"{part}.{name}"] for part in PARTS if part != "mlp.down_proj"}
        assert len(found) == 1

    # The trial is restored in another process, and the model made again from its record.
    command = command_server.run(
        [*search, "--checkpoint-action=continue", "--save-directory=again"], tmp_path
    )
    assert command.code == 0, command.output()[-3000:]
    command = command_server.run(["rebuild", "first", "--output=rebuilt"], tmp_path)
    assert command.code == 0 and "byte for byte" in " ".join(command.output().split())
    for folder in ("again", "rebuilt"):
        content = (tmp_path / folder / "model.safetensors").read_bytes()
        assert content == (tmp_path / "first" / "model.safetensors").read_bytes()
