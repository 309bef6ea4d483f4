"""Facts about the study: its report, resuming, its cells, and how its claims are judged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.claims import judge
from common.config import parse
from common.tests.paper_checks import (
    check_a_killed_study_goes_on,
    check_a_second_call_runs_nothing,
    check_report,
    check_study_refuses,
    report,
    rows,
    study_options,
)
from optimizer_amalgamation import reproduce as reproducing
from optimizer_amalgamation import weights
from optimizer_amalgamation.claims import CLAIMS
from optimizer_amalgamation.figures import draw
from optimizer_amalgamation.memory import peak_bytes, plain_step
from optimizer_amalgamation.reproduce import HERE, arm_config, cells_of, reproduce
from optimizer_amalgamation.rows import NOISE, log_spread
from optimizer_amalgamation.settings import Config

SMALL = [
    *("--study.workers", "1", "--study.arms", "[choice-large, pool, noise]", "--study.noise", "[1.0]"),
    *("--evaluation.problems", "[tiny14]", "--study.distill", "true"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    assert reproduce([*study_options(folder), *SMALL]) == 0
    return folder


def test_a_study_reports_every_claim_and_its_figures(place: Path) -> None:
    check_report(place, CLAIMS, ["races", "replicates", "noise"])
    check_a_second_call_runs_nothing(reproduce, place, SMALL)


def test_a_study_races_policy_student_and_pool_from_the_same_starts(place: Path) -> None:
    races = {row["cell"]["by"]: row for row in report(place)["rows"] if row["cell"]["what"] == "race"}
    pool = ("sgd", "momentum", "rmsprop", "adam", "powersign", "addsign", "true_adam")
    (warmed,) = (name for name in races if name.endswith(" after SGD"))
    assert set(races) == {"choice-large", "choice-large-student", warmed, *pool}
    assert races[warmed]["cell"]["warmup"] == 3 and not races[warmed]["cell"]["oracle"]
    assert races[warmed.removesuffix(" after SGD")]["cell"]["oracle"]
    assert sum(races[name]["cell"]["oracle"] for name in pool) == 1 and not races["true_adam"]["cell"]["oracle"]
    oracle = min((races[name] for name in pool[:6]), key=lambda row: row["metrics"]["tuning_loss"])
    assert oracle["cell"]["oracle"]
    assert len(races["choice-large"]["metrics"]["val_best"]) == 2 and len(races["sgd"]["metrics"]["val_best"]) == 4


def test_a_killed_study_goes_on_where_it_was(place: Path, tmp_path: Path) -> None:
    check_a_killed_study_goes_on("optimizer_amalgamation", reproduce, tmp_path, SMALL, rows(place))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--scale", "huge"], "--scale must be one of .*smoke"),
        (["--study.arms", "[mean, mean]"], "study.arms must be without repetition"),
        (["--study.arms", "[dm]"], "study.arms must be any of pool, "),
        (["--study.arm", "[mean]"], "unknown key 'study.arm'; did you mean 'study.arms'"),
        (["--study.factors", "[]"], "study.factors must be positive numbers"),
        (["--study.noise_kinds", "[loud]"], "study.noise_kinds must be any of relative"),
        (
            ["--study.arms", "[stronger]", "--method.teachers", "[rmsprop:0.005]"],
            r"method.teachers must be with one such as adam:0.005 for the arm stronger, got \['rmsprop:0.005'\]",
        ),
        (
            ["--method.teachers", "[]"],
            "method.teachers must be one or more such as adam:0.005 for the arms minmax, noise",
        ),
        (
            ["--scale", "paper_choice_large"],
            "method.student must be rnnprop for the arms minmax, rnnprop, got 'choice'",
        ),
        (["--scale", "paper_choice_student"], "method.policy must be empty for the arms choice-large, minmax, rnnprop"),
        (["--problem.batch_size", "201"], "problem.batch_size must be at most 200, the training images, got 201"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    wrong: Sequence[str], message: str, tmp_path: Path
) -> None:
    check_study_refuses(reproduce, tmp_path, wrong, message)


def loaded(scale: str) -> Config:
    return parse(Config, ["--config", str(HERE / "configs" / f"{scale}.yaml")], prog="reproduce")


def test_arms_are_the_papers_methods() -> None:
    config = loaded("demo")
    methods = {
        arm: arm_config(config, arm, 3).method for arm in ("minmax", "mean", "rnnprop", "stronger", "choice-small")
    }
    assert methods["minmax"].reduce == "max" and methods["mean"].reduce == "mean"
    assert methods["minmax"].teachers == methods["mean"].teachers == ["adam:0.01", "rmsprop:0.005"]
    assert methods["rnnprop"].teachers == [] and methods["stronger"].teachers == ["adam:0.01"]
    assert methods["choice-small"].student == "choice" and methods["choice-small"].pool == "small"
    assert arm_config(config, "choice-large", 3).schedule == config.study.choice_schedule
    assert arm_config(config, "mean", 3).schedule == config.schedule and arm_config(config, "mean", 3).seed == 3


@pytest.mark.parametrize("scale", [path.stem for path in sorted((HERE / "configs").glob("*.yaml"))])
def test_every_configuration_is_a_study_of_different_cells(scale: str) -> None:
    names = [cell.name for cell in cells_of(loaded(scale))]
    assert names and len(set(names)) == len(names)


def test_with_other_weights_shipped_their_cell_alone_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cells_of(loaded("demo"))
    for file in weights.PRESETS.glob("*.pt"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for module in (reproducing, weights):
        monkeypatch.setattr(module, "PRESETS", tmp_path)
    assert cells_of(loaded("demo")) == before
    (tmp_path / "minmax.pt").write_bytes(b"others")
    changed = [one for one, old in zip(cells_of(loaded("demo")), before, strict=True) if one != old]
    assert [cell.settings for cell in changed] == [{"arm": "shipped"}]


def test_the_demos_pool_races_from_the_replicates_starts() -> None:
    for scale in ("demo", "cifar", "paper"):
        config = loaded(scale)
        assert config.study.pool_repeats == len(config.meta.replicates) * config.evaluation.repeats
    assert tuple(loaded("demo").study.noise) == NOISE


# Claims


def race(by: str, values: list[list[float]], problem: str = "tiny14", **cell: Any) -> dict[str, Any]:
    settings = {"arm": by, "what": "race", "by": by, "problem": problem, **cell}
    metrics = {name: values for name in ("val_best", "train_last", "instability")}
    return {"cell": settings, "seed": 0, "metrics": metrics}


def training(arm: str, seed: int = 0, cell: dict[str, Any] | None = None, **metrics: Any) -> dict[str, Any]:
    return {"cell": {"arm": arm, "what": "training", **(cell or {})}, "seed": seed, "metrics": metrics}


def judged(claim: str, rows_: list[dict[str, Any]]) -> tuple[str, list[float]]:
    (found,) = judge([one for one in CLAIMS if one.id == claim], rows_)
    return found["verdict"], found["values"]


def test_a_claim_without_rows_is_inconclusive() -> None:
    assert {row["verdict"] for row in judge(CLAIMS, [])} == {"inconclusive"}
    assert len({claim.id for claim in CLAIMS}) == len(CLAIMS) and draw([]) == {}


@pytest.mark.parametrize(("lead", "verdict"), [(-0.2, "held"), (0.0, "held"), (0.2, "not held")])
def test_the_oracle_is_compared_start_by_start(lead: float, verdict: str) -> None:
    levels = [-1.6, -1.0, -1.5, -1.2, -1.4, -1.3]
    pool = [race("rmsprop", [[value] for value in levels], oracle=True), race("sgd", [[-9.0]] * 6, oracle=False)]
    ours = [[levels[2 * i] + lead + wobble, levels[2 * i + 1] + lead] for i, wobble in enumerate((0.01, 0.0, -0.01))]
    found = judged("B3a", [*pool, race("choice-large", ours)])
    assert found[0] == verdict and found[1] == pytest.approx([lead + 0.005, lead, lead - 0.005])
    shipped = race("shipped-choice-large", [[value + lead + 0.001 * i for i, value in enumerate(levels[:4])]])
    assert judged("B3e", [*pool, shipped])[1] == pytest.approx([lead + 0.001 * i for i in range(4)])


def student_races(leads: list[list[float]]) -> list[dict[str, Any]]:
    """A student of two replicates, the second the best in validation, by problem: its differences to the oracle."""
    found = [training("choice-large", cell={"by": "choice-large-student"}, validations=[-0.1, -0.2])]
    for number, own in enumerate(leads):
        oracle = [-1.0 - 0.1 * start for start in range(2 * len(own))]
        best = [oracle[len(own) + at] + lead for at, lead in enumerate(own)]
        found.append(race("rmsprop", [[value] for value in oracle], f"p{number}", oracle=True))
        found.append(race("choice-large-student", [[9.0] * len(own), best], f"p{number}"))
    return found


def test_the_best_student_is_judged_on_two_thirds_of_the_problems() -> None:
    good, unclear, bad = [0.01, 0.0, 0.01], [-0.3, 0.0, 0.5], [0.21, 0.2, 0.2]
    verdict, values = judged("B3h", student_races([good, bad, good]))
    assert verdict == "held" and len(values) == 2 and max(values) < 0.05
    assert judged("B3h", student_races([good, bad, bad]))[0] == "not held"
    verdict, values = judged("B3h", student_races([good, unclear, unclear]))
    assert verdict == "inconclusive" and len(values) == 1 and values[0] > 0.05
    assert judged("B3h", student_races([good, good, good, bad, bad]))[0] == "not held"  # 3 of 5 are no two thirds
    assert judged("B3h", student_races([good, good, good, good, bad]))[0] == "held"
    private = race("choice-large-student", [[0.0] * 3, [9.0] * 3], "p9:dp")  # the pool is not there
    assert judged("B3h", [*student_races([good, good]), private])[0] == "held"
    shipped = [row for row in student_races([good, good]) if row["cell"]["by"] == "rmsprop"]
    shipped += [
        race("shipped-choice-large", [[-1.0, -1.1, -1.2, -1.3, -1.4, -1.51]], f"p{number}") for number in (0, 1)
    ]
    verdict, values = judged("B3g", shipped)
    assert verdict == "held" and len(values) == 2 and -0.01 < max(values) < 0.01


def test_learnt_optimizers_are_compared_by_replicate() -> None:
    ours, theirs = race("minmax", [[-1.6, -1.4], [-1.3, -1.3]]), race("rnnprop", [[-1.4, -1.2], [-1.0, -1.22]])
    assert judged("B2a", [ours, theirs]) == ("held", pytest.approx([-0.2, -0.19]))
    assert judged("B2a", [theirs | {"cell": ours["cell"]}, ours | {"cell": theirs["cell"]}])[0] == "not held"


def test_every_seeds_replicates_are_compared_with_their_own() -> None:
    """Two seeds, of which the second lacks one arm: its replicates are paired with nobody else's."""

    def of_seed(seed: int, *rows_: dict[str, Any]) -> list[dict[str, Any]]:
        return [row | {"seed": seed} for row in rows_]

    pool = race("rmsprop", [[-1.0], [-1.5], [-2.0], [-2.5]], oracle=True)
    shipped = race("shipped-choice-large", [[-1.1, -1.2]])
    first = of_seed(1, pool, shipped, race("minmax", [[-1.0, -1.3], [-2.0, -2.4]]), race("rnnprop", [[-1.0, -1.0]] * 2))
    second = of_seed(2, pool, shipped, race("minmax", [[-1.0, -1.1], [-2.1, -2.1]]))
    assert judged("B3c", [*first, *second])[1] == pytest.approx([0.1, 0.05, 0.2, 0.15])
    assert judged("B3e", [*first, *second])[1] == pytest.approx([-0.1, 0.3])
    assert judged("B2a", [*first, *second])[1] == pytest.approx([-0.15, -1.2])
    noises = [
        noise_rows({size: [size, 2 * size] for size in sizes}) for sizes in ((0.0, 0.1, 0.3, 1.0), (0.0, 0.3, 1.0))
    ]
    found = [row for seed, own in enumerate(noises) for row in of_seed(seed, *own)]
    assert judged("B5a", found)[1] == pytest.approx([0.1, 0.2])
    students = student_races([[0.01, 0.0, 0.01], [0.0, 0.01, 0.02]])
    later = [row for row in student_races([[0.3, 0.3, 0.31]] * 2) if row["cell"].get("oracle") is None]
    later[0]["metrics"]["validations"] = [-0.1, -0.15]  # worse than the first seed's best
    assert judged("B3h", [*students, *of_seed(1, *later)])[0] == "held"
    later[0]["metrics"]["validations"] = [-0.1, -0.3]
    assert judged("B3h", [*students, *of_seed(1, *later)])[0] == "not held"


