# SPDX-License-Identifier: AGPL-3.0-or-later

"""Heretic 1.4's model with 2.0's life cycle: no LoRA adapters at first, and none after a reload."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .released import released

RELEASED = released("config")


class Model(released("model").Model):  # type: ignore[misc]
    lora_rank: int | None = None

    def _apply_lora(self) -> None:
        """1.4 calls this after loading and after reloading, where 2.0 leaves it to the modifier."""

    def apply_lora(self, lora_rank: int) -> None:
        with self.settings_of_1_4(
            row_normalization=RELEASED.RowNormalization.FULL, full_normalization_lora_rank=lora_rank
        ):
            super()._apply_lora()

    @contextmanager
    def settings_of_1_4(self, **values: Any) -> Iterator[None]:
        """Gives the code of 1.4 settings that 2.0 no longer has."""

        settings = self.settings
        self.settings = settings.model_copy(update=values)
        try:
            yield
        finally:
            self.settings = settings

    def reset_model(self) -> bool:
        fast = not self.needs_reload
        super().reset_model()
        return fast

    def get_residuals(
        self, prompts: list[Any], winsorization_quantile: float = 1.0
    ) -> torch.Tensor:
        with self.settings_of_1_4(winsorization_quantile=winsorization_quantile):
            return super().get_residuals(prompts)

    def get_logits_batched(self, prompts: list[Any]) -> torch.Tensor:
        # 1.4 has them normalized, which makes no difference to what is computed from them.
        return self.get_logprobs_batched(prompts)

    def abliterate(self, *args: Any, **kwargs: Any) -> None:
        raise AttributeError("Heretic 2.0's model has no abliterate")
