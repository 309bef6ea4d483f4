"""Facts about measures of loss curves and of their spread."""

import numpy as np
import pytest
from scipy import stats

from optimizer_amalgamation.measures import best, equal_spread, instability, meta, random_effects
from optimizer_amalgamation.tests.vectors import reference

MISC = {name: array.numpy() for name, array in reference("misc").items()}


def test_measures_are_the_released_ones() -> None:  # acceptance 17
    assert best(MISC["val_loss"]) == pytest.approx(MISC["val_best"], rel=1e-5)
    assert best(MISC["train_loss"]) == pytest.approx(MISC["train_best"], rel=1e-5)
    assert meta(MISC["val_loss"]) == pytest.approx(MISC["val_meta"], rel=1e-5)
    assert instability(MISC["val_loss"]) == pytest.approx(MISC["val_stability"], rel=1e-5)


def test_a_constant_curve_is_stable() -> None:  # acceptance 17
    assert instability(np.full(25, 0.3)) == pytest.approx(0, abs=1e-12)


def test_the_first_epochs_can_be_left_out() -> None:
    curve = np.concatenate([[30.0, 0.01, 9.0], np.full(40, 0.3)])
    assert instability(curve, first=15) < 1e-3 < instability(curve)


def test_the_estimates_of_two_replicates() -> None:  # acceptance 17
    found = random_effects([[0, 2], [4, 6]])
    assert (found.within, found.between, found.mean) == (2, 16, 3)
    assert found.evaluation_sd == pytest.approx(1.4142, abs=1e-4)
    assert found.meta_sd == pytest.approx(2.6458, abs=1e-4)
    half = stats.t.ppf(0.975, 1) * 2
    assert found.interval() == pytest.approx((3 - half, 3 + half))


def test_equal_values_have_no_spread() -> None:  # acceptance 17
    found = random_effects(np.full((3, 4), 1.5))
    assert (found.evaluation_sd, found.meta_sd, *found.interval()) == (0, 0, 1.5, 1.5)


def test_one_evaluation_each_leaves_all_spread_to_the_replicates() -> None:
    found = random_effects([[1.0], [2.0], [3.0]])
    assert (found.evaluation_sd, found.meta_sd) == (0, 1)


def test_spread_within_replicates_is_not_counted_between_them() -> None:
    rng = np.random.default_rng(0)
    truth = random_effects(rng.normal(size=(400, 1)) * 2 + rng.normal(size=(400, 50)))
    assert truth.meta_sd == pytest.approx(2, rel=0.1) and truth.evaluation_sd == pytest.approx(1, rel=0.05)
    assert random_effects(rng.normal(size=(400, 50))).meta_sd < 0.1


def test_levene_tells_spreads_apart() -> None:
    rng = np.random.default_rng(0)
    assert equal_spread(rng.normal(size=50), rng.normal(size=50)) > 0.05
    assert equal_spread(rng.normal(size=50), 3 * rng.normal(size=50)) < 1e-4


def test_levene_is_taken_about_medians_for_skewed_losses_are_common() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.exponential(size=20), 2 * rng.exponential(size=20)
    wanted = [np.abs(x - np.median(x)) for x in (one, other)]
    assert equal_spread(one, other) == pytest.approx(stats.f_oneway(*wanted).pvalue)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_effects([1.0, 2.0]), r"values must be \(replicates >= 2, evaluations >= 1\), got shape \(2,\)"),
        (lambda: random_effects([[1.0, 2.0]]), "values must be"),
        (lambda: random_effects([[1.0], [float("nan")]]), "values must be finite, got nan"),
        (lambda: best([[1.0, 0.0]]), "losses must be positive numbers .*, got 0.0"),
        (lambda: meta([float("nan")]), "losses must be positive"),
        (lambda: instability(np.zeros((3, 0))), r"at least one epoch, got shape \(3, 0\)"),
        (lambda: equal_spread([1.0, 2.0]), "two groups or more"),
        (lambda: equal_spread([1.0, 2.0], [1.0]), "two groups or more"),
    ],
)
def test_wrong_values_are_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
