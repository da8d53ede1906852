# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The host for Heretic 1.4: runs the Heretic 2.0 modifier inside 1.4's own `run()`.

Heretic 1.4 has no plugins, but its `run()` reads the classes and functions that it works with from its module's
globals. The host substitutes a few of them for one run, and restores them.
"""

import gc
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import heretic.evaluator
import heretic.main
import heretic.utils
import optuna
import rich.traceback
import torch
from optuna import Trial, create_study
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from rich.markup import escape
from torch import Tensor

from ..ablation.writers import shared_components, writers_digest
from ..builtin import model_name
from ..directions.pools import require_apart
from ..directions.sources import DirectionSources
from ..engine.text_classification import classifier_of, require_judge, rules_digest
from ..errors import ContrastError, find_cause, one_line, raising_causes
from ..identity import OF_THE_MODEL, Identity, differences, identify
from ..journal import CheckedJournal
from ..outputs import remove_empty_directories, require_writable_directory, require_writable_file
from ..prompts import Prompt, load_pool, text_digest
from ..search.parameters import Parameters, require_ranges, require_ranges_of
from ..search.samplers import make_sampler, trial_seed
from ..search.screening import best_candidates
from ..search.stopping import Point
from ..settings import inputs_of
from .answers import TRIAL_QUESTION, Answers, or_nothing, require_answers
from .evaluator import Evaluator, own_prompts, sensitive_prompts
from .finalists import count_refusals, front_choices, require_fresh, second_look
from .guidance import (
    BOUND_KEY,
    EXCLUDED_KEY,
    FALSE_KEY,
    SCREENED_KEY,
    SUM_KEY,
    GuidedStudy,
    Values,
)
from .host_model import HostModel
from .loading import LoadedContext, take_prefix
from .model_folder import require_other_folder
from .record import Made, with_plugin
from .settings import HostSettings, listed, prompt_sources
from .studies import (
    IDENTITY_KEY,
    open_shared,
    own_checkpoints,
    require_same_identity,
)
from .surface import heretic_prompts, log, progress_bar, require_same_vocabulary
from .warm_start import SWEPT, first_trials, fitted

if TYPE_CHECKING:
    from ..modifier import ContrastAbliteration

POOLS = {
    "good_prompts": "harmless",
    "bad_prompts": "harmful",
    "good_evaluation_prompts": "harmless evaluation",
    "bad_evaluation_prompts": "harmful evaluation",
}
"""Heretic's own pools: the names of their settings, and what messages call them."""

MEASURED = ("index", "refusals", SUM_KEY, "n_bad_prompts", "kl_divergence", FALSE_KEY)
"""The trial's user attributes that the record of a saved model has."""

TRIAL_KEY = "contrast"
"""The trial's user attribute that holds the plugin's parameters."""


