# SPDX-License-Identifier: AGPL-3.0-or-later

"""Reports of small sweeps and extractions: their numbers, their files, their plots and their page."""

import csv
import html
import html.parser
import io
import json
import math
import re
import shutil
import struct
import subprocess
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import rich.console
import torch

from heretic_contrast.errors import ContrastError
from heretic_contrast.evaluation.capture import measure_capture
from heretic_contrast.evaluation.cells import Cell, Measurement, SweepResult, Synergy, Verdict
from heretic_contrast.evaluation.geometry import measure_geometry
from heretic_contrast.evaluation.results import (
    Activity,
    CaptureResult,
    Geometry,
    LeftOut,
    Pair,
)
from heretic_contrast.evaluation.statistics import percent, percents, wilson_interval
from heretic_contrast.report import opened as page_of_responses
from heretic_contrast.report import plots, write_extraction_report, write_sweep_report
from heretic_contrast.report.content import (
    Column,
    Table,
    layers_text,
    significant,
    text_column,
    thousands,
)
from heretic_contrast.report.extraction_report import cosine_figure, extraction_report
from heretic_contrast.report.sections import capture_table
from heretic_contrast.report.sweep_report import (
    configuration_table,
    minimal_weight_table,
    pareto_front,
    refusal_table,
    summary,
    sweep_report,
)
from heretic_contrast.report.writing import to_csv, to_html, to_rich, write_report
from heretic_contrast.tiers.responses import explain_response
from tests.made_directions import make_directions, random_tensor

WEIGHTS = (0.3, 0.5, 1.2)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the drawing of figures to tests that look at them."""

    monkeypatch.setattr(plots, "to_png", lambda figure: b"")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collects figures instead of drawing them."""

    found: list[Any] = []

    def collect(figure: Any) -> bytes:
        found.append(figure)
        return b""

    monkeypatch.setattr(plots, "to_png", collect)
    return found


def measurement(refusals: int, divergence: float) -> Measurement:
    return Measurement(
        refusals=refusals,
        evasive=1 if refusals < 10 else 0,
        complied=max(0, 9 - refusals),
        incoherent=0,
        n_harmful=10,
        canary_refusals=0,
        n_canaries=4,
        kl_divergence=divergence,
        kl_standard_error=divergence / 10 if math.isfinite(divergence) else None,
    )


def make_sweep() -> SweepResult:
    """A sweep whose layer 1 succeeds at w = 0.5, and whose layer 2 never works."""

    verdict = Verdict("REFUSE", True, 1.0)
    responses: dict[str, Any] = {"verdicts": (verdict,) * 10, "canary_verdicts": (verdict,) * 4}
    responses["canary_responses"] = ("Fine.",) * 4
    refusals = {0: (10, 9, 4), 1: (3, 0, 0), 2: (10, 10, 10)}
    cells = [
        Cell(
            configuration=name,
            strength=strength,
            layers=(layer,),
            weight=weight,
            effective_weight=weight * 3,
            weight_along_mean=weight,
            measurement=measurement(
                counts[index] if name == "first" else 10, 0.001 * (layer + 1) * weight
            ),
            responses=tuple(f"<b>response</b> {index}" for _ in range(10)),
            **responses,
        )
        for name in ("first", "random & <control>")
        for strength in ("weight", "effective")
        for layer, counts in refusals.items()
        for index, weight in enumerate(WEIGHTS)
    ]
    alike = ("<b>response</b>",) * 10
    pair = Cell("first", "weight", (0, 1), 0.3, 0.9, 0.3, measurement(1, 0.004), alike, **responses)
    return SweepResult(
        model="tiny <model>",
        baseline=measurement(10, 0.0001),
        cells=(*cells, pair),
        synergies=(Synergy("first", "weight", (0, 1), 0.3, 1, 2, 0.004),),
        prompts=tuple(f"Prompt {index}" for index in range(10)),
        categories=("violence", "fraud") * 5,
        canaries=("Bake", "Sing", "Run", "Read"),
        baseline_responses=("No.",) * 10,
        baseline_verdicts=(verdict,) * 10,
        baseline_canary_responses=("Gladly.",) * 4,
        baseline_canary_verdicts=(verdict,) * 4,
        pools={"references": {"count": 20, "digest": "0123456789abcdef"}},
        settings={"weights": list(WEIGHTS), "kl_tokens": 50, "top_k": 100},
        identity={
            "weights": "0123456789abcdef" * 4,
            "dtype": "bfloat16",
            "device": ["cuda", "highest"],
            "versions": {"heretic-contrast": "0.1.0", "torch": "2.13.0"},
        },
    )


