"""Curriculum: a teacher trains on longer runs only once shorter ones bring nothing more (spec c.5)."""

from collections.abc import Sequence
from typing import Any, Literal

HORIZONS = (100, 200, 500, 1000, 1500, 2000, 2500, 3000)
Advice = Literal["save", "wait", "advance", "stop"]


class Curriculum:
    """Train at `horizon`, evaluate at `evaluation_horizon`, and do as `record` says.

    Args:
        horizons: steps of a run, rising.
        least: evaluations of a stage before it may end.

    Raises:
        ValueError: without horizons, or where they do not rise.
    """

    def __init__(self, horizons: Sequence[int] = HORIZONS, least: int = 3) -> None:
        if not horizons or list(horizons) != sorted(set(horizons)) or horizons[0] < 1:
            raise ValueError(f"horizons must be rising and positive, got {list(horizons)}")
        self.horizons, self.least = tuple(horizons), least
        self.index, self.best, self.count, self.improved, self.stopped = 0, float("inf"), 0, False, False

    @property
    def horizon(self) -> int:
        """Steps of a training run."""
        return self.horizons[self.index]

    @property
    def evaluation_horizon(self) -> int:
        """Steps of an evaluation run: the next stage's (both stay at the last)."""
        return self.horizons[min(self.index + 1, len(self.horizons) - 1)]

    def baseline(self, metric: float) -> None:
        """The metric of the weights with which the present stage begins."""
        self.best, self.count, self.improved = metric, 0, False

    def record(self, metric: float) -> Advice:
        """What an evaluation means.

        save: keep these weights. advance: go back to the stage's best weights, whose metric at the new evaluation
        horizon is due as `baseline`. stop: the stage brought nothing. A metric that is not a number brings nothing.
        """
        self.count += 1
        if metric < self.best:
            self.best, self.improved = metric, True
            return "save"
        if self.count < self.least:
            return "wait"
        if not self.improved:
            self.stopped = True
            return "stop"
        self.index = min(self.index + 1, len(self.horizons) - 1)
        self.count, self.improved = 0, False
        return "advance"

    def state_dict(self) -> dict[str, Any]:
        """Plain data, for `load_state_dict`."""
        return {name: getattr(self, name) for name in ("index", "best", "count", "improved", "stopped")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        for name in self.state_dict():
            setattr(self, name, state[name])
