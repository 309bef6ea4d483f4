"""Facts about runs: the three tasks, exact resumption, two ranks, and what bad input is told."""

from __future__ import annotations

import json
import math
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import ConfigError, parse
from common.data import load
from common.runs import load_checkpoint, read_json
from common.tests import children
from common.tests.paper_checks import check_eval_refuses, copied, kill_after_a_checkpoint, losses, quiet, refusal, said
from symbolic_l2o import SymbolicRule, presets
from symbolic_l2o import eval as evaluation
from symbolic_l2o import train as training
from symbolic_l2o.export import ExportConfig, export
from symbolic_l2o.problems import half_size
from symbolic_l2o.settings import Config, L2OStudy, MetaConfig, NetworkConfig, RecordConfig
from symbolic_l2o.train import halves, meta_problems, race_problem, read_rule, train

SCRIPT = Path(training.__file__)
CONFIGS = SCRIPT.parent / "configs"
NETWORK = ["--task", "network", "--network.epochs", 2, "--data.fraction", 0.03, "--run.checkpoint_every", 2]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["__main__", "symbolic_l2o.eval", "torch.utils.tensorboard"])


def arguments(*options: object) -> list[str]:
    return ["--config", str(CONFIGS / "smoke.yaml"), *map(str, options)]


def config(*options: object) -> Config:
    return parse(Config, arguments(*options), prog="train.py")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(config(), folder, quiet)
    return folder


# What a run leaves


def test_a_teachers_run_ends_with_its_best_weights_and_its_equations(finished: Path) -> None:
    done, found = read_json(finished / "done.json"), evaluation.evaluate(finished)
    assert done["loss"] <= done["start_loss"] and done["epochs"] == 4
    assert set(load_checkpoint(finished / "model.pt")["model"]) >= {"before.weight", "cells.0.weight_hh"}
    assert set(found["equations"]) == {"template", "template_tanh", "pole", "operon-0"}
    for name, row in found["equations"].items():
        assert row["r2"] <= 1 and len(row["tpf"]) == 2 and row["complexity"] >= 1
        rule = SymbolicRule.from_json((finished / f"rule-{name}.json").read_text())
        assert rule.to_json() == row["rule"]


def test_an_equation_of_a_teachers_run_is_exported_by_its_form(finished: Path, tmp_path: Path) -> None:
    options = ExportConfig(str(finished), "mine", form="template", folder=str(tmp_path))
    rule, kept = (SymbolicRule.from_json(p.read_text()) for p in (export(options), finished / "rule-template.json"))
    assert (rule.expr, rule.coefficients) == (kept.expr, kept.coefficients)
    assert rule.provenance.startswith("template form of a rp_s teacher: mnist5k, half A, ")
    with pytest.raises(ConfigError, match="form must be one of template, "):
        export(replace(options, form="magic", overwrite=True))
    with pytest.raises(ConfigError, match="no such run"):
        export(replace(options, source=str(tmp_path), overwrite=True))


def test_a_tuned_rule_is_written_and_serves_as_the_rule_of_another_run(tmp_path: Path) -> None:
    done = train(config("--task", "tune", "--rule.gain", 0.1, "--meta.lr", 0.1), tmp_path / "tune", quiet)
    path = tmp_path / "tune" / "rule.json"
    assert SymbolicRule.from_json(path.read_text()).to_json() == done["rule"] and done["loss"] <= done["start_loss"]
    options = ["--rule.source", path, "--network.optimizer", "symbolic", "--network.lr", 0.01]
    train(config(*NETWORK, *options), tmp_path / "network", quiet)
    assert 0 <= evaluation.evaluate(tmp_path / "network")["test_accuracy"] <= 100
    assert "latex" in evaluation.evaluate(tmp_path / "tune")
    exported = SymbolicRule.from_json(export(ExportConfig(str(path.parent), "mine", folder=str(tmp_path))).read_text())
    assert exported.coefficients == SymbolicRule.from_json(path.read_text()).coefficients
    assert (
        ": mnist5k, half A, sig, seed 0, 12 meta-steps" in exported.provenance
        and "exported at revision " in exported.provenance
    )