def make_geometry() -> tuple[CaptureResult, Geometry]:
    """Capture and geometry of random directions at three layers."""

    configurations = {
        "first": make_directions(random_tensor(4, 3, 16)),
        "random & <control>": make_directions(random_tensor(4, 3, 16, seed=1)),
    }
    left_out = [LeftOut(Pair("Refuse <this>", "Answer this"), "COMPLY", "COMPLY")]
    differences = random_tensor(5, 4, 16, seed=2)
    captured = [measure_capture(*item, differences) for item in configurations.items()]
    capture = CaptureResult(5, tuple(chain(*captured)), tuple(left_out))
    activities = tuple(
        Activity(name, layer, (0.1, 0.2, 0.3), (0.1, 0.1, 0.1), 2.0, ((0.5, 0.3), (1.0, None)))
        for name in configurations
        for layer in range(3)
    )
    return capture, measure_geometry(configurations, activities)


class Page(html.parser.HTMLParser):
    """Collects what a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def png_size(content: bytes) -> tuple[int, int]:
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", content[16:24])


def nothing(*args: Any) -> None:
    """Takes the place of the terminal."""


def test_layers_text() -> None:
    assert layers_text([]) == "none"
    assert layers_text([3, 7, 4]) == "3, 4, 7"
    assert layers_text((5, 1, 2, 3)) == "1–3, 5"


def test_formats() -> None:
    assert significant(3)(0.00048123) == "0.000481"
    assert significant(3)(0.0000012345) == "1.23e-06"
    assert significant(3)(12345.0) == "1.23e+04"
    assert Column("a").text(None) == "–"


def test_table_as_csv_keeps_precision_and_quotes() -> None:
    table = Table(
        "t",
        "Title",
        (text_column("Name"), Column("Value", form=significant(2)), Column("Layers")),
        (('a "b", c', 0.123456789, (1, 2)), ("d", None, ())),
    )
    rows = list(csv.reader(io.StringIO(to_csv(table))))
    assert rows == [
        ["Name", "Value", "Layers"],
        ['a "b", c', "0.12345679", "1 2"],
        ["d", "", ""],
    ]


def test_table_in_the_terminal_does_not_read_markup() -> None:
    table = Table("t", "[bold]Title", (text_column("Name"),), (("[red]name[/]",),), "[note]")
    console = rich.console.Console(width=60, file=io.StringIO(), record=True)
    console.print(to_rich(table))
    text = console.export_text()
    assert "[bold]Title" in text
    assert "[red]name[/]" in text
    assert "[note]" in text


def test_table_in_the_terminal_is_not_steered_by_names() -> None:
    name = "\x1b[2J"
    table = Table("t", name, (text_column(name),), ((name,),), name)
    console = rich.console.Console(width=80, file=io.StringIO())
    console.print(to_rich(table))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in shown and shown.count(r"\x1b[2J") == 4


def test_terminal_tables_fit_into_eighty_columns() -> None:
    result = make_sweep()
    capture, _ = make_geometry()
    for table in (
        minimal_weight_table(result),
        refusal_table(result, "first", "weight"),
        configuration_table(result),
        capture_table(capture),
    ):
        console = rich.console.Console(width=80, file=io.StringIO(), record=True)
        console.print(to_rich(table))
        text = console.export_text()
        for value in (cell for row in table.rows for cell in row[: table.n_keys]):
            assert str(value) in text


@pytest.mark.parametrize("width", [40, 80])
def test_numbers_are_whole_in_a_narrow_terminal(width: int) -> None:
    result = make_sweep()
    long_name = "directions-of-my-own-qwen3-4b-matched-pool-v2-seed-17"
    cells = tuple(
        replace(
            cell,
            configuration=long_name,
            weight=cell.weight + more,
            measurement=replace(cell.measurement, refusals=399 * (more > 0), n_harmful=400),
        )
        for cell in result.single_cells("first", "weight")
        for more in range(0, 10, 2)
    )
    result = replace(result, cells=cells, settings={}, synergies=())
    for table in (
        configuration_table(result),
        minimal_weight_table(result),
        refusal_table(result, long_name, "weight"),
        capture_table(make_geometry()[0]),
    ):
        console = rich.console.Console(width=width, file=io.StringIO(), record=True)
        console.print(to_rich(table))
        lines = console.export_text().splitlines()
        found = [word for line in lines for word in line.split()]
        for column, *values in zip(table.columns, *table.rows, strict=True):
            for value in values if column.numeric and column.essential else ():
                whole = column.text(value)
                # Its interval may stand below a number.
                assert any(whole in line for line in lines) or set(whole.split()) <= set(found)
        if table.name.startswith("refusals"):
            # Three layers at fifteen weights, three of which refuse nothing.
            assert found.count("399") == 3 * 12


def test_figures_that_are_not_zero_are_not_shown_as_that() -> None:
    assert [thousands(value) for value in (0, 4 / 9, -0.04, 12345.6)] == [
        "0",
        "0.44",
        "-0.04",
        "12,346",
    ]
    result = make_sweep()
    ends = [percents(*wilson_interval(n, 100)) for n in (0, 1, 50, 99, 100)]
    assert ends == ["0–4", "0.18–5", "40–60", "95–99.82", "96–100"]
    assert percents(*wilson_interval(1, 10_000)) == "0.0018–0.057"
    # At an even half, one end was rounded away.
    assert [percent(n / 200) for n in (0, 1, 2, 198, 199, 200)] == [
        "0",
        "0.50",
        "1",
        "99",
        "99.50",
        "100",
    ]
    assert [percent(share, 1) for share in (4e-4, 0.9996, 1 + 1e-7)] == ["0.040", "99.960", "100.0"]
    # What rounding to float32 leaves is no share.
    assert [percent(share, 1) for share in (6e-8, 1 - 6e-8)] == ["0.0", "100.0"]
    # Wilson's upper end for 0 of 1,000 is 3.8416 / 1003.8416.
    base = replace(result.baseline, refusals=1000, evasive=0, complied=0, n_harmful=1000)
    many = replace(result, baseline=base)
    assert "(95 %) 0–0.38 %" in minimal_weight_table(many).note
    assert "1000 of 1000 harmful prompts (99.62–100%)" in summary(many)[0]


def test_the_page_says_which_cells_it_leaves_out() -> None:
    result = make_sweep()
    first, *others = sorted({cell.weight for cell in result.cells if len(cell.layers) == 1})
    assert not [sentence for sentence in summary(result) if "synergy alone" in sentence]
    swept = replace(result, settings={"weights": others})
    assert f"measured at weight {first:g} for synergy alone" in summary(swept)[-1]


def test_the_page_says_what_was_ablated_and_who_judged(undrawn: None) -> None:
    result = make_sweep()
    measured = make_geometry()
    page = to_html(sweep_report(result, *measured))
    assert "from its form" in page and "only these were ablated" not in page
    settings = {"components": ["attn.o_proj"], "judge_model": "org/judge"}
    page = to_html(sweep_report(replace(result, settings=settings), *measured))
    assert "only these were ablated: attn.o_proj." in page
    assert "as org/judge has judged it" in page and "from its form" not in page
    embedded = {"directions": {"first": {"embeddings": True}, "second": {}}}
    result = replace(result, settings=embedded)
    sentence = "With layer 0 of first, the embeddings were ablated as well."
    assert sentence in to_html(sweep_report(result, *measured))
    above = replace(result, cells=tuple(cell for cell in result.cells if 0 not in cell.layers))
    assert sentence not in to_html(sweep_report(replace(above, synergies=()), *measured))


def test_minimal_weights_are_the_first_that_reach_zero() -> None:
    table = minimal_weight_table(make_sweep())
    assert [row[:4] for row in table.rows] == [
        ("first", "weight", 1, 0.5),
        ("first", "effective", 1, 0.5),
    ]
    divergence, efficiency = table.rows[0][5], table.rows[0][7]
    assert divergence == pytest.approx(0.001)
    assert efficiency == pytest.approx((10 - 0) / (0.001 - 0.0001))
    _, high = wilson_interval(0, 10)
    assert f"0–{100 * high:.0f} %" in table.note


def test_minimal_weights_look_through_the_cells_of_a_configuration_once() -> None:
    """Not for every layer, which takes seconds with thousands of cells."""

    result = make_sweep()
    with patch.object(
        SweepResult, "single_cells", autospec=True, side_effect=SweepResult.single_cells
    ) as looks:
        minimal_weight_table(result)
    assert looks.call_count == len(result.configurations()) == 4


def test_refusals_by_layer_and_weight_carry_intervals() -> None:
    result = make_sweep()
    texts = refusal_table(result, "first", "weight").texts()
    assert [row[0] for row in texts] == ["0", "1", "2"]
    low, high = wilson_interval(4, 10)
    assert texts[0][3] == f"4 ({100 * low:.0f}–{100 * high:.0f}%)"
    # A weight that only the synergy test added is no column, and nothing is achieved by it.
    extra = Cell("first", "weight", (2,), 0.9, 1, 1, measurement(0, 0.1))
    wider = SweepResult(**{**result.__dict__, "cells": (*result.cells, extra)})
    assert refusal_table(wider, "first", "weight").texts() == texts
    assert wider.summaries() == result.summaries()
    assert minimal_weight_table(wider).texts() == minimal_weight_table(result).texts()


def test_pareto_front_equals_the_definition() -> None:
    generator = torch.Generator().manual_seed(3)
    cells = [
        Cell(
            "a",
            "weight",
            (index,),
            1.0,
            1.0,
            1.0,
            measurement(
                int(torch.randint(0, 8, (1,), generator=generator)),
                float(torch.randint(1, 9, (1,), generator=generator)),
            ),
        )
        for index in range(60)
    ]
    places = [(cell.measurement.refusals, cell.measurement.kl_divergence) for cell in cells]
    optimal = {
        place
        for place in places
        if not any(
            other[0] <= place[0] and other[1] <= place[1] and other != place for other in places
        )
    }
    front = pareto_front(cells)
    assert {(c.measurement.refusals, c.measurement.kl_divergence) for c in front} == optimal
    assert len(front) == len(optimal)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The folder of a report, and what was printed."""

    folder, printed = tmp_path_factory.mktemp("report"), []
    write_sweep_report(make_sweep(), folder, lambda *args: printed.extend(args), *make_geometry())
    return folder, printed


