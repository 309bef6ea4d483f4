"""Facts about the study: its rows and report, that it does no work twice and loses none when killed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from common.tests.paper_checks import (
    check_a_killed_study_goes_on,
    check_a_second_call_runs_nothing,
    check_report,
    check_study_refuses,
    report,
    rows,
    study_options,
)
from double_win_lth.claims import claims
from double_win_lth.reproduce import reproduce, tickets_config, tickets_home, transfers
from double_win_lth.tests.nets import config
from double_win_lth.tickets import TicketBook

SCHEMES = [
    "{fraction: 0.02, grouped: true, std: [dense, 'imp:2'], fast: [dense, 'imp:2'], adv: [dense, 'imp:2', 'omp:2']}",
    "{fraction: 1.0, std: ['imp:2'], adv: ['imp:2']}",
]
FASTER = ["--study.schemes", f"[{', '.join(SCHEMES)}]", "--finetune.steps", "1", "--pretrain.steps", "2"]


class Study(NamedTuple):
    place: Path
    status: int


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    place = tmp_path_factory.mktemp("study")
    return Study(place, reproduce([*study_options(place), *FASTER]))


def test_the_study_has_a_row_for_every_transferred_ticket_and_every_pair_of_masks(study: Study) -> None:
    assert study.status == 0
    found = [(row["seed"], *row["cell"].values()) for row in rows(study.place)]
    assert len(found) == len(set(found)) == 2 * (2 * (2 + 2 + 3 + 1 + 1) + 3 * 2)
    moved = [row for row in rows(study.place) if "fraction" in row["cell"]]
    assert {row["cell"]["sparsity"] for row in moved} == {0.0, 0.75}
    assert all(0 <= row["metrics"][name] <= 100 for row in moved for name in ("sa", "ra"))


def test_rows_of_masks_are_the_likeness_of_the_books_that_the_cells_found(study: Study) -> None:
    root = study.place / "runs" / "double_win_lth" / "smoke"
    books = {}
    for regime in ("std", "fast", "adv"):
        there = tickets_config(config("--pretrain.steps", "2"), regime, 1)  # type: ignore[arg-type]
        books[regime] = TicketBook.load(tickets_home(root, there) / "tickets.safetensors")
    for row in rows(study.place):
        if "pair" in row["cell"] and row["seed"] == 1:
            one, other = row["cell"]["pair"].split("-")
            level = row["cell"]["level"]
            assert row["metrics"]["iou"] == books[one].iou(books[other], level)
            assert row["metrics"]["chance"] == pytest.approx({1: 1 / 3, 2: 1 / 7}[level], abs=1e-3)
            assert row["metrics"]["iou"] > row["metrics"]["iou_across"] > 0


def test_the_report_judges_every_claim(study: Study) -> None:
    check_report(study.place, claims(config()), ["data", "masks", "sparsity"])
    judged = {claim["id"]: claim for claim in report(study.place)["claims"]}
    measured = {name for name, claim in judged.items() if claim["values"]}
    assert measured == {"C2a", "C2b", "C3a", "C3b", "C3c", "C4", "C5", "C6c", "C7a", "C7b"}


def test_the_full_smoke_study_measures_every_claim_and_groups_only_where_told() -> None:
    work = transfers(config(), "adv")
    assert [len(one.transfer.tickets) for one in work] == [7] * 4 + [1] * 10
    assert {one.transfer.fraction for one in work} == {0.02, 0.1, 1.0}
    assert {(one.transfer.kind, one.eval.images) for one in work} == {("adv", 40), ("std", 20)}
    assert {one.finetune.batch_size for one in work if one.transfer.fraction == 0.1} == {8}


def test_a_second_call_runs_nothing(study: Study) -> None:
    check_a_second_call_runs_nothing(reproduce, study.place, FASTER)


def test_a_killed_study_goes_on(study: Study, tmp_path: Path) -> None:
    few = [*FASTER[:1], "[{fraction: 1.0, adv: ['imp:2']}]", *FASTER[2:]]
    cells = [(row["cell"].get("regime"), row["cell"].get("fraction")) for row in rows(study.place)]
    wanted = [row for row, cell in zip(rows(study.place), cells, strict=True) if cell == ("adv", 1.0)]
    check_a_killed_study_goes_on("double_win_lth", reproduce, tmp_path, few, wanted)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--scale", "huge"], r"--scale must be one of .*smoke"),
        (
            ["--scale", "paper_imp_adv"],
            r"study\.scale must be a study: those files configure one run of train\.py, got",
        ),
        (["--study.schemes", "[]"], r"study\.schemes must be at least one scheme"),
        (["--study.schemes", "[{fraction: 2}]"], r"study\.schemes\.fraction must be in \(0, 1\], got 2"),
        (["--study.middle", "9"], r"study.middle must be in \[1, study.high = 2\], got 9"),
        (["--study.worker", "2"], "unknown key 'study\\.worker'"),
        (["--prune.rounds", "1"], r"study\.schemes must be of levels up to prune.rounds, 1, got 2"),
        (["--target.classes", "[0, 5]"], r"target\.classes must be disjoint from source\.classes \[0, 1, 2\]"),
        (["--study.high", "3"], r"study\.high must be of levels up to prune.rounds, 2, got 3"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    wrong: Sequence[str], message: str, tmp_path: Path
) -> None:
    check_study_refuses(reproduce, tmp_path, wrong, message)
