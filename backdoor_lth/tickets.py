"""Which ticket is taken: the winner by its Trojan score alone, and the denser H and sparser L beside it (spec c6)."""

from collections.abc import Sequence


def winner(scores: Sequence[float], densities: Sequence[float], extreme: float) -> int:
    """Position of the highest score among tickets of density at most `extreme`; among equal ones the sparser.

    Never looks at accuracy or attack success. Raises ValueError where no ticket is that sparse.
    """
    regime = [index for index, density in enumerate(densities) if density <= extreme]
    if not regime:
        raise ValueError(f"extreme must be at least the least density {min(densities)}, got {extreme}")
    return max(regime, key=lambda index: (scores[index], -densities[index]))


def denser(sa: Sequence[float], asr: Sequence[float], dense_sa: float) -> int | None:
    """H: the sparsest ticket that keeps accuracy (within 2 points of dense) and attack (95 %); None without one."""
    kept = [index for index, value in enumerate(sa) if value >= dense_sa - 2 and asr[index] >= 95]
    return kept[-1] if kept else None


def sparser(sa: Sequence[float], asr: Sequence[float], won: int, classes: int) -> int | None:
    """L: the first ticket after the winner that lost both (chance + 5 and 30 points), else four rounds after it.

    The last where there are fewer; None where the winner itself is last.
    """
    chance = 100 / classes
    for index in range(won + 1, len(sa)):
        if sa[index] <= chance + 5 and asr[index] <= 30:
            return index
    return min(won + 4, len(sa) - 1) if won < len(sa) - 1 else None