def test_files_of_a_sweep(written: tuple[Path, list[Any]], tmp_path: Path) -> None:
    result = make_sweep()
    folder, printed = written
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert SweepResult.from_dict(json.loads(files["sweep.json"])) == result
    assert len(list(csv.DictReader(io.StringIO(files["sweep.csv"].decode())))) == len(result.cells)
    # Every table of the page is a file, of numbers, and no two of its columns have one name.
    for table in sweep_report(result, *make_geometry()).tables():
        header, *rows = csv.reader(io.StringIO(files[f"{table.name}.csv"].decode()))
        assert len(header) == len(set(header)) and len(rows) == len(table.rows), table.name
    grid = list(csv.reader(io.StringIO(files["refusals-first-weight.csv"].decode())))
    for layer, *found in grid[1:]:
        for weight, count in zip(WEIGHTS, found, strict=True):
            (cell,) = (
                cell
                for cell in result.single_cells("first", "weight")
                if (cell.layers, cell.weight) == ((int(layer),), weight)
            )
            assert int(count) == cell.measurement.refusals
    responses = [json.loads(line) for line in files["responses.jsonl"].decode().splitlines()]
    assert len(responses) == 14 * (1 + len(result.cells))
    assert json.loads(files["capture.json"])["n_pairs"] == 5
    measured = "weights of digest 0123456789abcdef in bfloat16 on cuda: heretic-contrast 0.1.0, torch 2.13.0."
    assert measured in files["report.html"].decode()
    assert len(json.loads(files["geometry.json"])["layers"]) == 6
    assert {
        "refusals-first-weight.png",
        "refusals-random----control--effective.png",
        "divergence-weight.png",
        "synergy-first-weight.png",
        "capture-subspace.png",
        "norms.png",
        "perturbation.png",
    } <= set(files)
    for name, content in files.items():
        if name.endswith(".png"):
            width, height = png_size(content)
            assert width > 500 and height > 300
            assert b"matplotlib" not in content.lower()
    assert any("R reaches 0 on 1 of 3 layers" in str(item) for item in printed)
    # In the terminal nothing can be opened.
    assert not any("opens the responses" in str(item) for item in printed)

    # The same sweep gives the same bytes.
    write_sweep_report(result, tmp_path, nothing, *make_geometry())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_nothing_of_an_earlier_sweep_stays_among_the_files_of_another(
    undrawn: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, capture_and_geometry = make_sweep(), make_geometry()
    write_sweep_report(first, tmp_path, nothing, *capture_and_geometry)
    mine = ["refusals-of-mine.csv", "synergy-first.png", "sweep.journal", "notes.csv"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    second = replace(
        first,
        cells=tuple(
            replace(cell, configuration="second")
            for cell in first.cells
            if (cell.configuration, cell.strength, len(cell.layers)) == ("first", "weight", 1)
        ),
        synergies=(),
    )
    write_sweep_report(second, tmp_path, nothing, *capture_and_geometry)
    alone = tmp_path / "alone"
    write_sweep_report(second, alone, nothing, *capture_and_geometry)
    expected = {path.name for path in alone.iterdir()}
    assert {"refusals-second-weight.csv", "refusals-second-weight.png"} <= expected
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == expected | set(mine)
    # What is no page of a report tells nothing, and no other folder is touched.
    (tmp_path / "norms.png").rename(tmp_path / "kept.png")
    for text in ("", "<html>", '<meta name="files" content="../kept.png /kept.png">', "\udce4"):
        (alone / "report.html").write_text(text, errors="surrogateescape")
        write_sweep_report(second, alone, nothing, *capture_and_geometry)
        assert {path.name for path in alone.iterdir()} == expected
    (tmp_path / "kept.png").rename(tmp_path / "norms.png")
    # Whoever has lost matplotlib keeps no old plots, and who sweeps nothing that can be captured no old numbers.
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    _, geometry = capture_and_geometry
    less = CaptureResult(0, ()), replace(geometry, activities=())
    write_sweep_report(second, tmp_path, nothing, *less)
    write_sweep_report(second, tmp_path / "less", nothing, *less)
    kept = {path.name for path in (tmp_path / "less").iterdir()}
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == kept | set(mine)


def no_json(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON.")


@pytest.mark.parametrize("weights", [{1.2}, pytest.param(set(WEIGHTS), marks=pytest.mark.slow)])
def test_models_that_an_ablation_has_broken(tmp_path: Path, weights: set[float]) -> None:
    result = make_sweep()
    result = replace(
        result,
        cells=tuple(
            replace(cell, measurement=measurement(0, math.inf)) if cell.weight in weights else cell
            for cell in result.cells
        ),
    )
    write_sweep_report(result, tmp_path, nothing, *make_geometry())
    written = json.loads((tmp_path / "sweep.json").read_text(), parse_constant=no_json)
    assert SweepResult.from_dict(written) == result


def test_page_stands_alone_and_is_accessible(written: tuple[Path, list[Any]]) -> None:
    page_text = (written[0] / "report.html").read_text()
    page = Page(page_text)
    assert page.open == []
    assert page.all("html")[0]["lang"] == "en"
    assert not page.all("script") and not page.all("link")
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page_text)
    images = page.all("img")
    assert len(images) == len(sweep_report(make_sweep(), *make_geometry()).figures())
    for image in images:
        assert (image["src"] or "").startswith("data:image/png;base64,")
        assert len(image["alt"] or "") > 20
    tables = page.all("table")
    assert len(tables) == len(page.all("caption"))
    assert all(header["scope"] in ("row", "col") for header in page.all("th"))
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert {link["href"] for link in page.all("a")} == {f"#{name}" for name in identifiers}
    # What users name is shown, not interpreted.
    assert "random & <control>" in page.text
    assert "Refuse <this>" in page.text


def test_without_matplotlib_tables_remain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    printed: list[Any] = []
    write_sweep_report(make_sweep(), tmp_path, lambda *args: printed.extend(args), *make_geometry())
    assert not list(tmp_path.glob("*.png"))
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert not page.all("img")
    assert page.all("table")
    assert 'pip install "heretic-contrast[plot]"' in page.text
    console = rich.console.Console(width=200, file=io.StringIO(), record=True)
    console.print(printed[-1])
    assert 'pip install "heretic-contrast[plot]"' in console.export_text()


def test_extraction_report(tmp_path: Path) -> None:
    capture, geometry = make_geometry()
    extracted = {
        name: make_directions(random_tensor(4, 3, 16, seed=seed))
        for seed, name in enumerate(("first", "random & <control>"))
    }
    extracted["first"].provenance["sources"] = ["bad.jsonl", "good.csv"]
    report = extraction_report("tiny", extracted, capture, geometry)
    captured = replace(
        capture, layers=tuple(replace(layer, subspace=0.9996) for layer in capture.layers)
    )
    assert capture_table(captured).texts()[0][1] == "99.960 %"
    sentence = extraction_report("tiny", extracted, captured, geometry).summary[0]
    assert "captures 99.960 % on average and 99.960 % at layer 0" in sentence
    names = {figure.name for figure in report.figures()}
    assert {"norms", "singular-values", "class-cosines-first", "norm-ratio", "occupancy"} <= names
    tables = {table.name: table for table in report.tables()}
    assert len(tables) == len(report.tables())
    assert tables["classes"].rows[0][2] == pytest.approx(
        float(random_tensor(4, 3, 16)[_shown(report) + 1, 0].norm())
    )
    write_report(report, tmp_path, {})
    page = Page((tmp_path / "report.html").read_text())
    assert page.open == [] and "bad.jsonl, good.csv" in page.text


@pytest.mark.parametrize("is_left_out", [False, True])
@pytest.mark.parametrize("is_sweep", [False, True])
def test_a_report_says_what_is_left_out(
    is_sweep: bool, is_left_out: bool, undrawn: None, tmp_path: Path
) -> None:
    capture, geometry = make_geometry()
    names = geometry.configurations()
    if is_left_out:
        geometry = replace(geometry, activities=())
    printed: list[Any] = []
    rest = tmp_path, lambda *said: printed.extend(said), capture, geometry
    if is_sweep:
        write_sweep_report(make_sweep(), *rest)
    else:
        extracted = {name: make_directions(random_tensor(4, 3, 16)) for name in names}
        write_extraction_report("tiny", extracted, *rest)
    said = "\n".join(map(str, printed))
    for text in ((tmp_path / "report.html").read_text(), said):
        assert ("Occupancy and perturbation are left out: what the ab" in text) is is_left_out
    assert "1 pairs are left out of the capture" in said


def test_nothing_of_an_earlier_extraction_stays_among_the_files_of_another(
    undrawn: None, tmp_path: Path
) -> None:
    capture, geometry = make_geometry()
    extracted = {
        name: make_directions(random_tensor(4, 3, 16, seed=seed))
        for seed, name in enumerate(geometry.configurations())
    }
    write_extraction_report("tiny", extracted, tmp_path, nothing, capture, geometry)
    (tmp_path / "class-cosines-mine.png").write_text("mine")
    assert {"class-cosines-first.png", "comparison.csv", "capture-left-out.csv"} <= {
        path.name for path in tmp_path.iterdir()
    }
    less = (
        CaptureResult(5, tuple(capture.of("random & <control>"))),
        Geometry(tuple(geometry.of("random & <control>"))),
    )
    del extracted["first"]
    for folder in (tmp_path, tmp_path / "alone"):
        write_extraction_report("tiny", extracted, folder, nothing, *less)
    expected = {path.name for path in (tmp_path / "alone").iterdir()}
    assert "class-cosines-random----control-.png" in expected
    found = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert found == expected | {"class-cosines-mine.png"}


def drawings(name: str) -> list[bytes]:
    """One plot of each kind with a user's name in it."""

    return [
        plots.lines({name: ([1, 2], [1, 2])}, "x", "y"),
        plots.fronts({name: ([1, 2], [1, 2], [True, True])}, "x", "y", 2),
        plots.hit_maps(np.ones((1, 2, 2), dtype=int), [name]),
        plots.heat_map(np.ones((1, 1)), ([name], [name]), ("a", "b", "c"), (0, 1)),
    ]


def visible_ticks(axis: Any) -> list[float]:
    low, high = axis.get_view_interval()
    return [tick for tick in axis.get_majorticklocs() if low <= tick <= high]


def test_axes_show_no_rounding_noise(figures: list[Any]) -> None:
    noise = [1 - 6e-8, 1, 1 + 1.2e-7, 1]
    plots.lines({"weights": (range(4), noise)}, "Layer", "y", from_zero=True)
    plots.lines({"cosines": (range(4), noise)}, "Layer", "y")
    plots.lines({"cosines": (range(4), [0.5, 0.7, 0.8, 0.9])}, "Layer", "y")
    weights, alike, apart = (figure.axes[0].get_ylim() for figure in figures)
    assert weights[0] == 0 and 1.03 < weights[1] < 1.1
    assert alike[1] - alike[0] == pytest.approx(0.01) and sum(alike) / 2 == pytest.approx(1)
    assert apart == pytest.approx((0.48, 0.92))


def test_ticks_are_at_values_that_there_are(figures: list[Any]) -> None:
    plots.lines({"a": ([1], [1.0])}, "Index", "y")
    plots.fronts({"a": ([1e-3, 1e-2], [0, 0], [True, False])}, "x", "y", 10)
    plots.fronts({"a": ([1e-3, 1e-2], [2, 1], [True, True])}, "x", "y", 3)
    plots.heat_map(np.eye(2), ("ab", "ab"), ("a", "b", "R"), (0, 1))
    plots.heat_map(np.eye(2), ("ab", "ab"), ("a", "b", "c"), (0, 1), "{:.2f}")
    one, none, few, counts, shares = figures
    assert visible_ticks(one.axes[0].xaxis) == [1]
    assert none.axes[0].get_ylim() == pytest.approx((-0.4, 10.4))
    assert visible_ticks(few.axes[0].yaxis) == [0, 1, 2, 3]
    assert visible_ticks(counts.axes[1].yaxis) == [0, 1]
    assert len(visible_ticks(shares.axes[1].yaxis)) > 2


def test_values_and_names_are_written_where_they_fit(figures: list[Any]) -> None:
    name = "chemical, biological, radiological and nuclear weapons"
    for size in (9, 20):
        labels = [f"{index} {name}" for index in range(size)]
        plots.heat_map(np.full((size, size), 0.92), (labels, labels), ("a",) * 3, (0, 1), "{:.2f}")
    plots.hit_maps(np.full((1, 4, 4), 480), [name])
    plots.hit_maps(np.full((1, 10, 10), 4321), [name])
    assert [len(figure.axes[0].texts) for figure in figures] == [81, 0, 16, 0]
    shown = figures[0].axes[0].get_yticklabels()[0].get_text()
    assert shown == "0 chemical, biological, r…" and len(shown) == 26
    lines = figures[2].axes[0].get_title().split("\n")
    assert " ".join(lines) == name and max(map(len, lines)) <= 26


def test_more_series_than_colors_can_be_told_apart() -> None:
    styles = [plots._style(index) for index in range(56)]
    assert len({(style["color"], style["marker"]) for style in styles}) == 56


def test_cosines_fill_the_scale_of_their_colors(figures: list[Any]) -> None:
    layer = make_geometry()[1].layers[0]
    for cosine in (0.84, 1.0, -0.31):
        measured = replace(layer, cosines=((1.0, cosine), (cosine, 1.0)))
        assert cosine_figure("a", ("a", "b"), measured).png == b""
    limits = [figure.axes[0].images[0].get_clim() for figure in figures]
    assert limits == [(0.8, 1), (0.9, 1), (-0.4, 1)]


def test_one_direction_is_described_as_it_is(undrawn: None) -> None:
    tensor = torch.nn.functional.normalize(random_tensor(4, 1, 16), dim=-1)
    extracted = {"default": make_directions(tensor)}
    geometry = measure_geometry(extracted)
    report = extraction_report("tiny", extracted, CaptureResult(0, ()), geometry)
    assert report.summary == (
        "default: 1 direction per layer, effective weight at weight 1 up to 1.",
    )
    assert "singular-values" not in {figure.name for figure in report.figures()}
    tables = {table.name: table for table in report.tables()}
    for name in ("configurations", "geometry"):
        shares = [column.header for column in tables[name].columns].index("Share of σ₁²")
        assert tables[name].texts()[0][shares] == "100.0 %"


def test_figures_are_called_what_they_and_their_tables_show(undrawn: None) -> None:
    report = sweep_report(make_sweep(), *make_geometry())
    titles = {figure.name: figure.title for figure in report.figures()}
    for table in report.tables():
        if table.name.startswith("refusals"):
            assert titles[table.name] == table.title
    assert titles["synergy-first-weight"] == "Synergy of pairs at w = 0.3: first, equal weight"
    assert titles["refusals-first-weight"] == "R per layer and weight: first, equal weight"


def test_small_lengths_and_weights_are_not_shown_as_zero() -> None:
    tensor = 0.004 * torch.nn.functional.normalize(random_tensor(4, 3, 16), dim=-1)
    directions = {"raw": make_directions(tensor)}
    report = extraction_report(
        "tiny", directions, CaptureResult(0, ()), measure_geometry(directions)
    )
    tables = {table.name: table for table in report.tables()}
    for name, headers in (
        ("configurations", {"Mean norm", "Effective weight"}),
        ("geometry", {"Mean norm", "Effective weight", "Along mean"}),
        ("classes", {"Norm"}),
    ):
        for texts, values in zip(tables[name].texts(), tables[name].rows, strict=True):
            for column, text, value in zip(tables[name].columns, texts, values, strict=True):
                if column.header in headers:
                    assert float(text) == pytest.approx(value, rel=0.005), column.header
    assert "up to 0.00 " not in report.summary[0]
    result = make_sweep()
    cells = tuple(replace(cell, effective_weight=0.00123) for cell in result.cells)
    page = to_html(sweep_report(replace(result, cells=cells), *make_geometry()))
    assert page.count(">0.00123</td>") == len(cells) + len(minimal_weight_table(result).rows)


@pytest.mark.parametrize(("control", "is_shown"), [("none", True), ("random", False)])
def test_prompts_that_the_neuron_of_a_direction_wins(control: str, is_shown: bool) -> None:
    hits = torch.tensor([[[3, 0, 5, 4], [6, 1, 1, 0]]]).repeat(4, 1, 1)
    directions = make_directions(
        random_tensor(4, 4, 16),
        class_names=("a", "b"),
        hits=hits,
        provenance={"settings": {"control": control, "som_rows": 2}},
    )
    extracted = {"two neurons": directions}
    geometry = measure_geometry(extracted)
    report = extraction_report("tiny", extracted, CaptureResult(0, ()), geometry)
    rows = next(table.rows for table in report.tables() if table.name == "classes")
    won = [(12, 5), (12, 4), (8, 6), (8, 1)] if is_shown else [(None, None)] * 4
    assert [row[3:] for row in rows] == won


@pytest.mark.filterwarnings("error:Glyph|Matplotlib currently")
def test_names_in_letters_that_the_usual_font_lacks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("诈骗", "احتيال", "fraud 😀"):
        drawings(name)
    # STIX, which comes with matplotlib, has this one letter.
    monkeypatch.setattr(plots, "FALLBACK_FONTS", ())
    boxes, latin = drawings("ℊ"), drawings("fraud")
    monkeypatch.setattr(plots, "FALLBACK_FONTS", ("no such font", "STIXGeneral"))
    assert all(found != box for found, box in zip(drawings("ℊ"), boxes, strict=True))
    assert drawings("fraud") == latin
    assert not caplog.records


@pytest.mark.parametrize("name", ["fraud ($)", "drugs ($$)", "_mine", r"a\$b$"])
def test_names_of_users_are_no_mathematics(name: str) -> None:
    # What is drawn differs from the same picture with another name, so that none is left out.
    for found, other, nothing in zip(*map(drawings, (name, "another name", "")), strict=True):
        assert found not in (other, nothing)


def _shown(report: Any) -> int:
    """The layer that the section on classes says it shows."""

    match = re.search(r"layer (\d+)", report.sections[-1].paragraphs[0])
    assert match is not None
    return int(match[1])


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ContrastError, match="could not be written"):
        write_sweep_report(make_sweep(), tmp_path / "file", nothing, *make_geometry())


def run_browser(folder: Path, *arguments: str) -> str:
    """Runs Chromium without a screen, and returns what it writes."""

    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium")
    command = f"""
        {program} --headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking
        --disable-component-update --disable-sync --user-data-dir={folder / "profile"}
    """.split()
    finished = subprocess.run(
        [*command, *arguments], check=True, capture_output=True, text=True, timeout=300
    )
    return finished.stdout


@pytest.mark.slow
@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_overflows_in_a_browser(
    written: tuple[Path, list[Any]], tmp_path: Path, width: int
) -> None:
    text = (written[0] / "report.html").read_text()
    # The page has no scripts; this one, added for the test, writes what the browser laid out into the title.
    measured = tmp_path / "measured.html"
    measured.write_text(
        text
        + "<script>addEventListener('load', () => { const images = [...document.images]; document.title = JSON.stringify("
        "[document.documentElement.scrollWidth, innerWidth, images.every(image => image.naturalWidth > 0)]); });</script>"
    )
    # A headless window is at least 500 wide, so that a phone is a frame in a page.
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="measured.html" style="width: {width}px; height: 800px; border: 0"></iframe>'
        "<script>addEventListener('load', () => { document.title = 'measured ' +"
        " document.getElementById('f').contentDocument.title; });</script>"
    )
    shown = run_browser(
        tmp_path,
        "--allow-file-access-from-files",
        f"--window-size={width + 100},900",
        "--virtual-time-budget=5000",
        "--dump-dom",
        frame.as_uri(),
    )
    match = re.search(r"<title>measured \[(\d+),(\d+),(true|false)\]</title>", shown)
    assert match is not None, shown[:500]
    assert int(match[1]) <= int(match[2]) == width
    assert match[3] == "true"


