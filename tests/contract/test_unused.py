# SPDX-License-Identifier: AGPL-3.0-or-later

"""What looks meant for the package in `config.toml` or the environment, and has no effect, is said in one sentence."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from heretic_contrast import ContrastAbliteration, FalseRefusals, FixedWeightSweep
from heretic_contrast.errors import ContrastError
from heretic_contrast.hosts.settings import HostSettings, load_settings
from heretic_contrast.hosts.surface import HAS_PLUGIN_SURFACE
from heretic_contrast.hosts.tables import PluginTables, notice
from heretic_contrast.hosts.unused import ONLY_UNDER_14, config_file
from heretic_contrast.response_scorers import RefusalTiersSettings
from heretic_contrast.settings import ContrastSettings
from tests.contract.conftest import MODEL
from tests.contract.standin import Plugin, make_settings

PLUGIN = "heretic_contrast.ContrastAbliteration"
TABLE = "[modifier.ContrastAbliteration]"

MEANT = [
    ("[contrast]", "[contrast]", TABLE),
    ('contrast = "matched"', '"contrast"', TABLE),
    ("[modifier.Contrast]", "[modifier.Contrast]", TABLE),
    ("[modifier.contrast_ablation]", "[modifier.contrast_ablation]", TABLE),
    ("[modifer.ContrastAbliteration]", "[modifer.ContrastAbliteration]", TABLE),
    ("[Modifier.ContrastAbliteration]", "[Modifier.ContrastAbliteration]", TABLE),
    ("[heretic_contrast]", "[heretic_contrast]", TABLE),
    ("[ContrastAbliteration]", "[ContrastAbliteration]", TABLE),
    ('["modifier.ContrastAbliteration"]', '["modifier.ContrastAbliteration"]', TABLE),
    ('basline = "matched"', '"basline"', f"baseline in {TABLE}"),
    ('baseline = "matched"', '"baseline"', f"baseline in {TABLE}"),
    ('[modifier]\nbaseline = "matched"', '"baseline" in [modifier]', f"baseline in {TABLE}"),
    ('"contrast.baseline" = "matched"', '"contrast.baseline"', f"baseline in {TABLE}"),
    (
        '"modifier.ContrastAbliteration.winner" = 2',
        '"modifier.ContrastAbliteration.winner"',
        f"winners in {TABLE}",
    ),
    (
        '"scorer.FalseRefusals.prompts" = 2',
        '"scorer.FalseRefusals.prompts"',
        "[scorer.FalseRefusals]",
    ),
    ("[matched_prompts]", "[matched_prompts]", f"matched_prompts in {TABLE}"),
    (
        f'modifiers = [{{ plugin = "{PLUGIN}", winner = 2 }}]',
        '"winner" in modifiers',
        f"winners in {TABLE}",
    ),
    (
        f'modifiers = [{{ plugin = "{PLUGIN}", instance = "a" }}]',
        '"instance" in modifiers',
        "instance_name",
    ),
]
"""What a configuration holds, how it is quoted, and what is meant, under either Heretic."""

MEANT_UNDER_20 = [
    ('row_normalization = "pre"', '"row_normalization"', f"row_normalization in {TABLE}"),
    (
        "orthogonalize_direction = false",
        '"orthogonalize_direction"',
        f"orthogonalize_direction in {TABLE}",
    ),
    ("[good_prompts]", "[good_prompts]", f"good_prompts in {TABLE}"),
    ("[modifiers.ContrastAbliteration]", "[modifiers.ContrastAbliteration]", TABLE),
    ("[scorers.RefusalTiers]", "[scorers.RefusalTiers]", "[scorer.RefusalTiers]"),
    ("[scorer.RefusalTier]", "[scorer.RefusalTier]", "[scorer.RefusalTiers]"),
    ("[modifier.RefusalTiers]", "[modifier.RefusalTiers]", "[scorer.RefusalTiers]"),
    ("[RefusalTiers]", "[RefusalTiers]", "[scorer.RefusalTiers]"),
]

OF_OTHERS = [
    "n_trials = 3\nseed = 1\nbatch_size = 2",
    "[modifier.Abliteration]\nrow_normalization = 'full'",
    "[modifier.ARA]\nlora_rank = 3",
    "[modifier.Contrastive]\nscale = 'raw'",
    "[max_memory]\ncpu = '4GB'",
]
"""Heretic's own settings, and tables of other plugins, under either Heretic."""