def noise_rows(losses: dict[float, list[float]]) -> list[dict[str, Any]]:
    return [
        training(
            "noise", cell={"kind": "relative", "magnitude": size}, recent=values, nearest=[[0.6, 0.4]] * len(values)
        )
        for size, values in losses.items()
    ]


def test_noise_is_judged_by_its_least_rise_and_its_best_replicate() -> None:
    found = noise_rows({0.0: [-0.8, -0.7], 0.1: [-0.7, -0.61], 0.3: [-0.3, -0.3], 1.0: [0.2, 0.1]})
    assert judged("B5a", found) == ("held", pytest.approx([0.1, 0.09]))
    assert judged("B5b", found) == ("held", [0.2, 0.1]) and judged("B5c", found)[0] == "not held"
    found[3]["metrics"]["recent"] = [0.2, -0.4]
    assert judged("B5b", found)[0] == "not held" and judged("B5a", found)[1] == pytest.approx([0.1, -0.1])


def test_noise_cannot_make_diverge_what_does_not_learn_without() -> None:
    found = noise_rows({0.0: [-0.8, -0.05], 0.1: [0.1, 0.1], 0.3: [0.2, 0.2], 1.0: [0.9, 0.9]})
    assert judged("B5b", found) == ("inconclusive", []) and judged("B5c", found) == ("inconclusive", [])