@pytest.mark.slow
def test_prints_to_pdf(written: tuple[Path, list[Any]], tmp_path: Path) -> None:
    target = tmp_path / "report.pdf"
    run_browser(tmp_path, f"--print-to-pdf={target}", (written[0] / "report.html").as_uri())
    assert target.read_bytes().startswith(b"%PDF")


def opened(page_text: str) -> dict[str, str]:
    """The parts of a page that a link opens, by name."""

    found = re.split(r'<section class="opened" id="([^"]+)">', page_text)[1:]
    parts = [html.unescape(text) for text in found]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_every_count_opens_its_responses(undrawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    result = make_sweep()
    refusing = "I'm sorry, but I can't help with that."
    marked = replace(
        result.cells[3],
        responses=(refusing, *result.baseline_responses[1:]),
        verdicts=(Verdict("REFUSE", False, 1.0), *result.baseline_verdicts[1:]),
    )
    result = replace(result, cells=(*result.cells[:3], marked, *result.cells[4:]))
    text = to_html(sweep_report(result, *make_geometry()))
    parts = opened(text)
    assert set(parts) == {"unmodified", *(f"cell-{n}" for n in range(len(result.cells)))}
    # Layer 1 at 0.3 has three refusals, which is what leads to its responses, in the table of weights and that of all cells.
    links = re.findall(r'<a href="#(cell-\d+)">3 \(', text)
    assert len(links) == 6 and len(set(links)) == 2
    part = next(parts[name] for name in links if refusing in parts[name])
    assert "first, layers 1, weight 0.3" in part
    assert "REFUSE, incoherent" in part and "Prompt 0" in part
    assert explain_response("Prompt 0", refusing).summary in part
    assert "Prompt 9" in part and "Canary: Bake" in part
    assert "Canary: Bake" in parts["unmodified"] and "Gladly." in parts["unmodified"]
    kept = [json.loads(line) for line in result.responses_json_lines().splitlines()]
    assert sum((row["configuration"], row["pool"]) == (None, "canary") for row in kept) == 4
    # All cells would be too much: the best stay, and the page says how many.
    monkeypatch.setattr(page_of_responses, "MAXIMUM_CHARACTERS", 2500)
    text = to_html(sweep_report(result, *make_geometry()))
    kept = opened(text)
    assert 1 < len(kept) < len(parts)
    assert f"R of the best {len(kept) - 1} of {len(result.cells)} cells opens" in text
    assert sum(len(re.sub(r"<[^>]*>", "", part)) for part in kept.values()) < 6000
    # Who else decided is named instead of the words.
    for name in ("text_classifier", "judge_model"):
        classified = replace(result, settings={name: "some/model"})
        text = to_html(sweep_report(classified, *make_geometry()))
        assert f"{name.replace('_', ' ')} some/model" in text and "declines:" not in text