class Host:
    # Known as soon as Heretic has loaded what they are about.
    evaluator: Evaluator
    context: LoadedContext
    modifier: "ContrastAbliteration"
    parameters: Parameters
    study: Study
    trial: FrozenTrial | None = None

    def __init__(
        self, settings: HostSettings, modifier_class: type["ContrastAbliteration"]
    ) -> None:
        self.settings = settings
        self.answers = Answers(settings, lambda folder: self.made().record(folder).write(folder))
        self.modifier_class = modifier_class
        self.identity: Identity = {}
        self.pools: dict[tuple[str, str], list[Prompt]] = {}
        self.finalist_prompts: list[Prompt] = []
        self.second_look: dict[int, dict[int, int]] = {}
        self.first_trials: list[Values] = []
        self.first_identity: Identity = {}
        self.shared: BaseStorage | None = None

    @cached_property
    def sources(self) -> DirectionSources:
        """Where directions come from; read once, since files change."""

        return DirectionSources({"": self.settings.contrast}, "")

    def settings_class(host) -> type[HostSettings]:
        """Returns the class that stands in for Heretic's settings, which gives those of this run to a study that goes on."""

        class Settings(type(host.settings)):  # type: ignore[misc]
            @classmethod
            def model_validate_json(cls, json_data: Any, **options: Any) -> HostSettings:
                return host.continued(json.loads(json_data))

        return Settings

    def continued(self, stored: dict[str, Any]) -> HostSettings:
        """Returns the settings that are given, with what was decided when a study began, `stored`."""

        given = self.settings.model_fields_set
        return self.settings.model_copy(
            update={
                name: stored[name]
                for name in ("seed", "batch_size", "response_prefix", "n_trials")
                if name not in given or getattr(self.settings, name) is None
            }
        )

    def load_prompts(self, settings: HostSettings, specification: Any) -> list[Any]:
        """Returns the prompts of a pool as Heretic has them: see `pool`. Heretic has said that it loads its own."""

        name = next(name for name in POOLS if getattr(settings, name) is specification)
        if name in settings._replaced_pools:
            for source in listed(getattr(settings.contrast, name)):
                log(f"* [bold]{escape(one_line(source.dataset))}[/] takes their place")
        return heretic_prompts(self.pool(settings, name), settings)

    def pool(self, settings: HostSettings, name: str) -> list[Prompt]:
        """
        Returns the prompts of one of `POOLS`, in any format; what settings name is read once.

        Where the plugin's pool is given and Heretic's is not, it takes the place of Heretic's default. What nothing is asked of
        is not read. Raises `ContrastError` when it cannot be read.
        """

        is_replaced = name in settings._replaced_pools
        source = prompt_sources(getattr(settings.contrast if is_replaced else settings, name))
        key = name, repr(source)
        if key not in self.pools:
            if not (
                is_replaced
                or "evaluation" in name
                or settings.contrast.directions is None
                or (
                    # Heretic looks for none that the file of directions says.
                    settings.response_prefix is None
                    and (
                        settings.evaluate_model is not None or self.sources.response_prefix is None
                    )
                )
                or settings.batch_size == 0
                or settings.print_residual_geometry
                or settings.plot_residuals
            ):
                return []
            where = f"{settings.contrast_setting}{name}." if is_replaced else f"--{name}."
            self.pools[key] = load_pool(source, POOLS[name], where)
        return self.pools[key]

    def start(self) -> None:
        """Runs the modifier's `init` at the point where Heretic computes its own directions."""

        if not self.identity:
            self.modifier.init(self.context)
            self.identity = self._identify()

    def _identify(self) -> Identity:
        model = replace(self.modifier.model(self.context), known_identity=self.modifier.identity)
        pools = {
            "harmful evaluation prompts": self.evaluator.bad_prompts,
            "harmless evaluation prompts": self.evaluator.good_prompts,
        }
        if self.evaluator.sensitive_prompts:
            pools["sensitive prompts"] = self.evaluator.sensitive_prompts
        return identify(
            model,
            {name: own_prompts(prompts) for name, prompts in pools.items()},
            directions=self.modifier.configuration,
            rules=rules_digest(classifier_of(self.modifier.settings)),
            writers=writers_digest(model),
        )

    def _require_own(self, trials: Iterable[FrozenTrial]) -> None:
        """Raises `ContrastError` when trials were measured on something else than what has been loaded."""

        for trial in trials:
            different = differences(trial.user_attrs.get(IDENTITY_KEY, {}), self.identity)
            if different:
                raise ContrastError(
                    f"The checkpoint in {self.settings.study_checkpoint_dir} holds trials that were measured with other "
                    f"{different}: give --checkpoint-action restart to start from scratch, or another --study-checkpoint-dir."
                )

    def model_class(host) -> type[HostModel]:
        class Model(HostModel):
            model: Any

            def __init__(self, settings: HostSettings) -> None:
                if settings.evaluate_model is None:
                    # Before Heretic looks for one.
                    take_prefix(settings, host.sources)
                super().__init__(settings)
                host.context = LoadedContext(self)
                host.modifier = host.modifier_class(
                    heretic_settings=settings, settings=settings.contrast
                )
                if settings.evaluate_model is None:
                    # Those that the record names, whatever the files hold by now.
                    host.modifier.known_pools = host.sources.pools.get("")
                    host.modifier.known_directions = host.sources.loaded.get("")
                    # Before anything is asked of the model.
                    host.modifier.require_changeable(host.modifier.model(host.context))

            def get_residuals_mean(self, prompts: list[Any]) -> Tensor:
                # Heretic's own direction is never used, so its forward passes are saved.
                host.start()
                return torch.zeros(len(self.get_layers()) + 1, 1)

            def get_residuals_batched(self, prompts: list[Any]) -> Tensor:
                # Called for plots and printed geometry, which show the real residuals.
                host.start()
                return super().get_residuals_batched(prompts)

            def get_abliterable_components(self) -> list[str]:
                # Without components, Heretic leaves the search space to the plugin.
                return []

            def reset_model(self) -> bool:
                other = host.settings.evaluate_model
                if other is not None:
                    size = self.model.config.get_text_config().vocab_size
                    try:
                        super().reset_model()
                    except Exception as error:
                        raise ContrastError(
                            f"The model {other} could not be loaded ({one_line(str(error))[:300]}): check --evaluate-model."
                        ) from error
                    require_same_vocabulary(
                        self.model, other, size, model_name(host.settings.model)
                    )
                    return True
                if not self.needs_reload:
                    return super().reset_model()
                # Heretic makes space for the new one, which this would take.
                host.evaluator.forget_model()
                super().reset_model()
                host.modifier.require_same_model(host.context)
                return True

            def abliterate(self, *args: Any, **kwargs: Any) -> None:
                if host.evaluator.trial is not None:
                    # Heretic has just reset the model.
                    host.evaluator.prepare()
                host.modifier.modify_model(host.context, host.parameters)

        return Model

    def get_trial_parameters(self, trial: Any) -> dict[str, str]:
        """Returns what is shown of a trial, before it modifies the model: a live one is sampled here, a stored one restored."""

        self.evaluator.trial = trial if isinstance(trial, Trial) else None
        if isinstance(trial, Trial):
            self._require_own(trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
            trial.set_user_attr(IDENTITY_KEY, self.identity)
            if self.shared is not None:
                # Heretic counts those that it runs itself.
                trial.set_user_attr("index", trial.number + 1)
                log(f"* It is trial [bold]{trial.number + 1}[/] of the shared study")
            self.parameters = self.modifier.suggest_parameters(self.context, trial)
            trial.set_user_attr(TRIAL_KEY, self.parameters.to_dict())
        else:
            stored = Parameters.from_dict(trial.user_attrs.get(TRIAL_KEY, {}))
            self._require_own([trial])
            self.parameters, self.trial = stored, trial
        return self.parameters.to_presentation_dict()

    def make_sampler(self, *args: Any, seed: int, n_startup_trials: int, **kwargs: Any) -> Any:
        contrast = self.modifier.settings
        fixed: dict[str, Any] = {}
        if not self.modifier.directions.aligned:
            # Heretic samples these itself; where they have no meaning they are kept out of the search.
            last_layer_index = self.modifier.model(self.context).n_layers - 1
            fixed = {"direction_scope": "per layer", "direction_index": 0.4 * last_layer_index}

        def is_bound(trial: FrozenTrial) -> list[float]:
            # Its values look better than they are.
            attributes = trial.user_attrs
            return [float(BOUND_KEY in attributes), float(attributes.get(EXCLUDED_KEY, 0.0))]

        if self.first_trials:
            # A study of the same seed would be made once more.
            seed = trial_seed(seed, *self.first_trials)
        may_end = contrast.stop_dominated or contrast.max_false_refusals is not None
        constraints = is_bound if may_end else None
        return make_sampler(contrast.sampler, seed, n_startup_trials, fixed, constraints)

    def select(self, message: str, choices: list[Any]) -> Any:
        """Answers Heretic's questions. Raises `ContrastError` when all trials refuse too many sensitive prompts."""

        contrast = self.settings.contrast
        if message == TRIAL_QUESTION:
            self.answers.require_uninterrupted()
        if message == TRIAL_QUESTION and (contrast.counts_false_refusals or contrast.judge_model):
            choices = front_choices(self.study.get_trials(deepcopy=False), choices)
            limit, is_chosen = contrast.max_false_refusals, self.settings.trial_index is not None
            if isinstance(choices[0].value, str) and is_chosen and limit is not None:
                raise ContrastError(
                    f"Every trial breaks the model, or refuses more than {100 * limit:g}% of the sensitive prompts: allow more of them "
                    "(--contrast.max-false-refusals), or run more trials."
                )
        if message == TRIAL_QUESTION and self.finalist_prompts:
            model = self.context.get_model()
            prompts = heretic_prompts(self.finalist_prompts, self.evaluator.settings)
            n_known = len(self.second_look)
            for choice in choices:
                trial = choice.value
                if isinstance(trial, str) or trial.number in self.second_look:
                    continue
                log(f"* Judging trial [bold]{trial.user_attrs['index']}[/] on fresh prompts...")
                self.get_trial_parameters(trial)
                model.reset_model()
                model.abliterate()
                self.second_look[trial.number] = count_refusals(self.evaluator, prompts)
            choices, table = second_look(
                choices, self.second_look, len(prompts), self.settings.max_response_length
            )
            if len(self.second_look) > n_known:
                log()
                log(table)
        return self.answers.select(message, choices)

    def create_study(self, *args: Any, **kwargs: Any) -> Study:
        if self.settings.contrast.false_refusals == "objective":
            kwargs["directions"] = [*kwargs["directions"], kwargs["directions"][0]]
        study = create_study(*args, **kwargs)
        self.study, settings = study, self.evaluator.settings
        if self.shared is not None:
            require_same_identity(study, self.settings, self.identity)
            stored = json.loads(study.user_attrs.get("settings", "{}")).get("seed")
            if stored not in (None, settings.seed):
                # Another process has begun the study since this one has drawn a seed.
                settings.seed = stored
                study.sampler = self.make_sampler(
                    seed=stored, n_startup_trials=settings.n_startup_trials
                )
        first = []
        if self.first_trials:
            # The parameters and their ranges are known from asking for them.
            trial = create_study(directions=study.directions).ask()
            self.modifier.suggest_parameters(self.context, trial)
            shared = shared_components(self.modifier.model(self.context))
            first = [fitted(values, trial.distributions, shared) for values in self.first_trials]
        if first and not study.trials:
            log(
                f"* Beginning with [bold]{len(first)}[/] trials of {escape(str(self.modifier.settings.warm_start))}"
            )
            made_for = self.first_identity
            different = differences(made_for, self.identity, OF_THE_MODEL) if made_for else ""
            if different:
                log(
                    f"  * [yellow]They were measured on another model of that name, or on another state of this one (other {different}).[/]"
                )
            own = self.modifier.directions.digest()
            if made_for.get(SWEPT, own) != own:
                log(
                    "  * [yellow]They were measured with other directions than those of this search, which have the same name.[/]"
                )
            moved = sum(is_moved for _, is_moved in first)
            if moved:
                log(
                    f"  * [yellow]{moved} of them lie beyond what is searched, and are moved to other layers or weights at the nearest "
                    "end of its ranges: see --contrast.search-space.[/]"
                )

        def ended(n_trials: int) -> None:
            # So many, and no more, are what Heretic takes for a finished study, and adds more to where it is told to.
            settings.n_trials = n_trials

        n_shared = None if self.shared is None else lambda: settings.n_trials
        patience = settings.contrast.patience
        beginning = [values for values, _ in first]
        return GuidedStudy(
            study, lambda: [*beginning, *self.screened(study)], patience, ended, n_shared
        ).study

    def screened(self, study: Study) -> list[Values]:
        """Returns parameters of candidates that a study begins with, where these are asked for; it keeps them when they are chosen."""

        settings, evaluator = self.evaluator.settings, self.evaluator
        n_candidates = settings.contrast.screening
        if n_candidates == 0:
            return []
        if evaluator.base_refusals == 0:
            log(
                "* [yellow]Nothing is screened, since the unmodified model refuses none of the prompts.[/]"
            )
            return []
        if SCREENED_KEY not in study.user_attrs:
            log()
            log(f"Screening [bold]{n_candidates}[/] candidates by the first tokens of responses...")
            model = self.context.get_model()
            model.reset_model()
            evaluator.prepare()
            measure = evaluator.screen()
            with progress_bar() as progress:

                def evaluate(trial: Trial) -> Point:
                    parameters = self.modifier.suggest_parameters(self.context, trial)
                    model.reset_model()
                    self.modifier.modify_model(self.context, parameters)
                    found = measure()
                    progress(trial.number + 1, n_candidates)
                    return found

                sampler = self.make_sampler(
                    seed=trial_seed(settings.seed, "screening"), n_startup_trials=n_candidates // 3
                )
                n_wanted = max(1, settings.n_trials // 3)
                found = best_candidates(
                    evaluate, n_candidates, n_wanted, evaluator.base_refusals, sampler
                )
            log(f"* Beginning with [bold]{len(found)}[/] of them")
            # Another process may have chosen meanwhile.
            if SCREENED_KEY not in study.user_attrs:
                study.set_user_attr(SCREENED_KEY, found)
        return list(study.user_attrs[SCREENED_KEY])

    def make_evaluator(self, *args: Any, **kwargs: Any) -> Evaluator:
        self.evaluator = Evaluator(*args, **kwargs)
        return self.evaluator

    def made(self) -> Made:
        measured = self.trial.user_attrs if self.trial is not None else {}
        model = replace(self.modifier.model(self.context), known_identity=self.modifier.identity)
        return Made(
            self.evaluator.settings,
            self.modifier.settings,
            model,
            self.modifier.directions,
            self.parameters,
            self.sources.named_pools(),
            {name: measured[name] for name in MEASURED if name in measured}
            | (self.evaluator.settings.contrast.objectives() if measured else {}),
        )

    def get_readme_intro(self, *args: Any, **kwargs: Any) -> str:
        record = self.made().record().portable().to_json()
        return with_plugin(heretic.utils.get_readme_intro(*args, **kwargs), self.modifier, record)

    def substitutes(self) -> dict[str, Any]:
        return {
            "Settings": self.settings_class(),
            "Model": self.model_class(),
            "Evaluator": self.make_evaluator,
            "TPESampler": self.make_sampler,
            "load_prompts": self.load_prompts,
            "print": self.answers.show,
            "get_trial_parameters": self.get_trial_parameters,
            "get_readme_intro": self.get_readme_intro,
            "prompt_select": self.select,
            "prompt_path": self.answers.path,
            "prompt_text": or_nothing(heretic.utils.prompt_text),
            "prompt_password": or_nothing(heretic.utils.prompt_password),
            # Plain Heretic could not rebuild the model from a reproduce.json, so none is written.
            "upload_reproduce_folder": lambda *args, **kwargs: None,
            "format_exception": self.answers.format_exception,
            # Nor a journal where the study is kept elsewhere.
            "JournalFileBackend": CheckedJournal
            if self.shared is None
            else lambda *args, **kwargs: None,
            "JournalStorage": lambda journal: self.shared or JournalStorage(journal),
        }


@contextmanager
def substituted(substitutes: dict[str, Any]) -> Iterator[None]:
    """Substitutes names in `heretic.main`. Raises `ContrastError` when one is missing, as in another Heretic."""

    missing = [name for name in substitutes if not hasattr(heretic.main, name)]
    if missing:
        raise ContrastError(
            f"The installed Heretic has no {missing[0]} in heretic.main, so the plugin cannot be hosted in it: "
            "install heretic-llm 1.4, or use Heretic 2.0's --modifiers."
        )
    shown = substitutes["get_trial_parameters"]
    with (
        patch.multiple(heretic.main, **substitutes),
        # The evaluator loads its own prompts, and the model card shows a trial's parameters.
        patch.multiple(heretic.evaluator, load_prompts=substitutes["load_prompts"]),
        patch.multiple(heretic.utils, get_trial_parameters=shown),
    ):
        yield


def run(settings: HostSettings, modifier_class: type["ContrastAbliteration"]) -> None:
    """Raises `ContrastError` when the settings, which Heretic parses again, do not work, or the model was not saved."""

    settings.contrast.require_single_configuration()
    if settings.reproduce is not None or settings.collect_reproducibles is not None:
        raise ContrastError(
            "Reproducing and collecting models is plain Heretic's task, which knows no plugin: run heretic instead."
        )
    if settings.save_directory is not None:
        require_other_folder(Path(settings.save_directory), settings.model)
    host = Host(settings, modifier_class)
    host.first_trials, host.first_identity = first_trials(settings.contrast, settings.model)
    # Evaluating another model, Heretic opens a study that it does not look at.
    is_evaluation = settings.evaluate_model is not None
    host.shared = InMemoryStorage() if is_evaluation else open_shared(settings)
    # Heretic loads its model first, and then finds out that a pool cannot be read.
    pools = {name: host.pool(settings, name) for name in POOLS}
    harmful, harmless = pools["bad_evaluation_prompts"], pools["good_evaluation_prompts"]
    require_apart(harmful, harmless, "harmless evaluation", "counted on both sides")
    require_apart(harmful, sensitive_prompts(settings), "sensitive", "counted on both sides")
    if settings.contrast.finalist_prompts is not None:
        source = settings.contrast.finalist_prompts
        pool = load_pool(source, "finalist", "--contrast.finalist_prompts.")
        # A repeated prompt would make intervals too narrow.
        host.finalist_prompts = list(dict.fromkeys(pool))
        require_fresh(host.finalist_prompts, {text_digest(prompt.text) for prompt in harmful})
    if not is_evaluation:
        # Whatever can be wrong with prompts, or with a file of directions, is said before Heretic loads a model.
        space = settings.contrast.search_space
        require_ranges(space, "direction", host.sources.names(""))
        for directions in host.sources.loaded.values():
            require_ranges_of(directions, space)
        used = host.sources.used_prompts()
        require_fresh(host.finalist_prompts, used.digests)
        for name in ("bad_evaluation_prompts", "good_evaluation_prompts"):
            n_known = len(used.among(pools[name]))
            if n_known:
                log(
                    f"[yellow]* {n_known} of the {len(pools[name])} {POOLS[name]} prompts are among those that directions "
                    "are made from, and say less about prompts that are new.[/]"
                )
    require_answers(settings)
    require_judge(settings.contrast, settings.contrast.counted_tiers)
    require_writable_directory(Path(settings.study_checkpoint_dir))
    if settings.save_directory is not None:
        require_writable_directory(Path(settings.save_directory))
    if settings.contrast.save_directions is not None:
        read = inputs_of(settings.model_dump(mode="json"))
        require_writable_file(Path(settings.contrast.save_directions), read)
    # Heretic's main() would show an interruption as an ordinary end.
    rich.traceback.install()
    answers = host.answers
    # Heretic collects garbage after each batch, and need not look through all that was imported: up to 0.8 s each time.
    gc.freeze()
    try:
        with (
            own_checkpoints(settings),
            substituted(host.substitutes()),
            patch.multiple(optuna, create_study=host.create_study),
            answers.noticing_interruption(),
            raising_causes(),
        ):
            heretic.main.run()
    except Exception as error:
        if isinstance(error, ContrastError) or find_cause(error, EOFError) is None:
            raise
        raise ContrastError(
            "The terminal was closed at a question; the study is kept: give --checkpoint-action continue to go on."
        ) from error
    finally:
        answers.discard_unfinished()
        if host.shared is not None:
            # The folder of a checkpoint, which is kept elsewhere.
            remove_empty_directories()
    answers.require_success()
