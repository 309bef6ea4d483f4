"""Facts about the pool: the released values, the shared state, what a wrong teacher is told."""

import pytest
import torch

from optimizer_amalgamation.pool import LARGE_CHOICE, LARGE_TEACHERS, NEEDS, SMALL_CHOICE, SMALL_TEACHERS, Pool, Teacher
from optimizer_amalgamation.tests.vectors import reference

RATES = {"adam": 0.005, "rmsprop": 0.005, "sgd": 0.2, "momentum": 0.5, "powersign": 0.1, "addsign": 0.1}
RATES |= {"adapowersign": 0.001, "adaaddsign": 0.001}
CONSTANT = {  # gradient .5, after 1, 2, 10, 100, 1000 steps
    "adam": (0.005, 0.0067192, 0.0103215, 0.0051242, 0.0019884),
    "rmsprop": (0.0158114, 0.0114708, 0.0061954, 0.0050001, 0.005),
    "momentum": (0.025, 0.0475, 0.1628304, 0.2499934, 0.25),
    "powersign": (0.1354288, 0.1358588, 0.1359135, 0.1350867, 0.1030484),
    "addsign": (0.0998211, 0.0999796, 0.0999998, 0.0996947, 0.0861588),
    "sgd": (0.1, 0.1, 0.1, 0.1, 0.1),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_updates_of_a_constant_gradient(name: str) -> None:  # acceptance 1
    teacher, g = Teacher(name, RATES[name]), torch.tensor([0.5])
    state, found = teacher.zero_state(g), {}
    for step in range(1, 1001):
        update, state = teacher.step(state, g)
        found[step] = float(update)
    assert [found[step] for step in (1, 2, 10, 100, 1000)] == pytest.approx(CONSTANT[name], rel=2e-5)


@pytest.mark.parametrize("name", NEEDS)
def test_updates_are_the_released_ones(name: str) -> None:  # acceptance 1
    arrays = reference("teachers")
    teacher = Teacher(name, RATES[name])
    state = teacher.zero_state(arrays["grads"][0].flatten())
    for g, wanted in zip(arrays["grads"].flatten(1), arrays[f"{name}_updates"].flatten(1), strict=True):
        update, state = teacher.step(state, g)
        # 1 + a loses digits near a = -1, in theirs as in ours: one part in 1e7 of g, not of the difference.
        lost = 2e-7 * RATES[name] * g.abs() / (1 if not name.startswith("ada") else (state["v"] + 1e-10).sqrt())
        allowed = 1e-6 * wanted.abs() + 1e-9 + (lost if name.endswith("addsign") else 0)
        assert ((update - wanted).abs() <= allowed).all()
        assert update[1] == 0 and g[1] == 0


SIGNS = Pool([Teacher(name, 0.1, epsilon) for name in ("powersign", "addsign") for epsilon in (1e-10, 1e-2)])


@pytest.mark.parametrize("pool", [SMALL_TEACHERS, LARGE_TEACHERS, SMALL_CHOICE, LARGE_CHOICE, SIGNS])
def test_a_pool_is_bitwise_its_members_with_their_own_state(pool: Pool) -> None:
    rng = torch.Generator().manual_seed(0)
    state = pool.zero_state(torch.zeros(3, 7))
    alone = [teacher.zero_state(torch.zeros(3, 7)) for teacher in pool.teachers]
    for _ in range(6):
        g = torch.randn(3, 7, generator=rng)
        updates, state = pool.step(state, g)
        for index, teacher in enumerate(pool.teachers):
            update, alone[index] = teacher.step(alone[index], g)
            assert torch.equal(update, updates[index])


def test_the_large_pool_keeps_three_floats_a_coordinate() -> None:
    assert set(LARGE_CHOICE.zero_state(torch.zeros(5))) == {"m", "v", "r"}
    assert sum(len(teacher.zero_state(torch.zeros(5))) for teacher in LARGE_CHOICE.teachers) == 8
    assert set(SMALL_TEACHERS.zero_state(torch.zeros(5))) == {"m", "v", "r"}
    assert set(Teacher("sgd", 1.0).zero_state(torch.zeros(5))) == set()


def test_no_argument_is_changed() -> None:
    g = torch.ones(4)
    state = LARGE_TEACHERS.zero_state(g)
    LARGE_TEACHERS.step(state, g)
    assert torch.equal(g, torch.ones(4)) and all(not tensor.any() for tensor in state.values())


def test_the_rates_and_the_order_are_the_released_ones() -> None:
    assert [(t.name, t.lr) for t in LARGE_TEACHERS.teachers] == [
        (name, RATES[name]) for name in ("sgd", "momentum", "rmsprop", "adam", "powersign", "addsign")
    ]
    assert [(t.lr, t.epsilon) for t in LARGE_CHOICE.teachers] == [
        (2.0, 1e-10),
        (2.0, 1e-10),
        (0.005, 1e-7),
        (0.02, 1e-10),
        (1.0, 1e-10),
        (1.0, 1e-10),
    ]
    assert [(t.name, t.lr, t.epsilon) for t in SMALL_CHOICE.teachers] == [
        ("rmsprop", 0.005, 1e-7),
        ("adam", 0.02, 1e-10),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adamw"}, "teacher must be one of sgd, .*, got 'adamw'"),
        ({"lr": -1.0}, "lr of adam must be at least 0 and finite, got -1.0"),
        ({"lr": float("nan")}, "lr of adam"),
        ({"epsilon": 0.0}, "epsilon of adam must be positive and finite, got 0.0"),
        ({"beta1": 1.0}, r"beta1 of adam must be in \[0, 1\), got 1.0"),
        ({"beta2": -0.1}, "beta2 of adam"),
        ({"rho": float("nan")}, "rho of adam"),
    ],
)
def test_wrong_teachers_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Teacher(**{"name": "adam", "lr": 0.1, **options})  # type: ignore[arg-type]


def test_wrong_pools_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one teacher, got none"):
        Pool(())
    with pytest.raises(ValueError, match="the same"):
        Pool((Teacher("adam", 0.1), Teacher("momentum", 0.1, beta1=0.5)))
