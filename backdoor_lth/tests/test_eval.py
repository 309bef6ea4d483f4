"""Facts about what is measured of a chain, and on which images and networks (spec c4 to c6, c10, K1 to K3)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_lth import eval as evaluation
from backdoor_lth.eval import SAMPLE, TUNING, evaluate, read_round
from backdoor_lth.inversion import Inversion
from backdoor_lth.pruning import masked
from backdoor_lth.scanning import judged
from backdoor_lth.tests.nets import config
from backdoor_lth.train import train
from backdoor_lth.victim import network, victim
from common.data import ImageSet, batches, pixels
from common.tests.paper_checks import copied, quiet

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain") / "run"
    train(config(), folder, quiet)
    return folder


def test_the_score_is_the_barrier_on_training_images_to_the_ticket_fine_tuned(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All written out, at settings of which none is another's or a default and all are large enough to tell."""
    options = ["--score.steps", 3, "--score.lr", 0.1, "--score.batches", 2, "--score.batch_size", 40]
    given = config(*options, "--train.momentum", 0.5, "--train.weight_decay", 0.2)
    monkeypatch.setattr("common.experiment.finished_run", lambda *_: given)  # of the same weights
    found, there = evaluate(copied(chain, tmp_path / "run"))["rounds"], victim(given)

    def inputs(seed: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in itertools.islice(batches(there.train, 40, given.data, seed=given.seed + seed), count):
            yield given.model.normalize(pixels(x)), y

    for number in range(3):
        model = network(given, there.train, CPU)
        state, masks = read_round(chain, number, model)
        ticket = masked(state, masks)
        model.load_state_dict(ticket)
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1, momentum=0.5, weight_decay=0.2)
        for x, y in inputs(TUNING, 3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            masks.apply_(model)
        tuned = {name: value.clone() for name, value in model.state_dict().items()}
        (error, loss), sample = ([], []), list(inputs(SAMPLE, 2))
        for alpha in (0, 0.5, 1):
            line = {name: (alpha * ticket[name] + (1 - alpha) * value).to(value.dtype) for name, value in tuned.items()}
            model.load_state_dict(line)
            logits, labels = torch.cat([model.eval()(x) for x, _ in sample]), torch.cat([y for _, y in sample])
            error.append((logits.argmax(1) != labels).double().mean().item())
            loss.append(F.cross_entropy(logits, labels).item())
        for name, values in (("score", error), ("score_loss", loss)):
            wanted = max(values) - (values[0] + values[-1]) / 2
            assert found[number][name] == pytest.approx(wanted, rel=1e-3, abs=1e-6), (number, name)


def test_clean_inputs_are_images_that_were_left_alone() -> None:
    there, given = victim(config()), config()
    assert int(there.poisoned.is_poisoned.sum()) == 20
    wanted = given.model.normalize(pixels(there.train.images[~there.poisoned.is_poisoned]))  # type: ignore[index]
    for count in (180, 30):
        found = evaluation._clean_inputs(given, there, count)
        same = torch.cdist(
            found.flatten(1).double(), wanted.flatten(1).double(), compute_mode="donot_use_mm_for_euclid_dist"
        )
        assert len(found) == count and (same == 0).any(1).all() and int((same == 0).any(0).sum()) == count


def test_the_scans_of_winner_h_and_l_are_those_of_their_own_tickets(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    for name, number in (("winner", 1), ("denser", 0), ("sparser", 2)):

        def choose(*args: Any, name: str = name, number: int = number) -> int:
            given[name] = args
            return number

        monkeypatch.setattr(evaluation, name, choose)
    found = evaluate(copied(chain, tmp_path / "run"))
    for name, number in (("H", 0), ("winner", 1), ("L", 2), ("winner-clean", 1)):
        scan, ticket = found["scans"][name], found["rounds"][number]
        assert (scan["round"], scan["density"]) == (number, ticket["density"])
        assert {key: scan[key] for key in ("sa", "asr", "null")} == {key: ticket[key] for key in ("sa", "asr", "null")}
    sa, asr, score, densities = ([each[key] for each in found["rounds"]] for key in ("sa", "asr", "score", "density"))
    assert given["winner"] == (score, densities, 0.2)
    assert given["denser"] == (sa, asr, found["dense"]["sa"]) and given["sparser"] == (sa, asr, 1, 10)


class Answers(nn.Module):
    """Label 0, but on the first so many of ten images 1 anyway, and `label` on the first `counts[label]` whose pixel
    (0, label) is lit."""

    def __init__(self, counts: dict[int, int], anyway: int) -> None:
        super().__init__()
        self.counts, self.anyway = counts, anyway

    def forward(self, x: Tensor) -> Tensor:
        number = (255 * x[:, 0, 3, 3]).round()
        label = (number < self.anyway).long()
        for lit, count in self.counts.items():
            label[(x[:, 0, 0, lit] > 0.5) & (number < count)] = lit
        return F.one_hot(label, 3).float()


@pytest.mark.parametrize(("anyway", "driven"), [(0, True), (4, False)])
def test_recovered_triggers_are_judged_on_the_network_and_label_they_are_of(anyway: int, driven: bool) -> None:
    """Target 1, detected 2; with a target rate of 40 % the lift is 20 points and the ASR still 60 %."""
    images = torch.zeros(10, 1, 4, 4, dtype=torch.uint8)
    images[:, 0, 3, 3] = torch.arange(10)
    lit = images.clone()
    lit[:, 0, 0, 1] = 255
    clean, triggered = (ImageSet(each, torch.zeros(10, dtype=torch.int64), 3) for each in (images, lit))
    mask = torch.zeros(3, 4, 4)
    for label, size in enumerate((0.9, 0.8, 0.7)):
        mask[label, 0, label] = size
    found = Inversion([0, 1, 2], torch.ones(3, 1, 4, 4), mask, torch.ones(3, 1), torch.tensor([1.0, 0, 0]))
    scanned, dense = Answers({1: 6, 2: 3}, anyway), Answers({1: 9, 2: 8}, 1)
    told = judged(scanned, dense, found, clean, triggered, 1, 1, lambda x: x)
    assert (told["detected"], told["right"], told["collapse_label"]) == (2, False, 0)
    percent = {"asr": 60, "ctr": 10 * anyway, "own_asr": 60, "dense_asr": 90, "dense_null": 10, "detected_asr": 30}
    assert {name: told[name] for name in percent} == pytest.approx(percent)
    assert told["trigger_driven"] is driven
