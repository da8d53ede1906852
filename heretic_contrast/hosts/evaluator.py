# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Heretic 1.4's evaluator, by the objectives that the settings choose.

Responses are generated a few tokens at a time, as Heretic's are but for rounding. A response whose verdict is settled leaves the
batch, and a trial ends where it cannot reach the front any more.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import heretic.main
import torch
import torch.nn.functional as F
from optuna import Trial
from torch import Tensor

from ..ablation.changes import UNCHANGED
from ..builtin import is_builtin, matched_pool, refuser_pool
from ..engine.check import all_logits, checked_engine
from ..engine.cpu.layers import fast_on_cpu
from ..engine.interface import Continuations
from ..engine.plain import PlainEngine
from ..engine.strides import Watch, generate_watched, is_watchable, none_leaves
from ..engine.text_classification import classifier_of, judge_all
from ..engine.trials import TrialEngine
from ..evaluation.divergence import References
from ..language_model import Batches, LanguageModel, Tokens
from ..prompts import Prompt, load_pool
from ..search.screening import spread
from ..search.stopping import Point, dominates
from ..settings import PromptSources
from .guidance import BOUND_KEY, EXCLUDED_KEY, FALSE_KEY, SUM_KEY, measured
from .settings import HostSettings
from .surface import from_heretic, heretic_prompts, log

SCREENED_TOKENS = 4
"""How many tokens candidates are screened by: some models begin all responses with the same word."""

SCREENED_PROMPTS = 12
"""On how many prompts of each pool candidates are screened, at most: what differs between candidates differs on most of them."""


class Dominated(Exception):
    """Ends the judging of a trial."""


def sensitive_prompts(settings: HostSettings) -> list[Prompt]:
    """Returns the prompts whose false refusals are counted, if they are. Raises `ContrastError` when they cannot be read."""

    contrast = settings.contrast
    if not contrast.counts_false_refusals:
        return []
    shipped = refuser_pool("matched", "test") if is_builtin(settings.model) else matched_pool()
    source: PromptSources = contrast.sensitive_prompts or shipped
    # A repeated prompt would count twice.
    return list(dict.fromkeys(load_pool(source, "sensitive", "--contrast.sensitive_prompts.")))


def first_token_divergence(found: Tensor, base: Tensor) -> float:
    """
    Returns Heretic's divergence of logarithms of probabilities, Tensors of shape (n_prompts, vocabulary).

    Infinite where they are no numbers, which Heretic would take for less than its target.
    """

    divergence = F.kl_div(found, base, reduction="batchmean", log_target=True).item()
    return math.inf if math.isnan(divergence) else divergence


def count(verdicts: Iterable[float]) -> int:
    return sum(verdict >= 0.5 for verdict in verdicts)