@pytest.mark.parametrize("optimizer", ["symbolic", "adamw"])
def test_a_network_learns(optimizer: str, tmp_path: Path) -> None:
    options = ["--task", "network", "--network.optimizer", optimizer, "--network.lr", 0.01, "--network.epochs", 4]
    done = train(config(*options, "--data.fraction", 0.25, "--problem.name", "relu01"), tmp_path / "run", quiet)
    assert done["test_accuracy"] > 50 and losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def test_a_second_run_of_the_same_configuration_is_the_same(finished: Path, tmp_path: Path) -> None:  # acceptance 27
    train(config(), tmp_path / "run", quiet)
    for name in ("model.pt", "metrics.jsonl", "done.json"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


# Disturbed


def started(folder: Path, *options: object) -> Any:
    process = FORKS.Process(target=train, args=(config(*options), folder, quiet))
    process.start()
    return process


@pytest.mark.parametrize("options", [["--meta.epochs", 8], NETWORK], ids=["teacher", "network"])
def test_a_run_killed_again_and_again_equals_an_undisturbed_one_bit_for_bit(
    options: list[object], tmp_path: Path
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    started(whole, *options).join()
    kill_after_a_checkpoint(lambda run: started(run, *options), folder, times=2)
    started(folder, *options).join()
    names = ["model.pt", "metrics.jsonl", "done.json"]
    assert children.tree(folder, names) == children.tree(whole, names) and len(children.tree(folder, names)) == 3


def test_two_processes_tune_the_rule_of_one(tmp_path: Path) -> None:  # acceptance 30
    options = ["--task", "tune", "--meta.lr", 0.1, "--rule.gain", 0.1]
    done = children.run(*children.TORCHRUN, SCRIPT, *arguments(*options, "--run.folder", tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    one = train(config(*options), tmp_path / "one", quiet)
    rules = [SymbolicRule.from_json(d["rule"]).coefficients for d in (one, read_json(tmp_path / "two" / "done.json"))]
    assert rules[1] == pytest.approx(rules[0], abs=1e-5) and one["loss"] < one["start_loss"]


def test_two_processes_meta_train_the_teacher_of_one(finished: Path, tmp_path: Path) -> None:  # acceptance 30
    done = children.run(*children.TORCHRUN, SCRIPT, *arguments("--run.folder", tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    one, two = (load_checkpoint(run / "model.pt")["model"] for run in (finished, tmp_path / "two"))
    assert all((one[name] - two[name]).abs().max() < 1e-5 for name in one)


def test_two_processes_train_the_network_of_one(tmp_path: Path) -> None:  # acceptance 30
    options = [*NETWORK, "--problem.name", "relu01", "--network.optimizer", "sgdm", "--network.lr", 0.1]
    done = children.run(*children.TORCHRUN, SCRIPT, *arguments(*options, "--run.folder", tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    train(config(*options), tmp_path / "one", quiet)
    one, two = (load_checkpoint(tmp_path / name / "model.pt")["model"] for name in ("one", "two"))
    assert all((one[name] - two[name]).abs().max() < 1e-5 for name in one)


# Which images, which learning rate


def test_meta_training_and_races_share_no_image() -> None:
    data = load(config().data).train
    a, b = halves(data)
    whole = {image.numpy().tobytes() for image in data.images}
    parts = [{image.numpy().tobytes() for image in half.images} for half in (a, b)]
    assert not parts[0] & parts[1] and parts[0] | parts[1] == whole and len(a) == len(b)
    problems = [*meta_problems(config(), data, torch.device("cpu")), race_problem("sig", config(), data)]
    for problem, half in zip(problems, (a, a, b), strict=True):
        assert torch.equal(problem.images, half_size(half.images)) and torch.equal(problem.labels, half.labels)


def test_accuracies_are_those_of_test_and_validation_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def spy(config: Config, model: Any, data: Any) -> float:
        seen.append(data.images)
        return 10.0 * len(seen)

    monkeypatch.setattr(training, "accuracy_of", spy)
    monkeypatch.setattr(evaluation, "accuracy_of", spy)
    run = config(*NETWORK, "--data.val", 0.25)
    splits = load(run.data)
    assert {name: train(run, tmp_path, quiet)[name] for name in ("test_accuracy", "val_accuracy")} == {
        "test_accuracy": 10,
        "val_accuracy": 20,
    }
    found = evaluation.evaluate(tmp_path)
    assert (found["test_accuracy"], found["val_accuracy"]) == (30, 40) and len(seen) == 4
    for images, wanted in zip(seen, [splits.test, splits.val] * 2, strict=True):
        assert torch.equal(images, wanted.images)


@pytest.mark.parametrize("falls", [True, False])
def test_the_learning_rate_of_a_network_follows_its_schedule(
    falls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            used.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(training, "make_optimizer", lambda config, parameters: Watched(parameters, 1.0))
    train(config(*NETWORK, "--network.cosine", str(falls).lower(), "--network.lr", 0.2), tmp_path, quiet)
    assert len(used) > 4
    wanted = [0.1 * (1 + math.cos(math.pi * t / len(used))) if falls else 0.2 for t in range(len(used))]
    assert used == pytest.approx(wanted)


# Refused


def test_eval_refuses_what_is_no_finished_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_eval_refuses(evaluation.main, copied(finished, tmp_path / "run"), "model.pt", capsys)


def test_eval_prints_the_equations(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = said(evaluation.main, ["--folder", finished], capsys)
    assert status in (0, None) and "pole" in out and "\\tanh" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--meta.unroll", 5], "meta.horizon must be a multiple of meta.unroll = 5, got 12"),
        (["--meta.unroll", 0], "meta.unroll must be at least 1, got 0"),
        (["--meta.mode", "forward", "--meta.coords", 0], "meta.mode must be suffix for a teacher, got 'forward'"),
        (["--meta.imitation", "[1.5]"], "meta.imitation must be probabilities, at least one, got [1.5]"),
        (["--teacher", "gru"], "teacher"),
        (["--rule.source", "missing.json", "--task", "tune"], "rule.source must be one of rp_pole_mnist5k, "),
        (["--rule.source", "adam", "--task", "tune"], "rule.source adam: a rule must have coefficients"),
        (["--rule.source", "adam", "--rule.gain", 2, "--task", "tune"], "rule.gain must be 1 for a rule without"),
        (["--study.networks", "[adam:0.1]"], "data.val must be positive with study.networks, whose learning rates"),
        (["--records.steps", 8], "records.steps must be at least three windows"),
        (["--data.name", "npz", "--data.path", "none.npz"], "none.npz: "),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(
    options: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(training.main, arguments(*options, "--run.folder", tmp_path / "run"), capsys)
    assert not (tmp_path / "run").exists()


def test_a_malicious_rule_file_does_nothing_but_raise(tmp_path: Path) -> None:  # acceptance 28
    path = tmp_path / "rule.json"
    data = json.loads(presets("adam").to_json())
    for text in (json.dumps({**data, "expr": ["__import__", "os"]}), "cos\nsystem\n(S'true'\ntR.", "{}"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"rule.json: "):
            read_rule(config("--rule.source", path).rule)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (NetworkConfig, {"lr": 0.0}, "network.lr must be positive"),
        (NetworkConfig, {"epochs": 0}, "network.epochs must be at least 1"),
        (MetaConfig, {"random_scale": 11.0}, "meta.random_scale must be in"),
        (MetaConfig, {"mode": "forward", "coords": 9}, "meta.coords must be 0 with meta.mode forward, got 9"),
        (MetaConfig, {"mode": "forward", "stale_tail": True}, "meta.stale_tail must be false with meta.mode forward"),
        (L2OStudy, {"unseen": ["resnet20"]}, "study.unseen must be problems that race"),
        (MetaConfig, {"horizons": [40, 20]}, "meta.horizons must be rising"),
        (RecordConfig, {"rows": 0}, "records.rows must be at least 1"),
        (L2OStudy, {"networks": ["lion:0.1"]}, "study.networks must be symbolic, tuned or one of"),
        (L2OStudy, {"networks": ["adam"]}, "study.networks must be"),
        (L2OStudy, {"arms": []}, "study.arms must be not empty"),
        (L2OStudy, {"grid": [0.0]}, "study.grid must be positive numbers"),
        (L2OStudy, {"baselines": ["symbolic"]}, "study.baselines must be any of"),
        (L2OStudy, {"epochs": [1]}, "study.epochs must be four positive numbers"),
    ],
)
def test_impossible_settings_are_refused(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**options)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_can_be_read(path: Path) -> None:
    assert parse(Config, ["--config", str(path)], prog="train.py").meta.eta == 0.01
