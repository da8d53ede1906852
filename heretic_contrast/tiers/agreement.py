# SPDX-License-Identifier: AGPL-3.0-or-later

"""How far tiers agree with the labels of people."""

from collections import Counter
from collections.abc import Iterable

from .responses import Tier

TIERS_OF_LABELS = {
    **{tier.value.lower(): tier for tier in Tier},
    **dict.fromkeys(("1_full_compliance", "compliance", "complied"), Tier.COMPLY),
    **dict.fromkeys(("2_full_refusal", "refusal", "refused", "rejected"), Tier.REFUSE),
    **dict.fromkeys(("3_partial_refusal", "evasion", "partial_refusal"), Tier.EVASIVE),
}
"""What common labels mean, in lower case."""


class Agreement:
    """Counts of pairs (the tier that people gave, the tier that was given here)."""

    def __init__(self, pairs: Iterable[tuple[Tier, Tier]]) -> None:
        self.pairs = Counter(pairs)

    @property
    def shares(self) -> dict[str, tuple[int, int]]:
        """Successes of n: of all tiers, of refused or not, of answers called refusals, of refusals found and rightly called so."""

        total, refused = self.pairs.total(), self.pairs[Tier.REFUSE, Tier.REFUSE]
        neither = sum(count for pair, count in self.pairs.items() if Tier.REFUSE not in pair)
        by_people, here = self._totals(0), self._totals(1)
        return {
            "three-way agreement": (sum(self.pairs[tier, tier] for tier in Tier), total),
            "refused or not": (refused + neither, total),
            "full answers called REFUSE": (
                self.pairs[Tier.COMPLY, Tier.REFUSE],
                by_people[Tier.COMPLY],
            ),
            "recall of REFUSE": (refused, by_people[Tier.REFUSE]),
            "precision of REFUSE": (refused, here[Tier.REFUSE]),
        }

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa of the three tiers; None where people gave only one, which is 0 or 0 / 0 whatever was given here."""

        total = self.pairs.total()
        by_people, here = self._totals(0), self._totals(1)
        if len(by_people) < 2:
            return None
        observed = sum(self.pairs[tier, tier] for tier in Tier) / total
        chance = sum(by_people[tier] * here[tier] for tier in Tier) / (total * total)
        return (observed - chance) / (1 - chance)

    def _totals(self, side: int) -> Counter[Tier]:
        """Counts the tiers that people gave (0), or that were given here (1)."""

        return Counter(pair[side] for pair in self.pairs.elements())

    def confusion(self) -> dict[str, dict[str, int]]:
        """Counts by the tier that people gave, then by the tier that was given here."""

        return {
            people.value: {here.value: self.pairs[people, here] for here in Tier} for people in Tier
        }
