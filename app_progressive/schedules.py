"""How dense the network may be in each state of the stream (spec c, Schedule).

APP: d_t = base^delta_t with exponents delta_t from 1 to tau in equal steps. tau is an exponent, not a sparsity: base
0.8 and tau 4.5 end at 0.8^4.5 = 36.6 % of the weights.
"""

import math
from collections.abc import Sequence
from typing import Literal

Schedule = Literal["exponential", "cubic"] | Sequence[float]


def _check(n_states: int, tau: float, base: float = 0.5) -> None:
    if n_states < 1:
        raise ValueError(f"n_states must be at least 1, got {n_states}")
    if not (math.isfinite(tau) and tau >= 1):
        raise ValueError(f"tau must be a finite number, at least 1, got {tau}")
    if not 0 < base < 1:
        raise ValueError(f"base must be in (0, 1), got {base}")


def delta_schedule(n_states: int, tau: float) -> list[float]:
    """Exponents delta_t = 1 + (tau - 1)(t - 1)/(S - 1), t = 1..S; a stream of one state has tau alone.

    Raises ValueError: n_states < 1, tau below 1 or not finite.
    """
    _check(n_states, tau)
    if n_states == 1:
        return [float(tau)]
    return [1 + (tau - 1) * state / (n_states - 1) for state in range(n_states - 1)] + [float(tau)]


def density_schedule(n_states: int, tau: float, base: float = 0.8) -> list[float]:
    """Target densities base^delta_t, t = 1..S, as fractions of the prunable weights. Raises ValueError."""
    _check(n_states, tau, base)
    return [base**delta for delta in delta_schedule(n_states, tau)]


def cubic_schedule(n_states: int, tau: float, base: float = 0.8) -> list[float]:
    """Gradual pruning to base^tau: sparsity s_f (1 - (1 - t/S)^3) in state t (Zhu & Gupta 2017, Eq. 1, from 0)."""
    _check(n_states, tau, base)
    final = 1 - base**tau
    return [1 - final * (1 - (1 - state / n_states) ** 3) for state in range(1, n_states)] + [base**tau]


def state_targets(n_states: int, tau: float, base: float, schedule: Schedule) -> list[tuple[float, float]]:
    """Exponent and density of each state under a schedule by name, or under given densities, one a state.

    Raises ValueError: another name, densities that are not n_states in (0, 1], or as `density_schedule`.
    """
    deltas = delta_schedule(n_states, tau)
    if schedule == "exponential":
        densities = density_schedule(n_states, tau, base)
    elif schedule == "cubic":
        densities = cubic_schedule(n_states, tau, base)
    elif isinstance(schedule, str):
        raise ValueError(f"schedule must be exponential, cubic or densities, got {schedule!r}")
    else:
        densities = [float(density) for density in schedule]
        if len(densities) != n_states or not all(0 < density <= 1 for density in densities):
            raise ValueError(f"schedule must be {n_states} densities in (0, 1], got {densities}")
    return list(zip(deltas, densities, strict=True))


def open_delta(state: int, tau: float, growth: float) -> float:
    """Exponent of state t = 1, 2, ... of a stream whose length is unknown: min(tau, 1 + growth (t - 1))."""
    _check(state, tau)
    if not growth > 0:
        raise ValueError(f"growth must be positive, got {growth}")
    return min(tau, 1 + growth * (state - 1))
