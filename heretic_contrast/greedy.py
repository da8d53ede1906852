# SPDX-License-Identifier: AGPL-3.0-or-later

"""
What a model's own generation settings make of greedy decoding.

A model ships a generation configuration, and `generate(do_sample=False)` follows it: it may penalize, forbid or force
tokens, search with beams, or draft. What it gives is the model's greedy response. Whether that is the most likely token
at each step and nothing else is decided by a list of what is known to leave it so.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import GenerationMixin

from .errors import ContrastError, one_line

WITHOUT_INFLUENCE = frozenset(
    {
        # Given with every call.
        *"""
        do_sample max_length max_new_tokens num_return_sequences return_dict_in_generate
        """.split(),
        # Read when tokens are drawn.
        *"""
        temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff
        """.split(),
        # Read by beam search.
        *"early_stopping length_penalty num_beam_groups diversity_penalty".split(),
        # Read where another model, or the prompt, drafts.
        *"""
        num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
        assistant_lookbehind target_lookbehind assistant_ensemble_weight max_matching_ngram_size
        """.split(),
        # Read by caches of another kind.
        *"cache_config max_cache_len disable_compile".split(),
        # The tokens that end a response end it here as well.
        *"bos_token_id eos_token_id pad_token_id decoder_start_token_id".split(),
        # No settings.
        *"transformers_version _from_model_config".split(),
    }
)
"""Settings that change nothing, whatever they are, where those that are not listed change nothing."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        "num_beams repetition_penalty encoder_repetition_penalty guidance_scale".split(), (1,)
    ),
    # Or False.
    **dict.fromkeys(
        """
        penalty_alpha min_length min_new_tokens no_repeat_ngram_size encoder_no_repeat_ngram_size
        renormalize_logits remove_invalid_values token_healing is_assistant use_mtp
        output_attentions output_hidden_states output_scores output_logits
        """.split(),
        (0,),
    ),
    **dict.fromkeys("suppress_tokens begin_suppress_tokens".split(), ([],)),
    "use_cache": (True,),
    # What models with sliding windows ship, which is the usual cache by now.
    "cache_implementation": ("dynamic", "hybrid"),
}
"""The values of other settings that change nothing, besides None."""

ROW_BY_ROW = frozenset(
    """
    min_length min_new_tokens repetition_penalty encoder_repetition_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids sequence_bias suppress_tokens
    begin_suppress_tokens forced_bos_token_id forced_eos_token_id
    exponential_decay_length_penalty renormalize_logits remove_invalid_values use_cache
    """.split()
)
"""Settings under which responses do not depend on what else is in their batch, as long as nothing is padded."""

METHODS = """
    generate _sample _prefill _prepare_generation_config _get_logits_processor
    _get_stopping_criteria
""".split()
"""What a class of models may replace by a generation of its own."""


def peculiarities(network: Any) -> frozenset[str]:
    """Returns which generation settings may make greedy responses differ from the most likely token at each step."""

    # Adapters are looked through.
    base = getattr(network, "get_base_model", lambda: network)()
    found = {
        name
        for name, value in network.generation_config.to_dict().items()
        if value is not None
        and name not in WITHOUT_INFLUENCE
        and not any(value == neutral for neutral in NEUTRAL.get(name, ()))
    }
    found |= {
        name
        for name in METHODS
        if name in vars(base)
        or getattr(type(base), name, None) is not getattr(GenerationMixin, name, None)
    }
    return frozenset(found)


def is_plainly_greedy(network: Any) -> bool:
    """Returns whether greedy decoding takes the most likely token at each step and nothing else."""

    return not peculiarities(network)


def generation_groups(network: Any, kinds: Sequence[Hashable]) -> list[list[int]]:
    """
    Returns which prompts may be answered together, so that each gets the response that it gets by itself.

    `kinds`: the number of tokens of each, and whatever else must be the same in a batch. Padding is masked, but penalties
    see it: only under plain decoding do prompts of several lengths share a batch. Under settings that nothing is known
    about, none do.
    """

    found = peculiarities(network)
    if not found:
        return [list(range(len(kinds)))]
    if not found <= ROW_BY_ROW:
        return [[index] for index in range(len(kinds))]
    by_kind: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds):
        by_kind.setdefault(kind, []).append(index)
    return list(by_kind.values())


@contextmanager
def explained_settings(network: Any, name: str) -> Iterator[None]:
    """Raises `ContrastError` where generation fails because of its settings. `name`: of the model, for the message."""

    try:
        yield
    except ContrastError:
        raise
    except (ValueError, TypeError, AttributeError, AssertionError, ImportError) as error:
        names = peculiarities(network)
        if not names:
            raise
        reason = one_line(str(error))[:300]
        raise ContrastError(
            f"{name} cannot generate as its generation configuration asks ({', '.join(sorted(names))}: {reason}): "
            "correct its generation_config.json."
        ) from error
