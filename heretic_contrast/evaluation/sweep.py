# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The fixed-weight sweep: the paper's evaluator (section 3.3).

Each layer alone, at each weight, all directions of the layer at uniform weight: which layers are functional, which
successful, and at what cost. Interventions are forward hooks, so the model is loaded once and never changed.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import combinations
from typing import NamedTuple

import torch

from ..ablation.hooks import Intervention, output_projections
from ..ablation.operator import Operator, effective_weight, weight_along
from ..ablation.writers import writers_digest
from ..directions.pools import Log
from ..directions.sources import ShowProgress
from ..engine.check import checked_engine
from ..engine.interface import Continuations
from ..engine.plain import PlainEngine
from ..engine.text_classification import Classifier, classifier_of, classify_all, rules_digest
from ..errors import ContrastError
from ..identity import Identity, identify
from ..language_model import LanguageModel, Progress, Tokens
from ..prompts import Prompt, prompts_digest
from ..tiers.coherence import is_coherent, normalized_bigram_entropy
from ..tiers.responses import Tier, classify_response
from .cells import Cell, CellKey, Measurement, SweepResult, Synergy, Verdict, best_layers
from .divergence import References
from .geometry import measure_directions
from .plan import Configurations, PreparedSweep, SweepOptions, SweepPlan, plan_sweep
from .plan_settings import check_weights
from .results import CaptureResult, Geometry
from .storage import SweepState


class Judged(NamedTuple):
    """What a state of the model responds, and what was made of it: fields of a `Cell`."""

    measurement: Measurement
    responses: tuple[str, ...]
    canary_responses: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    canary_verdicts: tuple[Verdict, ...]