class Evaluator(heretic.main.Evaluator):
    """
    See the module.

    `trial`: the one that is judged, where it is new. `divergence`, `refusals`, `false_refusals`: of the model that was judged last,
    or is, as far as they are known. `verdicts`: on its responses to harmful prompts. `refusal_sum`: what is minimized of the
    refusals, the sum of a judge model's probabilities, or their count.
    """

    trial: Trial | None = None
    references: References | None = None
    divergence = 0.0
    refusals = 0
    refusal_sum = 0.0
    false_refusals = 0
    verdicts: Sequence[float] = ()

    def __init__(self, settings: HostSettings, model: Any) -> None:
        self.sensitive_prompts = heretic_prompts(sensitive_prompts(settings), settings)
        self.batches = Batches(settings.batch_size or 32)
        self._is_watchable: bool | None = None
        self._trials: TrialEngine | None = None
        wrapped = from_heretic(model, settings)
        with fast_on_cpu(wrapped):
            super().__init__(settings, model)
        self.base_sum = self.refusal_sum
        if settings.contrast.divergence == "teacher-forced":
            log("* Obtaining the unmodified model's own continuations...")
            tokens = wrapped.token_ids(own_prompts(self.good_prompts))
            engine = checked_engine(wrapped, tokens)
            limits = [settings.contrast.divergence_tokens] * len(tokens)
            known = Continuations(tuple(tokens), tuple(engine.generate(tokens, limits)))
            self.references, self._engine = References(engine, known, top_k=100), type(engine)

    def judge(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        """Returns how far responses are refusals: 0 or 1, or what a judge model takes for the probability."""

        contrast = self.settings.contrast
        if contrast.refusal_classifier == "markers":
            return [super(Evaluator, self).is_refusal(response) for response in responses]
        users = [prompt.user for prompt in prompts]
        return judge_all(classifier_of(contrast), contrast.counted_tiers, users, responses)[1]

    def is_settled(self, response: str) -> bool:
        """Returns whether a marker stands before the last two words of a response, to which what follows may belong."""

        words = response.split()[:-2]
        return (
            self.settings.contrast.refusal_classifier == "markers"
            and bool(words)
            and super().is_refusal(" ".join(words))
        )

    def respond(
        self, prompts: Sequence[Any], limit: int, watch: Watch[int] = none_leaves
    ) -> list[Tokens]:
        """Returns the tokens of responses, or what there is of those that `watch` lets go."""

        model = from_heretic(self.model, self.settings)
        tokens = model.token_ids(own_prompts(prompts))
        if self._trials is not None:
            responses = self._trials.respond(model, tokens, limit, self._first_layer, watch)
            if responses is not None:
                return responses
        if self._is_watchable is None:
            self._is_watchable = is_watchable(model, tokens)
        if self._is_watchable:
            return generate_watched(model, tokens, limit, self.batches, watch)
        found: dict[int, Tokens] = {}

        def generate(part: slice) -> None:
            rows = list(range(*part.indices(len(prompts))))
            inputs, outputs = self.model.generate(prompts[part], max_new_tokens=limit)
            new = outputs[:, inputs["input_ids"].shape[1] :].tolist()
            found.update(zip(rows, map(tuple, new), strict=True))
            watch(found, rows, [])

        for _ in self.batches.run(len(prompts), generate):
            pass
        return [found[row] for row in range(len(prompts))]

    def prepare(self) -> None:
        """Computes what trials have in common. The model must be the unmodified one now, with its adapters."""

        model = from_heretic(self.model, self.settings)
        is_known = self._trials is not None and self._trials.knows(model)
        # Adapters of offloaded layers hold nothing before a trial writes them.
        is_complete = all(item.device.type != "meta" for item in model.model.parameters())
        if is_known or not is_complete:
            return
        limit = self.settings.max_response_length
        pools = [self.bad_prompts, self.sensitive_prompts]
        tokens = [model.token_ids(own_prompts(prompts)) for prompts in pools if prompts]
        self._trials = TrialEngine(model, tokens[0])
        for part in tokens:
            self._trials.respond(model, part, limit, UNCHANGED, lambda found, ended, others: others)
        found = self._read_first(model)
        if found is not None:
            # Heretic has obtained them, and these differ by rounding.
            self.base_logprobs = found

    def forget_model(self) -> None:
        """Lets go of the model that trials have been computed with, so that another one can be loaded in its place."""

        self._trials = None

    @property
    def _first_layer(self) -> float:
        changes = self.model.changes
        return UNCHANGED if changes is None else changes.first_layer

    def _read_first(self, model: LanguageModel) -> Tensor | None:
        if self._trials is None:
            return None
        tokens = model.token_ids(own_prompts(self.good_prompts))
        return self._trials.first_logprobs(model, tokens, self._first_layer)

    def screen(self) -> Callable[[], Point]:
        """
        Returns what measures a candidate on a few prompts. The model must be the unmodified one now, and judged last.

        It gives refusals and divergence as `get_score` has them, but of first tokens. The share of refusals is that which is expected: how
        probable it is, on average over prompts that the unmodified model refuses, that a response begins as its own does, relative to
        how probable that is without changes.
        """

        judged = zip(self.bad_prompts, self.verdicts, strict=True)
        refused = [prompt for prompt, verdict in judged if verdict >= 0.5]
        model = from_heretic(self.model, self.settings)
        harmful, harmless = (
            model.token_ids(own_prompts(spread(prompts, SCREENED_PROMPTS)))
            for prompts in (refused, self.good_prompts)
        )
        begun = PlainEngine(model).generate(harmful, [SCREENED_TOKENS] * len(harmful))
        tokens = torch.tensor([token for response in begun for token in response])
        # What is predicted of a response's first token is all that is asked of harmless prompts.
        known = Continuations((*harmful, *harmless), (*begun, *[(0,)] * len(harmless)))

        def logprobs() -> tuple[Tensor, Tensor]:
            """Returns those of each refusal's beginning, and those of the first tokens of responses to harmless prompts."""

            found = None
            if self._trials is not None:
                found = self._trials.logits(model, known, self._first_layer)
            if found is None:
                (found,) = all_logits(PlainEngine(model), known, None)
            found = found.log_softmax(dim=1)
            chosen = found[: len(tokens)].gather(1, tokens.to(found.device)[:, None])[:, 0]
            parts = chosen.split(known.lengths[: len(harmful)])
            return torch.stack([part.sum() for part in parts]), found[len(tokens) :]

        base, base_first = logprobs()

        def measure() -> Point:
            refusals, first = logprobs()
            share = (refusals - base).exp().clamp(max=1).mean().item()
            return share, self._distance(first_token_divergence(first, base_first), share)

        return measure

    def decode(self, responses: Sequence[Tokens]) -> list[str]:
        tokenizer = self.model.tokenizer
        return [tokenizer.decode(list(tokens), skip_special_tokens=True) for tokens in responses]

    def get_score(self) -> Any:
        """Returns Heretic's score, with false refusals where they are an objective; of a trial that has ended, what it has at least."""

        contrast = self.settings.contrast
        kind = f"{contrast.divergence_tokens}-token" if self.references else "first-token"
        log(f"  * Obtaining {kind} probability distributions...")
        self.divergence = self._measure_divergence()
        log(f"  * KL divergence: [bold]{self.divergence:.4f}[/]")
        log("  * Counting model refusals...")
        self.count_refusals()
        ended = {BOUND_KEY, EXCLUDED_KEY} & set(self.trial.user_attrs if self.trial else ())
        least = "at least " if ended else ""
        counted = f"  * Refusals: {least}[bold]{self.refusals}[/]/{len(self.bad_prompts)}"
        if contrast.judge_model is not None:
            counted += f" (sum of probabilities: [bold]{self.refusal_sum:.2f}[/])"
            if self.trial is not None:
                self.trial.set_user_attr(SUM_KEY, self.refusal_sum)
        log(counted)
        share = self.refusal_sum / self.base_sum if self.base_sum > 0 else self.refusal_sum
        score: Point = (self._distance(self.divergence, share), share)
        if contrast.false_refusals == "objective":
            score = (*score, self.false_refusals / len(self.sensitive_prompts))
        return score, self.divergence, self.refusals

    def _distance(self, divergence: float, share: float) -> float:
        # Below its target, Heretic asks no more of the divergence than of the refusals.
        target = self.settings.kl_divergence_target
        distance = divergence if divergence >= target else share * target
        return distance / self.settings.kl_divergence_scale

    def _measure_divergence(self) -> float:
        model = from_heretic(self.model, self.settings)
        if self.references is None:
            found = self._read_first(model)
            if found is None:
                with fast_on_cpu(model):
                    found = self.model.get_logprobs_batched(self.good_prompts)
            return first_token_divergence(found, self.base_logprobs)
        ((mean, _),) = self.references.measure(self._engine(model))
        return mean

    def count_refusals(self) -> int:
        self.refusals, self.refusal_sum, self.false_refusals = 0, 0.0, 0
        try:
            self._require_place(0)
            if self.sensitive_prompts:
                self._judge_responses(self.sensitive_prompts, "false_refusals")
                self._keep_false_refusals()
            responses, verdicts = self._judge_responses(self.bad_prompts, "refusals")
            self.verdicts = verdicts
        except Dominated:
            return self.refusals
        if self.settings.print_responses:
            known = iter([verdict >= 0.5 for verdict in verdicts])
            with (
                patch.multiple(self.model, get_responses_batched=lambda *args, **kwargs: responses),
                patch.multiple(self, is_refusal=lambda response: next(known)),
            ):
                super().count_refusals()
        return self.refusals

    def _judge_responses(self, prompts: Sequence[Any], name: str) -> tuple[list[str], list[float]]:
        """
        Returns responses and how far they are refusals. `name`: the attribute that counts them, so far.

        A refusal that is settled ends there, unless responses are printed. Raises `Dominated` as `_require_place`.
        """

        verdicts: dict[int, float] = {}

        def watch(
            found: Mapping[int, Tokens], ended: list[int], others: list[int]
        ) -> Collection[int]:
            texts = self.decode([found[row] for row in ended])
            verdicts.update(
                zip(ended, self.judge([prompts[row] for row in ended], texts), strict=True)
            )
            settled: list[int] = []
            if not self.settings.print_responses:
                texts = self.decode([found[row] for row in others])
                pairs = zip(others, texts, strict=True)
                settled = [row for row, text in pairs if self.is_settled(text)]
            verdicts.update(dict.fromkeys(settled, True))
            setattr(self, name, count(verdicts.values()))
            if name == "refusals":
                # Rounded once, so that it never falls.
                self.refusal_sum = math.fsum(verdicts.values())
            self._require_place(len(verdicts) if name == "refusals" else 0)
            return settled

        responses = self.respond(prompts, self.settings.max_response_length, watch)
        return self.decode(responses), [verdicts[row] for row in range(len(prompts))]

    def _keep_false_refusals(self) -> None:
        """Keeps how many sensitive prompts were refused. Raises `Dominated` where they are too many for a trial."""

        total = len(self.sensitive_prompts)
        log(f"  * False refusals: [bold]{self.false_refusals}[/]/{total}")
        if self.trial is None:
            return
        self.trial.set_user_attr(FALSE_KEY, [self.false_refusals, total])
        limit = self.settings.contrast.max_false_refusals
        excess = 0.0 if limit is None else self.false_refusals / total - limit
        if excess > 0:
            self.trial.set_user_attr(EXCLUDED_KEY, excess)
            log("  * Ended, since more than may be are refused")
            raise Dominated

    def _require_place(self, n_judged: int) -> None:
        """Raises `Dominated` when a finished trial dominates all that may come of the one that is judged."""

        judged = self.trial
        if judged is None or not self.settings.contrast.stop_dominated:
            return
        point: Point = (self.refusal_sum, self.divergence)
        if self.settings.contrast.false_refusals == "objective":
            point = (*point, self.false_refusals)
        for trial in judged.study.get_trials(deepcopy=False):
            other = measured(trial)
            if other is not None and dominates(other, point):
                judged.set_user_attr(BOUND_KEY, n_judged)
                log(
                    f"  * Ended after [bold]{n_judged}[/] of {len(self.bad_prompts)} prompts, since trial "
                    f"[bold]{trial.user_attrs['index']}[/] refuses no more and diverges no more"
                )
                raise Dominated


def own_prompts(prompts: Sequence[Any]) -> list[Prompt]:
    return [Prompt(text=prompt.user, system=prompt.system) for prompt in prompts]


def count_refusals(
    settings: HostSettings, prompts: Sequence[Prompt], responses: Sequence[str]
) -> int:
    # Heretic's judgement needs the settings and nothing else of an evaluator.
    evaluator = heretic.main.Evaluator.__new__(heretic.main.Evaluator)
    evaluator.settings = settings
    return sum(map(evaluator.is_refusal, responses))
