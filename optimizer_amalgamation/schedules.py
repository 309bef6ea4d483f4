"""How long meta-training goes on, from which weights, and at which depth (spec c6): curriculum and repeat.

Both go period by period: train, validate, save; a period that made things much worse is done again from the weights it
began with. A replicate of meta-training has a schedule of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from common.config import require

Event = tuple[Literal["save", "load"], str]


@dataclass(frozen=True)
class ScheduleConfig:
    """Periods, their depth, and when one is repeated."""

    kind: Literal["curriculum", "repeat"] = "curriculum"
    """curriculum: for students, stage by stage; repeat: for choice policies, a fixed number of periods"""
    depths: list[int] = field(default_factory=lambda: [1, 2, 5, 10])
    """unrolls of an episode, by stage or period; the last goes on"""
    imitation: list[float] = field(default_factory=lambda: [0.2, 0.1, 0.05, 0.02])
    """weight of the imitation loss, likewise"""
    warmups: list[int] = field(default_factory=lambda: [1])
    """1: the episode begins with an unroll of SGD; likewise"""
    episodes: int = 10
    """of a period"""
    periods: int = 5
    """curriculum: a stage has one more at least; repeat: all"""
    chances: int = 5
    """curriculum: a stage ends so many periods after its best"""
    validation_depths: list[int] = field(default_factory=lambda: [2, 5, 10, 20])
    """as depths"""
    validation_episodes: int = 10
    threshold: float = 0.5
    """a loss worse than the reference by this part of it: the period is repeated"""
    max_repeat: int = 4
    strict_release: bool = False
    """count repeats as the released code does, which can exceed max_repeat"""

    def __post_init__(self) -> None:
        for name in ("depths", "validation_depths"):
            values = getattr(self, name)
            require(bool(values) and min(values) >= 1, f"schedule.{name}", values, "numbers of at least 1, one or more")
        for name in ("imitation", "warmups"):
            values = getattr(self, name)
            fine = bool(values) and all(0 <= value < math.inf for value in values)
            require(fine, f"schedule.{name}", values, "numbers of at least 0, one or more")
        require(max(self.warmups) <= 1, "schedule.warmups", self.warmups, "0 or 1 each")
        for name in ("episodes", "periods", "validation_episodes"):
            require(getattr(self, name) >= 1, f"schedule.{name}", getattr(self, name), "at least 1")
        for name in ("chances", "threshold", "max_repeat"):
            require(getattr(self, name) >= 0, f"schedule.{name}", getattr(self, name), "at least 0")

    def least_episodes(self) -> int:
        """Episodes of training and validation if nothing is repeated or goes on."""
        periods = self.periods if self.kind == "repeat" else len(self.depths) * max(self.periods + 1, self.chances + 1)
        return periods * (self.episodes + self.validation_episodes)


@dataclass(frozen=True)
class Plan:
    """Of the present period: unrolls of an episode, weight of the imitation loss, warm-up, unrolls of a validation."""

    depth: int
    imitation: float
    warmup: int
    validation_depth: int


class Schedule:
    """One replicate's. Train and validate as `plan` says, `record` what came of it, and do what it answers.

    Attributes:
        stage, period, repeat: where it stands; a repeat schedule has one stage.
        finished: nothing is left to do; the weights last loaded or saved are the result.
    """

    def __init__(self, options: ScheduleConfig) -> None:
        self.options = options
        self.stage, self.period, self.repeat, self.finished = 0, 0, 0, False
        self.validations: list[list[float]] = [[]]
        """of each repeat of each period of the stage"""
        self.reference: tuple[str, float] | None = None
        """name and validation of the best weights of the stage before"""

    @property
    def plan(self) -> Plan:
        """Of the present period."""
        options = self.options
        place = self.stage if options.kind == "curriculum" else self.period
        return Plan(
            _at(options.depths, place),
            _at(options.imitation, place),
            _at(options.warmups, place),
            _at(options.validation_depths, place),
        )

    @property
    def fraction(self) -> float:
        """Of the unrolls of training and validation that is done, if nothing is repeated or becomes better any more."""
        if self.finished:
            return 1.0
        options, periods = self.options, self.options.periods
        if options.kind == "repeat":
            place, within, places = self.period, 0.0, periods
        else:
            last = max(periods, self._best() + options.chances)
            place, within, places = self.stage, self.period / (last + 1), len(options.depths)
        costs = [
            options.episodes * _at(options.depths, at)
            + options.validation_episodes * _at(options.validation_depths, at)
            for at in range(places)
        ]
        return (sum(costs[:place]) + within * costs[place]) / sum(costs)

    def _best(self) -> int:
        """Of the stage's periods so far the one with the least validation."""
        return min(range(len(self.validations)), key=lambda period: min(self.validations[period], default=math.inf))

    def name(self, period: int, repeat: int) -> str:
        """Of a checkpoint of the present stage."""
        stage = f"stage_{self.stage}." if self.options.kind == "curriculum" else "period_"
        return f"{stage}{period}.{repeat}"

    @property
    def loadable(self) -> set[str]:
        """Names of the checkpoints that may still be asked for."""
        present = {
            self.name(period, repeat) for period, values in enumerate(self.validations) for repeat in range(len(values))
        }
        return present | ({self.reference[0]} if self.reference else set())

    def record(self, training: float, validation: float) -> list[Event]:
        """Save the weights just trained under the first name; then load others, where a second is given.

        Args:
            training: meta loss of the period's training.
            validation: meta loss after it.
        """
        events: list[Event] = [("save", self.name(self.period, self.repeat))]
        self.validations[-1].append(_number(validation))
        if again := self._repeats(training):
            self.repeat += 1
            return [*events, ("load", again)]
        best = self._best()
        if self.options.kind == "repeat":
            self.finished = self.period + 1 >= self.options.periods
        elif self.period >= self.options.periods and self.period - best >= self.options.chances:
            repeat, value = _least(self.validations[best])
            name = self.name(best, repeat)
            self.finished = self.stage + 1 >= len(self.options.depths)
            self.reference = (name, value)
            self.stage, self.period, self.repeat, self.validations = self.stage + 1, 0, 0, [[]]
            return [*events, ("load", name)]
        self.period, self.repeat = self.period + 1, 0
        self.validations.append([])
        return events

    def _repeats(self, training: float) -> str | None:
        """Name of the weights to repeat the period from, if it shall be repeated."""
        if self.period:
            repeat, reference = _least(self.validations[-2])
            name, current = self.name(self.period - 1, repeat), self.validations[-1][-1]
        elif self.reference:
            (name, reference), current = self.reference, _number(training)
        else:
            return None
        worse = current > reference + self.options.threshold * abs(reference)
        count = _least(self.validations[-1])[0] if self.options.strict_release else self.repeat
        return name if worse and count < self.options.max_repeat else None

    def state_dict(self) -> dict[str, Any]:
        """Plain data, for `load_state_dict`."""
        names = ("stage", "period", "repeat", "finished", "validations", "reference")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        for name, value in state.items():
            setattr(self, name, value)


def _at(values: Sequence[Any], place: int) -> Any:
    return values[min(place, len(values) - 1)]


def _number(loss: float) -> float:
    """A loss that is no number is the worst."""
    return math.inf if math.isnan(loss) else loss


def _least(values: Sequence[float]) -> tuple[int, float]:
    best = min(range(len(values)), key=lambda index: values[index])
    return best, values[best]
