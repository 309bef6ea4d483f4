"""How well a learner did all along a stream: CER, ARE, mean accuracy, generalisation gap (spec c, Metrics)."""

from collections.abc import Sequence


class AnytimeMetrics:
    """Test errors after each state.

    Args:
        n_test: test examples. Raises ValueError if none.
    """

    def __init__(self, n_test: int) -> None:
        if n_test < 1:
            raise ValueError(f"n_test must be at least 1, got {n_test}")
        self.n_test = n_test
        self.errors: list[int] = []

    def update(self, errors: int) -> None:
        """Append the number of test examples misclassified after the next state. Raises ValueError if impossible."""
        if not 0 <= errors <= self.n_test:
            raise ValueError(f"errors must be in [0, {self.n_test}], got {errors}")
        self.errors.append(errors)

    @property
    def cer(self) -> int:
        """Cumulative error: a count over all states; lower is better."""
        return sum(self.errors)

    @property
    def are(self) -> list[float]:
        """Change of the error rate from each state to the next, (err_t - err_{t-1}) / n_test, t >= 2."""
        return [(b - a) / self.n_test for a, b in zip(self.errors, self.errors[1:], strict=False)]

    @property
    def accuracies(self) -> list[float]:
        """Test accuracy after each state, percent."""
        return [100 * (1 - errors / self.n_test) for errors in self.errors]

    @property
    def mean_acc(self) -> float:
        """Mean anytime accuracy, percent. Raises ValueError before the first state."""
        if not self.errors:
            raise ValueError("errors must hold at least one state, got none")
        return sum(self.accuracies) / len(self.errors)


def generalization_gap(train_acc: float, val_acc: float) -> float:
    """Training minus validation accuracy, points."""
    return train_acc - val_acc


def first_best(accuracies: Sequence[float]) -> int:
    """The epoch whose weights a state keeps, counted from 0: the first of the highest validation accuracy."""
    return max(range(len(accuracies)), key=lambda epoch: (accuracies[epoch], -epoch))