OF_OTHERS_UNDER_20 = [
    "refusal_markers = ['sorry']\nkl_divergence_scale = 1.0",
    "[scorer.KeywordRate]\nkeywords = ['sorry']",
    "[scorer.RefusalRate]\n[scorer.FalseRefusalRate]\n[scorer.KLDivergence]",
    "[modifier.ContrastAbliteration]\nbatch_size = 2",
    "[scorer.RefusalTiers]\ncount_incoherent = true",
    "[tool]\nscale = 'raw'",
    "batch_sise = 3",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that commands run in."""

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    return tmp_path


def start_under_20(text: str, plugin: Any = ContrastAbliteration, **selected: Any) -> None:
    """
    Goes as far as the plugin looks at the configuration.

    Heretic hands over its plugins from the command line, which hides tables of such a name in the file.
    """

    Path("config.toml").write_text(text)
    options = {"modifiers": [{"plugin": PLUGIN}], "scorers": [], **selected}
    heretic_settings = make_settings(MODEL, {}, **options)
    settings = plugin.validate_settings({})
    # Neither has a context: looking at the configuration comes first.
    plugin(heretic_settings=heretic_settings, settings=settings).init(None)


def refused(text: str, plugin: Any = ContrastAbliteration, **selected: Any) -> str:
    with pytest.raises(ContrastError) as error:
        start_under_20(text, plugin, **selected)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("text", "quoted", "meant"), MEANT + MEANT_UNDER_20)
def test_said_under_heretic_20(text: str, quoted: str, meant: str, folder: Path) -> None:
    expected = f"config.toml has {quoted}, which nothing reads: did you mean {meant}"
    assert refused(text).startswith(expected)


def test_dashes_in_names(folder: Path) -> None:
    """Only flags have them. Of two spellings in one table one would be dropped."""

    own = {"scorers": [{"plugin": "heretic_contrast.FixedWeightSweep", "optimization": "none"}]}
    for table, name, plugin, selected in (
        (TABLE, "som_rows", ContrastAbliteration, {}),
        ("[scorer.FixedWeightSweep]", "synergy_size", FixedWeightSweep, own),
        ("[scorer.FixedWeightSweep.contrast]", "som_rows", FixedWeightSweep, own),
    ):
        dashed = name.replace("_", "-")
        sentence = f'There is no setting "{dashed}" in {table}: did you mean "{name}"?'
        assert refused(f"{table}\n{dashed} = 4", plugin, **selected) == sentence
    if not HAS_PLUGIN_SURFACE:
        Path("config.toml").write_text(f"{TABLE}\nsom-rows = 4\nmethod = 'som'")
        with pytest.raises(ContrastError, match=r'no setting "som-rows" in \[modifier'):
            load_settings(HostSettings, "heretic-contrast", ["--model", MODEL])


@pytest.mark.slow
def test_a_sentence_that_ends_heretic_20_gives_the_exit_code_2() -> None:
    program = (
        "from heretic_contrast.errors import ContrastError\n"
        "from heretic_contrast.hosts.tables import show_errors_as_sentences\n"
        "show_errors_as_sentences()\n"
        "raise ContrastError('This does not work: [do] that.')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert ended.stdout.strip() == "Error: This does not work: [do] that."


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ContrastError", "ValueError"])
def test_optuna_shows_no_traceback_of_a_sentence_that_ends_a_trial(kind: str) -> None:
    program = (
        "import optuna\n"
        "from heretic_contrast.errors import ContrastError\n"
        "from heretic_contrast.hosts.tables import show_errors_as_sentences\n"
        "show_errors_as_sentences()\n"
        "def objective(trial):\n"
        f"    raise {kind}('This does not work: [do] that.')\n"
        "optuna.logging.set_verbosity(optuna.logging.WARNING)\n"
        "optuna.create_study().optimize(objective, n_trials=1)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    is_own = kind == "ContrastError"
    assert ended.returncode == (2 if is_own else 1)
    # The errors of others keep theirs.
    assert ("Traceback" in ended.stderr) != is_own
    assert (ended.stdout.strip() == "Error: This does not work: [do] that.") == is_own


@pytest.mark.parametrize("text", OF_OTHERS + OF_OTHERS_UNDER_20)
def test_nothing_is_said_of_others_under_heretic_20(text: str, folder: Path) -> None:
    # All that is missing is the context.
    with pytest.raises(AttributeError):
        start_under_20(text)


@pytest.mark.skipif(HAS_PLUGIN_SURFACE, reason="needs the host for Heretic 1.4")
@pytest.mark.parametrize(("text", "quoted", "meant"), MEANT)
def test_said_under_heretic_14(text: str, quoted: str, meant: str, folder: Path) -> None:
    Path("config.toml").write_text(text)
    with pytest.raises(ContrastError) as error:
        load_settings(HostSettings, "heretic-contrast", ["--model", MODEL])
    assert str(error.value) == (
        f"config.toml has {quoted}, which nothing reads: did you mean {meant}?"
    )


@pytest.mark.skipif(HAS_PLUGIN_SURFACE, reason="needs the host for Heretic 1.4")
@pytest.mark.parametrize("text", OF_OTHERS)
def test_nothing_is_said_of_others_under_heretic_14(text: str, folder: Path) -> None:
    Path("config.toml").write_text(text)
    load_settings(HostSettings, "heretic-contrast", ["--model", MODEL])


def test_a_scorer_looks_for_its_own_settings(folder: Path) -> None:
    own = {"scorers": [{"plugin": "heretic_contrast.FalseRefusals", "optimization": "none"}]}
    assert "did you mean prompts in [scorer.FalseRefusals]?" in refused(
        "[prompts]", FalseRefusals, **own
    )
    assert "did you mean [modifier.ContrastAbliteration]?" in refused(
        "[modifier.Contrast]", FalseRefusals, **own
    )


@pytest.mark.parametrize("name", sorted(ONLY_UNDER_14))
def test_settings_of_the_host_for_heretic_14(name: str, folder: Path) -> None:
    # Which they are, their descriptions and docs say as well.
    assert name in ContrastSettings.model_fields
    assert refused(f"{TABLE}\n{name} = 1").startswith(
        f'The setting "{name}" in {TABLE} has no effect under Heretic 2.0'
    )


@pytest.mark.parametrize("name", ["bad_evaluation_prompts", "good_evaluation_prompts"])
def test_pools_that_scorers_have_under_heretic_2(name: str, folder: Path) -> None:
    assert refused(f"[{name}]").startswith(
        f"The setting [{name}] in config.toml has no effect under Heretic 2.0"
    )


@pytest.mark.parametrize("namespace", ["modifier", "scorer"])
def test_a_loaded_plugin_has_no_table_in_the_other_namespace(namespace: str, folder: Path) -> None:
    own = {"scorers": [{"plugin": "heretic_contrast.FalseRefusals", "optimization": "none"}]}
    name = "FalseRefusals" if namespace == "modifier" else "ContrastAbliteration"
    other = "scorer" if namespace == "modifier" else "modifier"
    for plugin in (ContrastAbliteration, FalseRefusals):
        assert refused(f"[{namespace}.{name}]", plugin, **own) == (
            f"config.toml has [{namespace}.{name}], which nothing reads: did you mean [{other}.{name}]?"
        )


def test_directions_to_sweep_take_no_settings_of_the_host(folder: Path) -> None:
    own = {"scorers": [{"plugin": "heretic_contrast.FixedWeightSweep", "optimization": "none"}]}
    for name in ("sampler", "save_directions", "search_space"):
        assert refused(
            f"[scorer.FixedWeightSweep.contrast]\n{name} = 'x'", FixedWeightSweep, **own
        ).startswith(
            f'The setting "{name}" in [scorer.FixedWeightSweep.contrast] has no effect under Heretic 2.0'
        )


AS_SHIPPED = """
orthogonalize_direction = true
row_normalization = "full"
winsorization_quantile = 1.0
[bad_prompts]
dataset = "mlabonne/harmful_behaviors"
split = "train[:400]"
column = "text"
residual_plot_label = "x"
"""


def test_what_heretic_ships_is_mentioned_and_no_mistake(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notice.cache_clear()
    with pytest.raises(AttributeError):
        start_under_20(AS_SHIPPED)
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith(
        "* config.toml holds bad_prompts, orthogonalize_direction, row_normalization, winsorization_quantile as Heretic"
    )
    for shipped, other in (("1.0", "0.9"), (":400", ":40"), ("full", "pre")):
        assert "which nothing reads" in refused(AS_SHIPPED.replace(shipped, other))
    if not HAS_PLUGIN_SURFACE:
        # There Heretic reads them itself.
        Path("config.toml").write_text(AS_SHIPPED.partition("[")[0])
        settings = load_settings(HostSettings, "heretic-contrast", ["--model", MODEL])
        assert settings.contrast.row_normalization == "full"


@pytest.mark.parametrize("value", ["matched", [{"baseline": "matched"}]])
def test_what_must_be_a_table(value: Any, folder: Path) -> None:
    for plugin, namespace in ((ContrastAbliteration, "modifier"), (FalseRefusals, "scorer")):
        for name in (plugin.__name__, f"{plugin.__name__}_a"):
            with pytest.raises(ContrastError) as error:
                plugin.get_settings_raw({namespace: {name: value}}, namespace, "a")
            assert f"[{namespace}.{name}] in config.toml must be a table" in str(error.value)
    assert refused("modifier = 'matched'") == (
        f'config.toml has "modifier", which nothing reads: did you mean {TABLE}?'
    )


def test_instances(folder: Path) -> None:
    """Tables of an instance are read where `instance_name` names it, and nowhere else."""

    table = "[modifier.ContrastAbliteration_a]\nbatch_size = 2"
    assert refused(table) == (
        "config.toml has [modifier.ContrastAbliteration_a], which nothing reads: "
        "did you mean [modifier.ContrastAbliteration]?"
    )
    other = [{"plugin": "./modifier.py:ContrastAbliteration", "instance_name": "aa"}]
    assert "did you mean [modifier.ContrastAbliteration_aa]?" in refused(table, modifiers=other)
    same = [{"plugin": PLUGIN, "instance_name": "a"}]
    with pytest.raises(AttributeError):
        start_under_20(table, modifiers=same)
    assert 'no setting "batch_siz" in [modifier.ContrastAbliteration_a]' in refused(
        table.replace("batch_size", "batch_siz"), modifiers=same
    )


INSTANCE = [
    ({"count_incoherent": True}, {"count_incoherent": "x"}, "count_incoherent", "_a"),
    ({"count_incoherent": "x"}, {}, "count_incoherent", ""),
    ({"prompts": {"dataset": "a"}}, {"prompts": {"split": 1}}, "prompts.split", "_a"),
    ({"prompts": {"split": 1}}, {"prompts": {"dataset": "a"}}, "prompts.split", ""),
]
"""The table that all instances have, that of one, and the setting that does not work in which of them."""


@pytest.mark.parametrize(("shared", "own", "name", "table"), INSTANCE)
def test_a_bad_value_is_named_in_the_table_that_holds_it(
    shared: dict[str, Any], own: dict[str, Any], name: str, table: str
) -> None:
    class RefusalTiers(PluginTables, Plugin):
        settings_class = RefusalTiersSettings
        settings: RefusalTiersSettings

    tables = {"scorer": {"RefusalTiers": shared, "RefusalTiers_a": own}}
    with pytest.raises(ContrastError) as error:
        RefusalTiers.validate_settings(RefusalTiers.get_settings_raw(tables, "scorer", "a"))
    place = f"[scorer.RefusalTiers{table}]"
    assert str(error.value).startswith(f'The setting "{name}" in {place} does not work (')


@pytest.mark.parametrize("tables", [{}, {"RefusalTiers": {"count_incoherent": True}}])
def test_what_no_instance_has_is_validated_once(tables: dict[str, Any]) -> None:
    class Counted(RefusalTiersSettings):
        @model_validator(mode="after")
        def count(self) -> "Counted":
            counts.append(1)
            return self

    class RefusalTiers(PluginTables, Plugin):
        settings_class = Counted
        settings: Counted

    counts: list[int] = []
    raw = RefusalTiers.get_settings_raw({"scorer": tables}, "scorer", None)
    assert RefusalTiers.validate_settings(raw).count_incoherent == bool(tables)
    assert len(counts) == 1


def test_a_table_inside_that_of_the_plugin_is_not_one_of_an_instance(folder: Path) -> None:
    named = [{"plugin": PLUGIN, "instance_name": "a"}]
    assert refused("[modifier.ContrastAbliteration.a]\nscale = 'raw'", modifiers=named) == (
        "config.toml has [modifier.ContrastAbliteration.a], which nothing reads: "
        "did you mean [modifier.ContrastAbliteration_a]?"
    )


def test_a_pool_that_cannot_be_loaded_is_named(folder: Path) -> None:
    settings = FalseRefusals.validate_settings({"prompts": {"dataset": "one.txt"}})
    plugin: Any = FalseRefusals(heretic_settings=make_settings(MODEL, {}), settings=settings)
    with pytest.raises(ContrastError) as error:
        plugin.load(None, settings.prompts, "harmless")
    assert "[scorer.FalseRefusals] prompts." in str(error.value)


@pytest.mark.skipif(HAS_PLUGIN_SURFACE, reason="needs the host for Heretic 1.4")
@pytest.mark.parametrize(
    ("text", "flags", "start"),
    [
        (f"{TABLE}\nscale = 'x'", [], f'The setting "scale" in {TABLE} does not work ('),
        (f"{TABLE}\nscale = 'raw'", ["--contrast.scale=x"], "The setting --contrast.scale does"),
        (f"{TABLE}\nbaslin = 1", [], f'There is no setting "baslin" in {TABLE}: did you mean'),
        ("n_trials = 'x'", [], 'The setting "n_trials" in config.toml does not work ('),
        (
            f"{TABLE}\nbad_prompts = [{{split = 'x'}}]",
            [],
            f'The setting "bad_prompts.0.dataset" in {TABLE} is required',
        ),
        ("[contrast]\nscale = 'raw'", [], "config.toml has [contrast], which nothing reads"),
        (
            f"modifiers = [{{ plugin = '{PLUGIN}', instance_name = 'a' }}]\n{TABLE}\nscale = 'raw'\n"
            "[modifier.ContrastAbliteration_a]\nscale = 'x'",
            [],
            'The setting "scale" in [modifier.ContrastAbliteration_a] does not work (',
        ),
    ],
)
def test_values_are_named_where_they_stand(
    text: str, flags: list[str], start: str, folder: Path
) -> None:
    Path("config.toml").write_text(text)
    with pytest.raises(ContrastError) as error:
        load_settings(HostSettings, "heretic-contrast", ["--model", MODEL, *flags])
    assert str(error.value).startswith(start)


@pytest.mark.skipif(HAS_PLUGIN_SURFACE, reason="needs the host for Heretic 1.4")
@pytest.mark.parametrize(
    ("flags", "place"),
    [([], f"{TABLE} "), (["--contrast.bad-prompts.dataset=y"], "--contrast.")],
)
def test_pools_are_named_where_they_stand(flags: list[str], place: str, folder: Path) -> None:
    Path("config.toml").write_text(f"{TABLE}\nbad_prompts = {{dataset = 'x'}}")
    settings = load_settings(HostSettings, "heretic-contrast", ["--model", MODEL, *flags])
    assert settings.contrast_setting == place


@pytest.mark.skipif(HAS_PLUGIN_SURFACE, reason="needs the host for Heretic 1.4")
def test_the_table_of_an_instance_under_heretic_14(folder: Path) -> None:
    Path("config.toml").write_text(
        f"""
        modifiers = [{{ plugin = "{PLUGIN}", instance_name = "a" }}]
        [modifier.ContrastAbliteration]
        batch_size = 2
        seed = 3
        matched_prompts.dataset = "one"
        [modifier.ContrastAbliteration_a]
        seed = 4
        matched_prompts.split = "train"
        """
    )
    contrast = load_settings(HostSettings, "heretic-contrast", ["--model", MODEL]).contrast
    expected = ContrastSettings(
        batch_size=2, seed=4, matched_prompts={"dataset": "one", "split": "train"}
    )
    assert contrast.model_dump(include=expected.model_fields_set) == expected.model_dump(
        include=expected.model_fields_set
    )


def test_modifiers_of_a_heretic_without_them(folder: Path) -> None:
    """The state of July 2026 keeps what it does not know, as Heretic 2.0 does, and loads scorers alone."""

    Path("config.toml").write_text(f'modifiers = [{{ plugin = "{PLUGIN}" }}]')

    class July(BaseSettings):
        model_config = SettingsConfigDict(extra="allow")
        scorers: list[dict[str, Any]] = [{"plugin": "heretic_contrast.FalseRefusals"}]

    settings = July(**config_file())
    with pytest.raises(ContrastError) as error:
        FalseRefusals(heretic_settings=settings, settings=FalseRefusals.validate_settings({})).init(
            None
        )
    assert str(error.value) == (
        'The setting "modifiers" in config.toml names a plugin that this Heretic cannot load, which has no modifiers: install '
        "Heretic 1.4 or 2.0, or remove it."
    )


def test_a_table_of_a_plugin_that_is_not_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may wait for another run, so that it is no mistake; it is mentioned once."""

    # Another test of this process may have met such a table.
    notice.cache_clear()
    for _ in range(2):
        with pytest.raises(AttributeError):
            start_under_20("[scorer.TeacherForcedDivergence]\nn_tokens = 3")
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("[scorer.TeacherForcedDivergence] in config.toml is not used") == 1


@pytest.mark.parametrize(
    "name", ["HERETIC_BASELINE", "HERETIC_CONTRAST_BASLINE", "heretic_contrast__baseline"]
)
def test_environment_variables(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "matched")
    sentence = f"The environment variable {name} has no effect: did you mean baseline in {TABLE} of config.toml?"
    assert refused("") == sentence
    if not HAS_PLUGIN_SURFACE:
        with pytest.raises(ContrastError) as error:
            load_settings(HostSettings, "heretic-contrast", ["--model", MODEL])
        assert str(error.value) == sentence


@pytest.mark.parametrize(
    "name", ["HERETIC_SCORER__REFUSALTIERS__COUNT_INCOHERENT", "HERETIC_SCORER_REFUSAL_TIERS"]
)
def test_environment_variables_of_scorers(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "true")
    assert refused("") == (
        f"The environment variable {name} has no effect: did you mean [scorer.RefusalTiers] of config.toml?"
    )


def test_no_suggestion_leads_to_a_setting_without_effect(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "has no effect under Heretic 2.0"
    assert refused('sampler = "tpe"').startswith(f'The setting "sampler" in config.toml {reason}')
    monkeypatch.setenv("HERETIC_CONTRAST_SAMPLER", "tpe")
    assert f"variable HERETIC_CONTRAST_SAMPLER {reason}" in refused("")


def test_environment_variables_of_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HERETIC_SOURCE", "HERETIC_CONTRAST_REAL_MODEL", "HERETIC_CONTRAST_KILL_SEED"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("HERETIC_N_TRIALS", "3")
    with pytest.raises(AttributeError):
        start_under_20("")
    if not HAS_PLUGIN_SURFACE:
        monkeypatch.setenv("HERETIC_CONTRAST", '{"batch_size": 2}')
        settings = load_settings(HostSettings, "heretic-contrast", ["--model", MODEL])
        assert settings.contrast.batch_size == 2 and settings.n_trials == 3  # type: ignore[attr-defined]
        assert "HERETIC_CONTRAST" in os.environ
