# SPDX-License-Identifier: AGPL-3.0-or-later

"""
A headless run: scorers and their baselines first, then the modifier, trials, and the model of one of them saved.

It asks nothing, looks for no batch size and no response prefix, and neither uploads nor reproduces a model.
"""

import random
from pathlib import Path
from typing import Any

import optuna
import torch
import transformers
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from .config import Settings
from .model import Model
from .modifier import Modifier
from .plugin import Context, load_plugin
from .scorer import Scorer
from .utils import format_exception, print


def start_plugin(settings: Any, namespace: str, entry: Any, base: type) -> Any:
    """Loads a plugin class and instantiates it with its settings."""

    plugin = load_plugin(entry.plugin, base)
    raw = plugin.get_settings_raw(settings.model_extra, namespace, entry.instance_name)
    return plugin(heretic_settings=settings, settings=plugin.validate_settings(raw))


def run() -> None:
    settings: Any = Settings()
    if settings.seed is None:
        settings.seed = random.randint(0, 2**32 - 1)
    transformers.set_seed(settings.seed)
    torch.set_grad_enabled(False)
    name = "".join(sign if sign.isalnum() or sign in "_-" else "--" for sign in settings.model)
    checkpoint = Path(settings.study_checkpoint_dir) / f"{name}.jsonl"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(checkpoint)))
    earlier = storage.get_all_studies()[:1]
    if earlier and settings.evaluate_model is None:
        if settings.checkpoint_action == "continue":
            # Those that are stored come before all others; some are not stored.
            settings = Settings.model_validate_json(earlier[0].user_attrs["settings"])
        else:
            assert settings.checkpoint_action == "restart", "the stand-in asks nothing"
            checkpoint.unlink()
            storage = JournalStorage(JournalFileBackend(str(checkpoint)))
    model = Model(settings)
    assert settings.batch_size and settings.response_prefix is not None, (
        "the stand-in finds neither"
    )

    scorers = [
        (entry, start_plugin(settings, "scorer", entry, Scorer)) for entry in settings.scorers
    ]
    for _, scorer in scorers:
        scorer.init(Context(settings, model))
    for _, scorer in scorers:
        print(f"* Baseline {scorer.get_baseline_score(Context(settings, model)).rich_display}")
    if settings.evaluate_model is not None:
        settings.model = settings.evaluate_model
        model.reset_model()
        for _, scorer in scorers:
            score = scorer.get_score(Context(settings, model))
            print(f"* {scorer.score_name}: {score.rich_display}")
        return
    (entry,) = settings.modifiers
    modifier = start_plugin(settings, "modifier", entry, Modifier)
    modifier.init(Context(settings, model))

    def objective(trial: optuna.Trial) -> tuple[float, ...]:
        context = Context(settings, model)
        parameters = modifier.suggest_parameters(context, trial)
        trial.set_user_attr("parameters", parameters.to_dict())
        print(f"Running trial {trial.number + 1}: {parameters.to_presentation_dict()}")
        modifier.reset_model(context)
        modifier.modify_model(context, parameters)
        return tuple(
            scorer.get_score(context).value
            for entry, scorer in scorers
            if entry.optimization != "none"
        )

    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(
            seed=settings.seed, n_startup_trials=settings.n_startup_trials, multivariate=True
        ),
        directions=[entry.optimization for entry, _ in scorers if entry.optimization != "none"],
        storage=storage,
        study_name="heretic",
        load_if_exists=True,
    )
    study.set_user_attr("settings", settings.model_dump_json())
    study.optimize(objective, n_trials=settings.n_trials - len(study.trials))

    trial = sorted(study.best_trials, key=lambda trial: trial.values)[settings.trial_index]

    def restore() -> None:
        context = Context(settings, model)
        modifier.reset_model(context)
        modifier.modify_model(
            context, modifier.parameters_class.from_dict(trial.user_attrs["parameters"])
        )

    print("Restoring model from trial...")
    restore()
    # An error is shown, and the run ends as if there had been none, as in Heretic.
    try:
        if settings.export_strategy == "adapter":
            model.model.save_pretrained(settings.save_directory)
        else:
            model.get_merged_model().save_pretrained(
                settings.save_directory, max_shard_size=settings.max_shard_size
            )
            model.tokenizer.save_pretrained(settings.save_directory)
            # A model that was merged has lost its adapters.
            restore()
    except Exception as error:
        print(f"[red]Error: {format_exception(error)}[/]")


def main() -> None:
    run()
