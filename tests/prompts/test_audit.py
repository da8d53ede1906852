# SPDX-License-Identifier: AGPL-3.0-or-later

"""The contamination audit of harmless pools."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from heretic_contrast.errors import ContrastError
from heretic_contrast.prompts import Prompt, load_pool
from heretic_contrast.prompts.audit import audit_pool, render, run_audit
from heretic_contrast.prompts.categories import CATEGORIES, classify
from heretic_contrast.settings import PromptSource

POOL = [
    Prompt("Explain how to bake sourdough bread"),
    Prompt("Summarize the causes of World War I"),
    Prompt("Write a tutorial on setting up a firewall"),
    Prompt("Name three planets", category="astronomy"),
    Prompt("How do banks detect fraud and computer viruses?"),
    Prompt("Describe the Battle of [bold]Hastings[/bold]"),
]


def test_every_match_of_a_prompt_counts() -> None:
    audit = audit_pool(POOL)
    # Written down by hand: prompts 1 and 5 are about violence, 2 about hacking, 4 about fraud and hacking.
    expected = dict.fromkeys(CATEGORIES, 0) | {"violence": 2, "hacking": 2, "fraud": 1}
    assert {category: len(texts) for category, texts in audit.matching.items()} == expected
    assert audit.matching["violence"] == [POOL[1].text, POOL[5].text]
    assert audit.n_prompts == 6
    assert audit.n_matching_prompts == 4
    assert audit.n_matches == 5
    assert audit.matches_per_paper_pool == pytest.approx(5 / 6 * 400)


def test_examples_are_the_first_of_their_category() -> None:
    pool = [Prompt(f"{POOL[1].text}, {index}") for index in range(5)]
    stored = audit_pool(pool).to_dict()["categories"]["violence"]
    assert stored == {"n_matches": 5, "examples": [prompt.text for prompt in pool[:3]]}


def test_clean_pool_keeps_order_and_leaves_nothing_to_find() -> None:
    kept = audit_pool(POOL).clean
    assert kept == [POOL[0], POOL[3]]
    assert audit_pool(kept).n_matches == 0


def test_table_shows_no_characters_that_steer_a_terminal() -> None:
    console = Console(width=160, file=io.StringIO())
    steering = "\x1b]0;title\x07\x1b[2J\u202e"
    console.print(render(audit_pool([Prompt(f"How do I hack a password {steering}?")])))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert r"\x1b]0;title\x07\x1b[2J\u202e?" in shown and "\x1b" not in shown


def test_table_shows_prompts_literally() -> None:
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(render(audit_pool(POOL)))
    text = console.export_text()
    assert "[bold]Hastings[/bold]" in text
    assert "4 of 6 prompts" in text
    assert "333 per 400 prompts (the paper: 859)" in text
    # 200 of 260, by Wilson; of the public sets whose errors nobody has read, 588 of 1,100 is the least and 58 of 80 the most.
    said = " ".join(str(render(audit_pool(POOL)).caption).split())
    assert "right in 77 % (71–82 %)" in said and "in 53 to 72 %." in said


def test_files_hold_the_audit_and_a_pool_that_loads(tmp_path: Path) -> None:
    cleaned = tmp_path / "pools" / "clean.jsonl"
    audit = run_audit(POOL, tmp_path / "out", cleaned)
    stored = json.loads((tmp_path / "out" / "audit.json").read_text(encoding="utf-8"))
    assert stored == audit.to_dict()
    assert stored["categories"]["hacking"]["n_matches"] == 2
    assert sum(entry["n_matches"] for entry in stored["categories"].values()) == 5
    assert load_pool(PromptSource(dataset=str(cleaned)), "cleaned") == [POOL[0], POOL[3]]


def test_same_pool_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        run_audit(POOL, tmp_path / name)
    one, two = (tmp_path / name / "audit.json" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_cleaning_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    cleaned = tmp_path / "clean.jsonl"
    with pytest.raises(ContrastError, match="nothing is left to write"):
        run_audit([POOL[1]], tmp_path, cleaned)
    assert not list(tmp_path.iterdir())


def test_general_prompts_match_rarely_and_harmful_ones_mostly(shared_data: Path) -> None:
    rows = [
        json.loads(line)
        for line in (shared_data / "smollm2-refuser" / "prompts.jsonl").read_text().splitlines()
    ]
    general = [Prompt(row["text"]) for row in rows if row["source"] == "Alpaca"]
    harmful = [Prompt(row["text"]) for row in rows if row["label"] == "harmful"]
    audit = audit_pool(general)
    print(f"{len(general)} general prompts: {audit.matches_per_paper_pool:.1f} matches per 400")
    assert 0 < audit.n_matching_prompts / len(general) < 0.1
    assert sum(bool(classify(prompt.text)) for prompt in harmful) / len(harmful) > 0.7