class SweepEvaluator:
    """
    Measures cells on a loaded model. The unmodified model is run once, when the evaluator is made (paper, section 3.3).

    `engine`: runs the model; the fast one if not given, where it does not differ from the plain one.
    """

    def __init__(
        self,
        model: LanguageModel,
        plan: SweepPlan,
        classify: Classifier = classify_response,
        engine: PlainEngine | None = None,
    ) -> None:
        # Its weights are read once.
        model = model.identified()
        check_plan(model, plan)
        self.model = model
        self.plan = plan
        self.configurations = plan.configurations
        self.options = options = plan.options
        self._classify = classify
        # Both are answered in the same passes.
        answered = (*plan.harmful, *plan.canaries)
        tokens = tuple(model.token_ids((*answered, *plan.references)))
        self._engine = checked_engine(model, tokens) if engine is None else engine
        # The unmodified model answers everything in one go, since a step takes hardly longer for more rows.
        generated = tuple(
            self._engine.generate(
                tokens,
                [options.max_new_tokens] * len(answered)
                + [options.kl_tokens] * len(plan.references),
            )
        )
        n = len(answered)
        self._nothing = Intervention(
            {0: Operator(torch.zeros(1, model.hidden_size), torch.zeros(1, 1))}, options.components
        )
        self._known = self._by_the_path_of_cells(Continuations(tokens[:n], generated[:n]))
        self.references = References(
            self._engine, Continuations(tokens[n:], generated[n:]), options.top_k
        )
        # The divergence from itself, by the same path as every cell's.
        kl = self.references.measure(self._engine, [self._nothing])[0]
        self._seen: dict[tuple[str, str], Verdict] = {}
        self._base = self._judged(self._known.tokens, kl, self._seen)
        self.baseline, self.base_responses, *_ = self._base
        if self.baseline.refusals == 0:
            raise ContrastError(
                f"{model.name} refuses none of the {len(plan.harmful)} harmful prompts, so there is nothing to measure: "
                "use other prompts, or a model that refuses."
            )

    def grid(self) -> list[CellKey]:
        """Returns the cells of single layers, from the lowest layer to the highest."""

        return [
            CellKey(configuration, strength, (layer,), weight)
            for layer in swept_layers(self.model, self.options)
            for configuration, item in self.configurations.items()
            for strength in item.strengths(self.options.strengths)
            for weight in self.options.weights
        ]

    def synergy_grid(self, cells: Sequence[Cell]) -> list[CellKey]:
        """
        Returns the sets of the best layers, and their single layers where these were not swept at that weight.

        The best layers are those with the fewest refusals at any weight, then the least divergence.
        """

        options = self.options
        if options.synergy_size < 2:
            return []
        keys = {
            CellKey(name, strength, layers, options.synergy_weight)
            for name, item in self.configurations.items()
            for strength in item.strengths(options.strengths)
            for chosen in combinations(
                sorted(best_layers(cells, name, strength)[: options.n_synergy_layers]),
                options.synergy_size,
            )
            for layers in (chosen, *((layer,) for layer in chosen))
        }
        return sorted(keys, key=lambda key: (key.layers[0], key))

    def synergies(self, cells: Sequence[Cell]) -> tuple[Synergy, ...]:
        """Returns ΔR(set) − max over its layers of ΔR(layer alone), for every set that was measured."""

        by_key = {cell.key(): cell for cell in cells}
        found = []
        for cell in cells:
            if len(cell.layers) < 2:
                continue
            alone = [
                by_key[cell.key()._replace(layers=(layer,))].measurement.refusals
                for layer in cell.layers
            ]
            measured = cell.measurement
            # The baseline cancels: (R₀ − R(set)) − max (R₀ − R(layer)).
            synergy = min(alone) - measured.refusals
            found.append(Synergy(*cell.key(), measured.refusals, synergy, measured.kl_divergence))
        return tuple(found)

    def evaluate(self, keys: Sequence[CellKey], progress: Progress | None = None) -> list[Cell]:
        """
        Measures cells. Those that start at one layer share what lies below it.

        `progress`: told how many cells' worth of prompts have been read, out of how many cells.
        """

        n_read = 0
        n_sequences = len(self._known.prompts) + len(self.references.known.prompts)

        def count(n_more: int) -> None:
            nonlocal n_read
            n_read += n_more
            if progress is not None:
                progress(n_read // n_sequences, len(keys))

        components = self.options.components
        operators, interventions = [], []
        for key in keys:
            item = self.configurations[key.configuration]
            found = {layer: item.operator(layer, key.weight, key.strength) for layer in key.layers}
            operators.append(found)
            embeddings = item.embeddings and components is None
            interventions.append(Intervention(found, components, embeddings))
        limit = self.options.max_new_tokens
        responses = self._engine.respond(self._known, limit, interventions, count)
        kl = self.references.measure(self._engine, interventions, count)
        # Those of earlier calls are left out: a judge's batches, and so its rounding, must not depend on what was measured before.
        seen = self._seen.copy()
        cells = []
        for index, key in enumerate(keys):
            mean = self.configurations[key.configuration].directions.mean_direction
            along = [weight_along(item, mean[at + 1]) for at, item in operators[index].items()]
            cells.append(
                Cell(
                    *key,
                    effective_weight=max(map(effective_weight, operators[index].values())),
                    weight_along_mean=max(along),
                    **self._judged(responses[index], kl[index], seen)._asdict(),
                )
            )
        return cells

    def _by_the_path_of_cells(self, known: Continuations) -> Continuations:
        """
        Returns the unmodified model's responses as a cell without effect would give them.

        In 16 bits, rounding decides between tokens that are almost equally likely, and otherwise in one pass than in steps.
        """

        limit = self.options.max_new_tokens
        for _ in range(limit):
            # By an engine of its own, since engines keep what they know of a continuation.
            engine = type(self._engine)(self.model)
            found = tuple(engine.respond(known, limit, [self._nothing])[0])
            if found == known.tokens:
                break
            # What follows the first difference is new.
            known = Continuations(known.prompts, found)
        return known

    def _judged(
        self,
        tokens: Sequence[Tokens],
        kl: tuple[float, float],
        seen: dict[tuple[str, str], Verdict],
    ) -> Judged:
        """
        Judges responses.

        `kl`: the divergence, and its standard error, which is not a number where there is none. `seen`: verdicts by prompt and
        response, to which new ones are added.
        """

        responses = tuple(
            self.model.tokenizer.batch_decode(list(map(list, tokens)), skip_special_tokens=True)
        )
        n_harmful = len(self.plan.harmful)
        prompts = [prompt.text for prompt in (*self.plan.harmful, *self.plan.canaries)]
        pairs = list(zip(prompts, responses, strict=True))
        new = [pair for pair in dict.fromkeys(pairs) if pair not in seen]
        found = classify_all(
            self._classify, [prompt for prompt, _ in new], [response for _, response in new]
        )
        for pair, tier in zip(new, found, strict=True):
            seen[pair] = Verdict(
                tier=tier.value,
                coherent=is_coherent(pair[1]),
                bigram_entropy=round(normalized_bigram_entropy(pair[1]), 6),
            )
        judged = tuple(seen[pair] for pair in pairs)
        verdicts, canary_verdicts = judged[:n_harmful], judged[n_harmful:]
        tiers = Counter(verdict.tier for verdict in verdicts)
        measurement = Measurement(
            refusals=tiers[Tier.REFUSE.value],
            evasive=tiers[Tier.EVASIVE.value],
            complied=tiers[Tier.COMPLY.value],
            incoherent=sum(not verdict.coherent for verdict in verdicts),
            n_harmful=len(verdicts),
            canary_refusals=sum(verdict.tier == Tier.REFUSE.value for verdict in canary_verdicts),
            n_canaries=len(canary_verdicts),
            kl_divergence=kl[0],
            kl_standard_error=kl[1] if math.isfinite(kl[1]) else None,
        )
        return Judged(
            measurement, responses[:n_harmful], responses[n_harmful:], verdicts, canary_verdicts
        )

    def identity(self) -> Identity:
        """Returns everything that decides the cells: processes that share a storage must agree on it."""

        pools = {
            "harmful": self.plan.harmful,
            "canaries": self.plan.canaries,
            "references": self.plan.references,
        }
        return identify(
            self.model,
            pools,
            # The texts are judged, and shown with their categories.
            texts={name: prompts_digest(pool) for name, pool in pools.items()},
            options=asdict(self.options),
            directions={name: item.key() for name, item in self.configurations.items()},
            rules=rules_digest(self._classify),
            writers=writers_digest(self.model),
        )

    def result(self, cells: Sequence[Cell]) -> SweepResult:
        strengths = [*self.options.strengths, "effective"]
        order = {name: index for index, name in enumerate(self.configurations)}
        cells = sorted(
            cells,
            key=lambda cell: (
                order[cell.configuration],
                strengths.index(cell.strength),
                len(cell.layers),
                cell.layers,
                cell.weight,
            ),
        )
        return SweepResult(
            model=self.model.name,
            baseline=self.baseline,
            cells=tuple(cells),
            synergies=self.synergies(cells),
            prompts=tuple(prompt.text for prompt in self.plan.harmful),
            categories=tuple(prompt.category or "" for prompt in self.plan.harmful),
            canaries=tuple(prompt.text for prompt in self.plan.canaries),
            baseline_responses=self.base_responses,
            baseline_verdicts=self._base.verdicts,
            baseline_canary_responses=self._base.canary_responses,
            baseline_canary_verdicts=self._base.canary_verdicts,
            pools=self.plan.pools,
            settings={
                # As JSON gives it back.
                **json.loads(json.dumps(asdict(self.options))),
                "directions": {name: item.to_dict() for name, item in self.configurations.items()},
            },
            identity=self.model.identity(),
        )


def swept_layers(model: LanguageModel, options: SweepOptions) -> list[int]:
    """Returns the layers that are asked for: all that have any of the components, where none are."""

    if options.layers is not None:
        return list(options.layers)
    layers = range(model.n_layers)
    return [layer for layer in layers if output_projections(model, layer, options.components)]


def check_plan(model: LanguageModel, plan: SweepPlan) -> None:
    """Raises `ContrastError` when something that was asked for cannot be swept on a model."""

    options = plan.options
    if not plan.configurations:
        raise ContrastError("There is nothing to sweep: give at least one configuration.")
    if not plan.harmful or not plan.references:
        raise ContrastError(
            "A sweep needs harmful prompts and harmless reference prompts: give pools with prompts."
        )
    check_weights(options.weights)
    for strength in options.strengths:
        if strength not in ("weight", "effective"):
            raise ContrastError(
                f'There is no strength "{strength}": choose "weight", "effective", or both.'
            )
    check_places(model, options)


def check_places(model: LanguageModel, options: SweepOptions) -> None:
    """Raises `ContrastError` when a model lacks layers or components that are asked for, or too few are to make sets of."""

    for component in options.components or ():
        if not any(
            output_projections(model, layer, (component,)) for layer in range(model.n_layers)
        ):
            raise ContrastError(
                f'{model.name} has no component "{component}": choose from {", ".join(model.component_names)}.'
            )
    layers = swept_layers(model, options)
    if not layers:
        raise ContrastError("No layer is given to sweep: leave the layers out for all of them.")
    n_combined = min(len(layers), options.n_synergy_layers)
    if options.synergy_size > max(2, n_combined):
        raise ContrastError(
            f"Sets of {options.synergy_size} layers are asked for, and there are {n_combined} to make them of: give a smaller synergy_size, "
            "or more layers and synergy_layers."
        )
    for layer in layers:
        if not 0 <= layer < model.n_layers:
            raise ContrastError(
                f"Layer {layer} is out of range: {model.name} has layers 0 to {model.n_layers - 1}."
            )
    for layer in layers:
        if not output_projections(model, layer, options.components):
            wanted = (
                f"of the components {', '.join(options.components)} " if options.components else ""
            )
            raise ContrastError(
                f"Layer {layer} of {model.name} has nothing {wanted}that could be ablated: leave the layer out"
                f"{', or the restriction to components' if wanted else ''}."
            )


def sweep(
    model: LanguageModel,
    configurations: Configurations,
    harmful: Sequence[Prompt],
    canaries: Sequence[Prompt],
    references: Sequence[Prompt],
    options: SweepOptions | None = None,
    storage: str | None = None,
    progress: Progress | None = None,
    classify: Classifier = classify_response,
) -> SweepResult:
    """
    Sweeps a loaded model, and returns every cell.

    `configurations`: by name, directions, or a `Configuration` that says how they are ablated. `harmful`, `canaries`,
    `references`: prompts for the tiers, for false refusals, and for the divergence; those that directions were extracted from
    are left out. `storage`: URL of an Optuna storage, or path of a journal file, that holds finished cells; None keeps them in
    memory.

    Raises `ContrastError` when something that was asked for cannot be swept, or the storage belongs to
    another sweep.
    """

    plan = plan_sweep(configurations, harmful, canaries, references, options)
    for name, item in plan.configurations.items():
        item.directions.require_model(model, name)
    evaluator = SweepEvaluator(model, plan, classify)
    return evaluator.result(run_cells(evaluator, storage, progress))


def run_cells(
    evaluator: SweepEvaluator, storage: str | None, progress: Progress | None
) -> list[Cell]:
    state = SweepState(storage, evaluator.identity())
    single = state.run(evaluator.grid(), evaluator.evaluate, progress)
    # Cells that are asked for together are measured together, also those that are known.
    done = {cell.key() for cell in single}
    rest = [key for key in evaluator.synergy_grid(single) if key not in done]
    return [*single, *state.run(rest, evaluator.evaluate, progress)]


def run_prepared(
    model: LanguageModel,
    prepared: PreparedSweep,
    log: Log,
    show_progress: ShowProgress,
    max_response_length: int,
    batch_size: int = 128,
) -> tuple[SweepResult, CaptureResult, Geometry]:
    """
    Extracts directions and sweeps a loaded model, as the command and Heretic's scorer do.

    `model`: with the response prefix that prompts are read with. `max_response_length`: in tokens, of the responses that a
    filter of the extraction looks at. `batch_size`: the largest in the sweep, unless its settings name another. Raises
    `ContrastError` when something that was asked for cannot be swept, or the storage belongs to another sweep.
    """

    # Before anything is computed that would be lost without it.
    classify = classifier_of(prepared.settings)
    plan = prepared.plan(model, log, show_progress, max_response_length)
    log()
    log("Measuring the unmodified model...")
    batched = replace(model, batch_size=prepared.settings.sweep_batch_size or batch_size)
    evaluator = SweepEvaluator(batched, plan, classify)
    base = evaluator.baseline
    log(f"* Initial refusals: [bold]{base.refusals}[/]/{base.n_harmful}")
    log(f"Sweeping [bold]{len(evaluator.grid())}[/] cells...")
    with show_progress() as progress:
        cells = run_cells(evaluator, prepared.storage, progress)
    log("Measuring capture and geometry...")
    capture, geometry = measure_directions(
        model,
        plan.configurations,
        prepared.pairs,
        plan.harmful,
        [*plan.canaries, *plan.references],
        plan.options.weights,
        plan.options.max_new_tokens,
        classify,
        plan.options.components,
        plan.options.strengths,
    )
    result = evaluator.result(cells)
    if prepared.settings.classifier_name is not None:
        kind = "judge_model" if prepared.settings.judge_model is not None else "text_classifier"
        named = {kind: prepared.settings.classifier_name}
        result = replace(result, settings={**result.settings, **named})
    return result, capture, geometry