def test_the_mean_is_compared_with_the_maximum() -> None:
    by_mean = training("nearest", cell={"reduce": "mean"}, nearest=[[0.1, 0.9], [0.8, 0.2]])
    found = judged("B9a", [by_mean, *noise_rows({0.0: [0.0, 0.0]})])
    assert found[1] == pytest.approx([0.3, 0.2])


def test_memory_is_judged_by_its_largest_growth() -> None:
    found = [
        {"cell": {"what": "memory", "teachers": k}, "seed": 0, "metrics": {"megabytes": size}}
        for k, size in ((1, 100.0), (2, 101.0), (6, 104.0))
    ]
    assert judged("B9b", found) == ("held", pytest.approx([1.01, 1.04]))
    found[2]["metrics"]["megabytes"] = 140.0
    assert judged("B9b", found)[0] == "not held"


def test_the_spread_under_noise_is_a_log_ratio() -> None:
    levels = [0.0, 0.4, 0.1, 0.9, 0.3, 0.5]
    found = [
        race("noise", [[factor * level, factor * level] for level in levels], kind="relative", magnitude=size)
        for size, factor in ((0.0, 1.0), (1e-3, 0.5))
    ]
    found[1] = race("noise", [[level / 2, level / 2 + 0.01] for level in levels], kind="relative", magnitude=1e-3)
    values = log_spread("relative", 1e-3)(found)
    assert values == pytest.approx([-0.6931] * 6, abs=0.01) and judged("B5d", found)[0] == "held"
    assert log_spread("cgd", 1e-3)([found[0], race("noise", [[1.0], [0.5], [0.0]], kind="cgd", magnitude=1e-3)])
    noisy = race("noise", [[level, level + 9] for level in levels], kind="relative", magnitude=1e-3)
    assert log_spread("relative", 1e-3)([found[0], noisy]) == []  # nothing is left beside the evaluations' spread


