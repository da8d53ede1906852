# SPDX-License-Identifier: AGPL-3.0-or-later

"""Bad input: one sentence that names what is wrong, exit code 2, nothing overwritten."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from heretic_contrast.builtin import DATA
from heretic_contrast.prompts import text_digest
from tests.conftest import Refused
from tests.hosts.test_warm_start import sweep
from tests.made_directions import make_directions, random_tensor
from tests.tiny_models import make_model


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("--contrast.baseline unmached builtin:refuser", "no contrast baseline"),
        ("--contrast.preset paper builtin:refuser", "no preset"),
        ("--contrast.mixing 1.5 builtin:refuser", "contrast.mixing"),
        ("--contrast.som-topology round builtin:refuser", "som-topology"),
        ("--no-such-flag --model builtin:refuser", "no-such-flag"),
        ("--model builtin:other", "no built-in model"),
        ("--n-trials many --model builtin:refuser", "n-trials"),
        (
            "--contrast.preset arditi --contrast.preset som-sequential --model builtin:refuser",
            "Several presets",
        ),
        ("extract builtin:refuser", "--output"),
        ("sweep builtin:refuser", "--output"),
        ("sweep builtin:refuser --output out --layers a-b", "layers"),
        ("sweep builtin:refuser --output out --layers 5-2", "backwards"),
        ("demo", "--output"),
        ("demo --output out --contrast 5", "input should be a table of settings"),
        ("demo --output out --contrast []", "input should be a table of settings"),
        ('demo --output out --contrast [{"baseline":"matched"}]', "should be a table of settings"),
        ("doctor please", "no arguments"),
        ("--n-trials 0 --model-action none --model builtin:refuser", "n_trials is 0: give 1"),
        ("--batch-size -1 --model builtin:refuser", "batch_size is -1: give 0"),
        ("extract --max-response-length 0 --model builtin:refuser", "max_response_length is 0"),
        ("--kl-divergence-scale 0 --model builtin:refuser", "kl_divergence_scale must be"),
        ("audit --dataset missing.txt", "output"),
        ("extract builtin:refuser --contrast.directions=a --output=b", "none to extract"),
        (
            "extract builtin:refuser --output b --contrast.save-directions d --contrast.judge-model j",
            "have no effect: judge_model, save_directions; leave",
        ),
        (
            "sweep builtin:refuser --output b --contrast.storage s --storage t",
            "have no effect: storage (here: --storage);",
        ),
        (
            "sweep builtin:refuser --output b --contrast.judge-model j",
            "no effect: judge_model (here: --judge-model); leave",
        ),
    ],
)
def test_settings(refused: Refused, command: str, expected: str, tmp_path: Path) -> None:
    assert expected in refused(command.split())
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("configuration", "arguments", "expected"),
    [
        ("[unclosed", [], "config.toml in the current directory cannot be read"),
        (
            "modifiers = [{ plugin = 'heretic_contrast.ContrastAbliteration' }, { plugin = 'ARA' }]",
            [],
            "runs exactly one",
        ),
        (
            "[modifier.ContrastAbliteration]\nbaselin = 'matched'",
            [],
            'no setting "baselin" in [modifier.ContrastAbliteration]: did you mean "baseline"?',
        ),
        ("n_trails = 3", [], '"n_trails", which nothing reads: did you mean "n_trials"?'),
        ("[bad_evaluation_prompt]\nsplit = 'x'", [], 'did you mean "bad_evaluation_prompts"?'),
        (
            "[bad_prompts]\ndataset = 'x'\nsplt = 'y'",
            [],
            'no setting "splt" in "bad_prompts" in config.toml: did you mean "split"?',
        ),
        (
            "[good_evaluation_prompts]\ndatset = 'x'",
            [],
            'no setting "datset" in "good_evaluation_prompts" in config.toml: did you mean "dataset"?',
        ),
        (
            "",
            ["--bad-prompts", '{"dataset": "x", "splt": "y"}'],
            'no setting "splt" in --bad-prompts: did you mean "split"?',
        ),
        (
            "[modifier.ContrastAbliteration.bad_prompts]\ndatset = 'x'",
            [],
            'no setting "datset" in "bad_prompts" in [modifier.ContrastAbliteration]: did you mean "dataset"?',
        ),
        (
            "",
            ["--contrast.good-prompts", '[{"dataset": "x"}, {"dataset": "x", "colum": "y"}]'],
            'no setting "colum" in --contrast.good-prompts.1: did you mean "column"?',
        ),
        (
            "",
            ["--contrast.bad-prompts", '[{"dataset": "x"}]', "--contrast.bad-prompts.split", "y"],
            "--contrast.bad-prompts.split is given beside a list",
        ),
        (
            "",
            [
                "--contrast.matched-prompts.prefix=y",
                '--contrast.matched-prompts= [{"dataset": "x"}]',
            ],
            "--contrast.matched-prompts.prefix is given beside a list",
        ),
    ],
)
def test_configurations_that_would_be_misread(
    refused: Refused, configuration: str, arguments: list[str], expected: str, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text(configuration)
    assert expected in refused(["--model", "builtin:refuser", *arguments])


def test_a_byte_order_mark_is_named(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("n_trials = 3\n", encoding="utf-8-sig")
    assert "config.toml in the current directory cannot be read (it begins with a byte" in refused(
        ["--model=builtin:refuser"]
    )


def test_environment_variables_are_named(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.toml").write_text("n_trials = 3\n")
    monkeypatch.setenv("HERETIC_N_TRIALS", "abc")
    named = 'The setting "n_trials" in the environment variable HERETIC_N_TRIALS does not work'
    assert named in refused(["--model=builtin:refuser"])
    assert "--n-trials does not work" in refused(["--model=builtin:refuser", "--n-trials=x"])
    # The plugin's table is one variable.
    monkeypatch.delenv("HERETIC_N_TRIALS")
    monkeypatch.setenv("HERETIC_CONTRAST", '{"winners": 0}')
    named = 'The setting "winners" in the environment variable HERETIC_CONTRAST does not work'
    assert named in refused(["--model=builtin:refuser"])
    assert named in refused(["--model=builtin:refuser", "--contrast.seed=3"])
    given = '--contrast={"winners": -1}'
    assert "The setting --contrast.winners does not work" in refused(["builtin:refuser", given])
    # A demo has a preset where none is given.
    monkeypatch.setenv("HERETIC_CONTRAST", '{"preset": ["nothing"]}')
    assert "no preset" in refused(["demo", "--output=out"])


def test_a_flag_whose_name_begins_alike_takes_no_blame(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[modifier.ContrastAbliteration]\ndivergence = "x"\n')
    found = refused(["--model=builtin:refuser", "--contrast.divergence-tokens=3"])
    assert 'The setting "divergence" in [modifier.ContrastAbliteration]' in found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("builtin:none", "no built-in model builtin:none"),
        pytest.param("nowhere", "The model nowhere could not be loaded", marks=pytest.mark.slow),
        ("unknown", "The model unknown could not be loaded (The checkpoint you"),
        ("other", "The model other has a vocabulary of 320, and builtin:refuser one of 1536"),
    ],
)
def test_another_model_that_cannot_be_evaluated(
    refused: Refused, name: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "unknown"}')
    make_model("llama").save_pretrained(tmp_path / "other")
    short = ["--batch-size=64", "--max-response-length=1", "--response-prefix="]
    assert expected in refused(["builtin:refuser", f"--evaluate-model={name}", *short])


def test_a_pool_cannot_be_harmful_and_harmless(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heretic.main.run", None)
    write_pool(tmp_path / "harmful.jsonl", HARMFUL)
    write_pool(tmp_path / "harmless.jsonl", HARMFUL[3:4] + HARMLESS)
    pools = [
        "--bad-evaluation-prompts.dataset=harmful.jsonl",
        "--good-evaluation-prompts.dataset=harmless.jsonl",
    ]
    sentence = refused(["--model=builtin:refuser", "--model-action=none", *pools])
    assert "Break the 3th door" in sentence and "harmless evaluation pool" in sentence


@pytest.mark.parametrize("from_file", [False, True])
def test_finalists_are_none_of_those_that_directions_come_from(
    from_file: bool, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plugin's own pool, and the prompts that a file of directions remembers."""

    monkeypatch.setattr("heretic.main.run", None)
    write_pool(tmp_path / "own.jsonl", HARMFUL)
    write_pool(tmp_path / "fresh.jsonl", [{"text": row["text"].upper()} for row in HARMFUL[:5]])
    source = ["--contrast.bad-prompts.dataset=own.jsonl"]
    if from_file:
        digests = {"known_prompts": [text_digest(row["text"]) for row in HARMFUL]}
        directions = make_directions(random_tensor(9, 1, 128), provenance=digests)
        directions.save(tmp_path / "own.safetensors")
        source = ["--contrast.directions=own.safetensors"]
    sentence = refused(
        [
            "--model=builtin:refuser",
            "--model-action=none",
            *source,
            "--contrast.finalist-prompts.dataset=fresh.jsonl",
        ]
    )
    assert "5 of the 5 finalist prompts are among those that directions are made from" in sentence


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("drugs", "fraud"), "has no effect on directions of which none is shared"),
        (("drugs",), "a range for rest, but one direction has no scale"),
    ],
)
def test_directions_of_a_file_that_share_none_have_no_rest(
    names: tuple[str, ...],
    expected: str,
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("heretic.main.run", None)
    tensor = random_tensor(9, len(names), 128)
    make_directions(tensor, names=names).save(tmp_path / "own.safetensors")
    arguments = ["--model=builtin:refuser", "--model-action=none"]
    arguments += ["--contrast.directions=own.safetensors", '--contrast.search-space={"rest":[0,1]}']
    assert expected in refused(arguments)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("sweep builtin:refuser --output=", "needs a place for its report"),
        ("audit --dataset x --output=", "--output does not work"),
        ("audit --output out", "--dataset is required: give it on the command line."),
        ("sweep builtin:refuser --weights 0.5 0.8", "of --weights as a list ([FIRST,SECOND])"),
        (
            "extract builtin:refuser --output o --contrast.residual-cache pool.jsonl",
            "pool.jsonl is a file: give a folder",
        ),
        (
            "sweep builtin:refuser --output out --storage pool.jsonl",
            "pool.jsonl holds no journal of a study",
        ),
        ("sweep builtin:refuser --output out --storage odd://x", "The storage odd://x cannot be"),
    ],
)
def test_what_is_said_before_a_model_is_loaded(
    command: str,
    expected: str,
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("heretic_contrast.hosts.loading.load_language_model", None)
    write_pool(tmp_path / "pool.jsonl", HARMFUL)
    assert expected in refused(command.split())


def test_settings_of_another_command(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("layers = [6]\n")
    sentence = refused(["extract", "builtin:refuser", "--output=o"])
    assert sentence.startswith('Error: This command has no setting "layers" in config.toml: remove')


def write_pool(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


HARMFUL = [{"text": f"Break the {index}th door", "category": "violence"} for index in range(12)]
HARMLESS = [{"text": f"Paint the {index}th door", "category": "violence"} for index in range(12)]
NO_MAP = "--contrast.classes category"
MAPS = "--contrast.preset paper-unmatched"


@pytest.mark.parametrize(
    ("pools", "options", "expected"),
    [
        ({"bad": HARMFUL[:5]}, MAPS, "Even merged"),
        (
            {"bad": HARMFUL[:5]},
            f"{MAPS} --contrast.small-classes error",
            "5 prompts, fewer than the 9 neurons",
        ),
        (
            {"bad": [{"text": row["text"]} for row in HARMFUL]},
            f"{MAPS} --contrast.category-source column",
            "have no category",
        ),
        (
            {"matched": [{"text": "Brew some tea", "category": "drugs"}]},
            f"--contrast.baseline matched {NO_MAP}",
            '"violence" has no matched',
        ),
        ({"good": HARMFUL[:3] + HARMLESS}, NO_MAP, "stands both"),
        ({"good": []}, NO_MAP, "is empty"),
        (
            {},
            f"--contrast.baseline nearest --contrast.n-neighbors 13 {NO_MAP}",
            "13 neighbors",
        ),
        ({}, f"--contrast.exclude-categories drugs {NO_MAP}", "'drugs' cannot be excluded"),
        (
            {},
            f"--contrast.exclude-categories violence {NO_MAP}",
            "No class of harmful prompts is left",
        ),
        ({}, f"{MAPS} --contrast.winners 10", "10 winners"),
        ({}, "--contrast.winners 2", "winners has no effect on a mean"),
        ({}, "--contrast.svd", "svd has no effect on one direction"),
        (
            {},
            "--contrast.preset arditi --contrast.winners 2",
            "winners has no effect on a mean: give the method som",
        ),
        ({}, "--contrast.category-source lexicon", "category_source has no effect on one"),
        ({}, f"{MAPS} --contrast.svd-rank 2", "svd_rank has no effect without svd"),
        ({}, "--contrast.baseline matched --contrast.mixing 0.3", "another baseline than mixed"),
        ({}, f"{MAPS} --contrast.n-neighbors 5", "another baseline than nearest"),
        ({}, "--contrast.divergence-tokens 5", "divergence_tokens has no effect on the divergence"),
        ({}, '--contrast.counted-tiers ["EVASIVE"]', "counted_tiers has no effect on markers"),
        ({}, "--contrast.sensitive-prompts.dataset x", "sensitive_prompts has no effect without"),
        ({}, '--contrast.search-space {"rest":[0,1]}', '"rest" in search_space has no effect'),
        (
            {},
            '--contrast.classes category --contrast.shared-direction --contrast.search-space {"scale.shared":[0,1]}',
            '"scale.shared" in search_space has no effect',
        ),
        (
            {},
            '--contrast.judge-model x --contrast.text-classifier-labels {"a":"REFUSE"}',
            "text_classifier_labels has no effect without a text classifier",
        ),
    ],
)
def test_pools(
    refused: Refused,
    pools: dict[str, list[dict[str, str]]],
    options: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What is wrong with prompts is said before a model is loaded: there is none.
    monkeypatch.setattr("heretic_contrast.hosts.loading.open_model", None)
    monkeypatch.setattr("heretic.main.run", None)
    output = tmp_path / "directions.safetensors"
    output.write_bytes(b"kept")
    arguments = ["builtin:refuser", "--response-prefix=", *options.split()]
    for name, rows in {"bad": HARMFUL, "good": HARMLESS, "matched": HARMLESS, **pools}.items():
        path = write_pool(tmp_path / f"{name}.jsonl", rows)
        arguments.append(f"--contrast.{name}-prompts.dataset={path}")
    assert expected in refused(["extract", *arguments, f"--output={output}"])
    assert expected in refused([*arguments, f"--contrast.save-directions={output}"])
    assert output.read_bytes() == b"kept"


@pytest.mark.parametrize(("word", "meant"), [("sweeep", "sweep"), ("exract", "extract")])
def test_a_command_that_there_is_not(word: str, meant: str, refused: Refused) -> None:
    sentence = f"There is no command {word}: did you mean {meant}?"
    assert sentence in refused([word, "builtin:refuser", "--output=x"])


def test_what_is_read_is_not_written_to(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harmful, harmless = (
        Path(write_pool(tmp_path / f"{name}.jsonl", rows))
        for name, rows in (("bad", HARMFUL), ("good", HARMLESS))
    )
    content = harmless.read_bytes()
    # Another name for the same file.
    again = tmp_path / "sub" / ".." / harmless.name
    (tmp_path / "sub").mkdir()
    pools = [
        f"--contrast.bad-prompts.dataset={harmful}",
        f"--contrast.good-prompts.dataset={harmless}",
    ]
    for words in (
        ["audit", f"--dataset={harmless}", f"--output={tmp_path / 'a'}", f"--cleaned={again}"],
        ["extract", "builtin:refuser", *pools, f"--output={again}"],
        ["builtin:refuser", *pools, f"--contrast.save-directions={again}", "--model-action=none"],
    ):
        assert "cannot be written as well" in refused(words)
    assert harmless.read_bytes() == content
    # Parts of a folder that is read, and files that a command names itself.
    monkeypatch.setattr("heretic_contrast.hosts.loading.open_model", None)
    monkeypatch.setattr("heretic.main.run", None)
    shutil.copytree(DATA / "refuser", tmp_path / "model")
    for folder, name in (
        ("pool/data", "train.jsonl"),
        ("a", "audit.json"),
        ("s", "responses.jsonl"),
    ):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(harmful, tmp_path / folder / name)
    (tmp_path / "sweep.json").write_text(sweep().to_json())
    for line in (
        "extract model --output=model/model.safetensors",
        "model --bad-evaluation-prompts.dataset=bad.jsonl --contrast.save-directions=model/config.json --model-action=none",
        "builtin:refuser --contrast.warm-start=sweep.json --contrast.save-directions=sweep.json --model-action=none",
        "audit --dataset=pool --output=a --cleaned=pool/data/train.jsonl",
        "audit --dataset=a/audit.json --output=a",
        "sweep builtin:refuser --bad-evaluation-prompts.dataset=s/responses.jsonl --output=s",
        "judge bad.jsonl --response-key=text --judge-model=model --output=model/config.json",
    ):
        command, *options = line.split()
        extra = [] if command in ("audit", "judge", "sweep") else pools
        if command not in ("audit", "judge", "extract"):
            extra = [*extra, "--good-evaluation-prompts.dataset=good.jsonl"]
        assert "cannot be written as well" in refused([command, *options, *extra]), line
    assert "JSON Lines" in refused(
        [
            "audit",
            f"--dataset={harmless}",
            f"--output={tmp_path / 'a'}",
            f"--cleaned={tmp_path / 'c.csv'}",
        ]
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--n-harmful 13", "13 prompts are asked for, but the pool has 12"),
        ("--n-harmful 1", "1 prompts cannot cover 2 categories"),
        ("--n-references 12", "10 canaries and 12 reference prompts are asked for"),
        ("--n-canaries 8 --n-references 8", "8 canaries and 8 reference prompts"),
        ("--weights [0.5,0.3]", "increasing weights"),
        ("--layers 2,x", "layers"),
        ("--evaluate-categories drugs", 'has the category "drugs"'),
        ("--contrast.directions missing.safetensors", "There is no directions file"),
        (f"{MAPS} --contrast.small-classes error", "fewer than the 9 neurons"),
        (f"{MAPS} --contrast.winners 10", "10 winners"),
        (
            "--contrast.preset som-sequential --contrast.preset arditi --contrast.winners 17",
            "With the preset som-sequential: 17 winners",
        ),
        (
            "--contrast.preset paper-matched --contrast.preset arditi --contrast.mixing 0.3",
            "mixing has no effect with another baseline than mixed",
        ),
        ("--contrast.baseline nearest --contrast.n-neighbors 13", "13 neighbors"),
        ("--bad-evaluation-prompts.dataset bad.jsonl", "All 24 harmful evaluation prompts"),
        ("--pairs missing.jsonl", "missing.jsonl"),
    ],
)
def test_sweeps_that_do_not_work_load_no_model(
    refused: Refused, options: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heretic_contrast.hosts.loading.open_model", None)
    write_pool(
        tmp_path / "bad.jsonl",
        [
            {"text": f"{verb} door {index}", "category": verb}
            for verb in ("Break", "Burn", "Bend")
            for index in range(8)
        ],
    )
    write_pool(tmp_path / "good.jsonl", HARMLESS)
    write_pool(
        tmp_path / "harmful.jsonl",
        [{"text": f"Smash {index}", "category": ("a", "b")[index % 2]} for index in range(12)],
    )
    write_pool(tmp_path / "harmless.jsonl", [{"text": f"Clean {index}"} for index in range(12)])
    arguments = [
        "sweep",
        "--model",
        "builtin:refuser",
        "--output=out",
        "--contrast.bad-prompts.dataset=bad.jsonl",
        "--contrast.good-prompts.dataset=good.jsonl",
        "--bad-evaluation-prompts.dataset=harmful.jsonl",
        "--good-evaluation-prompts.dataset=harmless.jsonl",
        *options.split(),
    ]
    assert expected in refused(arguments)


def test_a_model_that_lacks_what_is_swept_is_asked_nothing(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heretic_contrast.hosts.loading.with_common_prefix", None)
    arguments = ["sweep", "builtin:refuser", "--output=out", "--batch-size=4", "--layers=0"]
    sentence = refused([*arguments, "--components=self_attn.o_proj"])
    assert "Layer 0 of builtin:refuser has nothing of the components" in sentence


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "missing"])
def test_damaged_directions_file(damage: str, refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "directions.safetensors"
    make_directions(torch.ones(9, 1, 128)).save(path)
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-100])
    elif damage == "flipped":
        path.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    elif damage == "text":
        path.write_text("not a tensor")
    else:
        path.unlink()
    options = ["--response-prefix=", "--batch-size=16", "--model", "builtin:refuser"]
    assert str(path) in refused([f"--contrast.directions={path}", *options])


def test_only_what_was_given_counts_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    # The menu asks for a baseline only where neither a baseline nor a preset was given.
    from heretic_contrast.hosts.settings import HostSettings, load_settings

    monkeypatch.setattr(sys, "argv", [])
    plain = load_settings(HostSettings, "heretic-contrast", ["builtin:refuser"])
    assert not {"baseline", "preset", "directions"} & plain.contrast.model_fields_set
    preset = load_settings(
        HostSettings, "heretic-contrast", ["--contrast.preset=arditi", "--model=builtin:refuser"]
    )
    assert "preset" in preset.contrast.model_fields_set


def test_folders_that_were_made_for_nothing_are_removed(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "kept" / "empty").mkdir(parents=True)
    for output in ("new/deep/sweep", "kept/sweep", "kept/empty"):
        sentence = refused(["sweep", "builtin:refuser", f"--output={output}", "--pairs=missing"])
        assert "missing" in sentence
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "kept"]


def test_the_reports_of_a_sweep_and_of_an_extraction_stay_apart(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their files have the same names: each would replace half of the other."""

    monkeypatch.setattr("heretic_contrast.hosts.loading.open_model", None)
    for name in ("sweep.json", "sweep.journal"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        sentence = refused(["extract", "builtin:refuser", f"--report={name}"])
        assert f"{name} holds the report of a sweep ({name})" in sentence
        assert sentence.endswith("give another --report.")
    extracted = tmp_path / "extracted"
    extracted.mkdir()
    (extracted / "classes.csv").touch()
    arguments = ["sweep", "builtin:refuser", "--output=extracted"]
    sentence = refused([*arguments, "--pairs=missing"])
    assert "extracted holds the report of an extraction (classes.csv)" in sentence
    assert sentence.endswith("give another output.")
    assert [path.name for path in extracted.iterdir()] == ["classes.csv"]
    # Earlier versions wrote both, and a sweep goes on where it has begun.
    (extracted / "sweep.json").touch()
    assert "missing" in refused([*arguments, "--pairs=missing"])
