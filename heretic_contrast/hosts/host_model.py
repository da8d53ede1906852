# SPDX-License-Identifier: AGPL-3.0-or-later

"""Heretic 1.4's model, as Heretic 2.0 has it: with LoRA adapters on request."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest.mock import patch

from heretic.config import RowNormalization

from ..ablation.changes import Changes
from .loading import ChatModel


class HostModel(ChatModel):
    needs_reload: bool
    lora_rank: int | None = None
    changes: Changes | None = None
    adapting: Callable[[], AbstractContextManager[None]]

    def apply_lora(self, rank: int) -> None:
        """Applies LoRA adapters of a rank, now and after every reload."""

        self.lora_rank = rank
        self._apply_lora()

    def _apply_lora(self) -> None:
        # Heretic's constructor calls this before the directions are known.
        if self.lora_rank is None:
            return
        # Heretic reads the rank from its settings under "full" row normalization, and takes 1 otherwise.
        settings = self.settings.model_copy(
            update={
                "row_normalization": RowNormalization.FULL,
                "full_normalization_lora_rank": self.lora_rank,
            }
        )
        with patch.object(self, "settings", settings), self.adapting():
            super()._apply_lora()

    def reset_model(self) -> bool:
        """Resets the model; the adapters are in place afterwards, which Heretic 2.0 reports as True."""

        if self.changes is not None:
            self.changes.undo()
        super().reset_model()
        return True