def test_evaluations_of_equal_spread_are_refuted_as_often_as_said() -> None:
    rng, refuted = np.random.default_rng(0), 0
    for _ in range(300):
        rows = [race(by, rng.normal(size=(20, 2)).tolist()) for by in ("minmax", "mean", "choice-large-student")]
        refuted += judged("B8", rows)[1][0] < 0.05
    assert refuted < 0.08 * 300  # residuals from means, of which each pair is one number, refute a tenth and more
    wide = [race(by, (size * rng.normal(size=(20, 2))).tolist()) for by, size in (("minmax", 1), ("mean", 5))]
    assert judged("B8", wide)[1][0] < 0.001
    few = [race(by, (size * rng.normal(size=(3, 2))).tolist()) for by, size in (("minmax", 1), ("mean", 5))]
    assert judged("B8", few) == ("inconclusive", [])


def test_steadiness_is_over_the_pools_median() -> None:
    pool = [race(name, [[value]], arm="pool") for name, value in (("a", 0.1), ("b", 0.2), ("c", 0.9))]
    pool.append(race("a after SGD", [[0.0]], arm="pool", warmup=100))
    pool.append(race("b after SGD", [[0.0]], arm="pool", warmup=100))
    pool.append(race("true_adam", [[0.0]], arm="pool"))  # is none of its members
    ours = [race("choice-large-student", [[0.1, 0.1]]), race("choice-large-student", [[0.1, 0.1]], "tiny14:dp")]
    assert judged("B4", [*pool, *ours])[1] == pytest.approx([-0.5])


# Memory


def test_peak_memory_sees_what_is_kept_and_not_the_teachers() -> None:
    two, six = (peak_bytes(plain_step, "small14", 64, teachers, 4) for teachers in (2, 6))
    state = 4 * 1898 * (2 + 4 * 20) * 4  # averages and two cells of four replicates
    assert 12 * state < two < 55 * state and six < 1.3 * two  # all 64 states would be more
