"""Facts about runs: what they leave, exact resumption, shares, shipping weights, and what bad input is told."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import ConfigError, parse
from common.runs import CheckpointError, load_checkpoint, read_json
from common.tests import children
from common.tests.paper_checks import check_eval_refuses, copied, kill_after_a_checkpoint, quiet, refusal, said
from optimizer_amalgamation import StudentRule
from optimizer_amalgamation import eval as evaluation
from optimizer_amalgamation import export as exporting
from optimizer_amalgamation import train as training
from optimizer_amalgamation.meta_training import MetaTraining
from optimizer_amalgamation.race import Curves
from optimizer_amalgamation.settings import AmalgamationStudy, Config, EvaluationConfig, MetaConfig, MethodConfig
from optimizer_amalgamation.train import raced_problem, read_policy, run_name, share, train
from optimizer_amalgamation.weights import load_weights, provenance

SCRIPT = Path(training.__file__)
CONFIGS = SCRIPT.parent / "configs"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["__main__", "optimizer_amalgamation.eval", "torch.utils.tensorboard"])
CHOICE = ["--method.student", "choice", "--method.teachers", "[]", "--method.pool", "small"]
PARTS = ["weights.pt", "metrics.jsonl", "done.json"]


def arguments(*options: object) -> list[str]:
    return ["--config", str(CONFIGS / "smoke.yaml"), *map(str, options)]


def config(*options: object) -> Config:
    return parse(Config, arguments(*options), prog="train.py")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(config(), folder, quiet)
    return folder


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "run"
    train(config(*CHOICE), folder, quiet)
    return folder


# What a run leaves


def test_a_run_leaves_the_weights_of_all_replicates_and_what_became_of_them(finished: Path) -> None:
    done, weights = read_json(finished / "done.json"), load_checkpoint(finished / "weights.pt")["weights"]
    assert {name: (2, *shape) for name, shape in StudentRule().shapes.items()} == {
        name: tuple(value.shape) for name, value in weights.items()
    }
    assert done["replicates"] == [0, 1] and min(done["meta_steps"]) >= 6 and done["skipped"] == [0, 0]
    assert all(sum(shares) == pytest.approx(1) and len(shares) == 2 for shares in done["nearest"])
    losses = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == done["episodes"] and any("validation" in line for line in losses)


def test_every_replicate_trains_every_problem(finished: Path, tmp_path: Path) -> None:
    found = evaluation.evaluate(copied(finished, tmp_path / "run"))
    assert list(found) == ["tiny14", "mlp14"]
    for measures in found.values():
        assert torch.tensor(measures["val_best"]).shape == (2, 2) and len(measures["curve"]) == 2


def test_private_problems_are_raced_with_private_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def race_learnt(problem: Any, rule: Any, weights: Any, options: Any, private: bool, *_: Any) -> Curves:
        asked.append((problem.batch_size, private))
        return Curves(torch.ones(4, 2), torch.ones(4, 2))

    monkeypatch.setattr(evaluation, "race_learnt", race_learnt)
    own = config("--evaluation.problems", "[tiny14, 'tiny14:dp', 'tiny14:4']")
    evaluation.race_all(own, StudentRule(), {})
    assert asked == [(8, False), (8, True), (4, False)]


def test_what_is_configured_is_what_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def asked(*arguments: Any) -> Any:
        raise Asked(inspect.signature(MetaTraining).bind(*arguments).arguments)

    monkeypatch.setattr(training, "MetaTraining", asked)
    own = config(*("--seed", 3, "--method.reduce", "mean", "--perturbation.kind", "relative", "--meta.lr", 0.01))
    with pytest.raises(Asked) as told:
        train(own, tmp_path / "run", quiet)
    got = told.value.args[0]
    assert (got["seed"], got["reduce"]) == (3, "mean") and got["perturbation"] == own.perturbation
    assert (got["options"], got["schedule"]) == (own.meta, own.schedule)
    assert [teacher.name for teacher in got["teaching"]([0])] == ["adam", "rmsprop"]


def test_a_policy_teaches_a_student(policy: Path, tmp_path: Path) -> None:
    options = ["--method.teachers", "[]", "--method.policy", policy]
    done = train(config(*options), tmp_path / "student", quiet)
    assert done["nearest"] == [[1.0], [1.0]]
    own = train(config(*options, "--method.policy_replicate", -1), tmp_path / "own", quiet)
    assert own["validations"] != done["validations"]


def test_a_policy_is_read_from_its_run_or_its_weights(policy: Path, tmp_path: Path) -> None:
    rule, weights, numbers = read_policy(MethodConfig(policy=str(policy)))
    assert len(rule.pool) == 2 and weights["choice_bias"].shape == (2, 2) and numbers == [0, 1]
    with pytest.raises(ConfigError, match=r"method.policy_replicate must be below 2, got 2"):
        read_policy(MethodConfig(policy=str(policy), policy_replicate=2))
    with pytest.raises(ConfigError, match=r"method.policy must be a run of a choice policy or its weights"):
        read_policy(MethodConfig(policy=str(tmp_path / "none.pt")))


def test_a_student_has_the_policy_of_its_own_number(policy: Path, tmp_path: Path) -> None:
    options = ["--method.teachers", "[]", "--method.policy", policy, "--method.policy_replicate"]
    second = train(config(*options, 1, "--meta.replicates", "[1]"), tmp_path / "second", quiet)
    own = train(config(*options, -1, "--meta.replicates", "[1]"), tmp_path / "own", quiet)
    assert own["validations"] == second["validations"]
    with pytest.raises(ConfigError, match=r"meta.replicates must be of the policy's replicates \[0, 1\], got \[2\]"):
        train(config(*options, -1, "--meta.replicates", "[2]"), tmp_path / "none", quiet)
    assert not (tmp_path / "none").exists()


def test_a_teacher_that_diverges_does_not_end_the_run(tmp_path: Path) -> None:
    done = train(config("--method.teachers", "[adam:0.01, sgd:1.0e+20]"), tmp_path / "run", quiet)
    assert min(done["meta_steps"]) >= 6 and all(map(math.isfinite, done["validations"]))


def test_a_students_run_is_no_policy(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"method.policy must be the run of a choice policy"):
        read_policy(MethodConfig(policy=str(finished)))


# Disturbed


def started(folder: Path, *options: object) -> Any:
    process = FORKS.Process(target=train, args=(config(*options), folder, quiet))
    process.start()
    return process


def test_a_run_killed_again_and_again_equals_an_undisturbed_one_bit_for_bit(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    started(whole).join()
    kill_after_a_checkpoint(started, folder, times=2)
    started(folder).join()
    assert children.tree(folder, PARTS) == children.tree(whole, PARTS) and len(children.tree(folder, PARTS)) == 3


def test_the_time_left_is_told_by_the_schedule(tmp_path: Path) -> None:
    told: list[float] = []
    train(config(), tmp_path / "run", told.append)
    assert told[0] == 0 < told[-2] < told[-1] == 1 and told == sorted(told)


def test_processes_share_the_replicates(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    done = train(*share(config(), tmp_path / "run"), quiet)
    whole = read_json(finished / "done.json")
    assert done["replicates"] == [1] and done["validations"] == pytest.approx(whole["validations"][1:], abs=1e-4)
    assert (tmp_path / "run" / "share-1-of-2" / "weights.pt").exists()
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"meta.replicates must be one or more for each of the 3 processes"):
        share(config(), tmp_path / "other")


def test_optimizers_are_raced_on_other_data_than_they_were_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(data: Any) -> Any:
        asked.append(data.name)
        return loading(dataclasses.replace(data, name="mnist5k"))

    loading = training.load
    monkeypatch.setattr(training, "load", load)
    problem = raced_problem(config(), "small14@fashion_mnist:16")
    assert asked == ["fashion_mnist"] and (problem.name, problem.batch_size) == ("small14", 16)
    for wrong in ("small14@", "small14@npz", "small15@mnist", "small14@mnist:0"):
        with pytest.raises(ConfigError, match=r"evaluation.problems must be one of train, .*, got"):
            EvaluationConfig(problems=[wrong])


# Shipping


def test_the_best_replicate_in_races_is_shipped_with_its_provenance(finished: Path, tmp_path: Path) -> None:
    path = exporting.export(exporting.Arguments(str(finished), "minmax", to=str(tmp_path)))
    shipped, source = load_weights(path, StudentRule().shapes), provenance(path)
    done, whole = read_json(finished / "done.json"), load_checkpoint(finished / "weights.pt")["weights"]
    raced, evaluation = source["races"]["losses"], config().evaluation
    best = raced.index(min(raced))
    assert len(set(raced)) == 2 and source["replicate"] == done["replicates"][best]
    assert (source["races"]["epochs"], source["races"]["seed"]) == (evaluation.epochs, evaluation.seed + 1)
    assert all(torch.equal(value, whole[name][best]) for name, value in shipped.items())
    assert source["meta_steps"] == done["meta_steps"][best] and source["data"] == "mnist5k"
    assert source["config"]["method"]["teachers"] == ["adam:0.01", "rmsprop:0.005"]
    other = exporting.export(exporting.Arguments(str(finished), "minmax", 1 - best, str(tmp_path), overwrite=True))
    assert provenance(other)["replicate"] == done["replicates"][1 - best]


def test_a_student_is_shipped_under_the_name_of_its_method(policy: Path) -> None:
    def names(*options: object) -> list[str]:
        return exporting.names_of(config(*options))

    assert names() == ["minmax"] and names("--method.reduce", "mean") == ["mean"]
    assert names("--method.teachers", "[]") == ["rnnprop"]
    assert names("--method.teachers", "[adam:0.01]") == ["stronger"]
    taught = ["--method.teachers", "[]", "--method.policy"]
    assert names(*taught, policy) == ["choice-small"]
    assert names(*taught, "moved") == ["choice-large", "choice-small"]


def test_replicates_are_chosen_on_starts_that_no_evaluation_has(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def race_all(config: Config, *_: object, alike: bool) -> dict[str, Any]:
        asked.append((config.evaluation.problems, config.evaluation.seed, alike))
        return {config.problem.name: {"val_best": [[-1.0, -2.0], [-3.0, -1.5]]}}

    monkeypatch.setattr(exporting, "race_all", race_all)
    own = config()
    assert exporting.races(own, {})["losses"] == [-1.5, -2.25]
    assert asked == [([own.problem.name], own.evaluation.seed + 1, True)]


def test_only_a_finished_student_is_shipped(finished: Path, policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*options: object) -> str:
        return refusal(exporting.main, options, capsys)

    assert told("--folder", finished, "--name", "best").startswith("name must be one of mean, minmax, ")
    assert told("--folder", policy, "--name", "mean").startswith(
        "folder must be the run of a student rnnprop, not of c"
    )
    assert told("--folder", finished.parent / "no", "--name", "mean").endswith("no such run (it has no config.yaml)")
    message = told("--folder", finished, "--name", "choice-large")
    assert message == "name must be minmax, as this run's method is called, got 'choice-large'"
    message = told("--folder", finished, "--name", "minmax")  # it would replace the one that comes with the package
    assert message == f"overwrite must be true to replace {exporting.PRESETS / 'minmax.pt'}, which is there, got False"
    message = told("--folder", finished, "--name", "minmax", "--to", finished, "--replicate", 2)
    assert message == "replicate must be in [-1, 2), got 2"


# Refused


def test_eval_refuses_what_is_no_finished_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(finished, tmp_path / "run")
    check_eval_refuses(evaluation.main, run, "weights.pt", capsys)


def test_eval_prints_what_each_replicate_reaches(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = said(evaluation.main, ["--folder", finished], capsys)
    assert status in (0, None) and "tiny14" in out and "meta-stability" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method.teachers", "[adam]"], "method.teachers must be names with rates such as adam:0.005, got 'adam'"),
        (["--method.teachers", "[lion:0.1]"], "got 'lion:0.1' (teacher must be one of sgd, "),
        (["--method.student", "choice"], "method.teachers must be empty for a choice policy, got ['adam:0.01'"),
        (["--meta.replicates", "[]"], "meta.replicates must be different numbers of at least 0, one or more, got []"),
        (["--meta.replicates", "[0,0]"], "meta.replicates must be different numbers"),
        (["--meta.unroll", "0"], "meta.unroll must be at least 1, got 0"),
        (["--meta.spread", "-1"], "meta.spread must be in [0, 10], got -1.0"),
        (["--problem.name", "lenet"], "problem.name must be one of train, mlp, "),
        (["--perturbation.magnitude", "-1"], "perturbation.magnitude must be at least 0 and finite, got -1.0"),
        (["--evaluation.problems", "[tiny14:x]"], "evaluation.problems must be one of train, "),
        (["--schedule.depths", "[]"], "schedule.depths must be numbers of at least 1"),
        (["--method.policy", "nowhere"], "method.policy must be a run of a choice policy or its weights"),
        (["--problem.name", "deeper"], "problem.name must be a network for images of side 14"),
        (["--problem.batch_size", "201"], "problem.batch_size must be at most 200, the training images, got 201"),
        (["--method.hardness", ".inf"], "method.hardness must be at least 0 and finite, got inf"),
        (["--study.noise", "[.inf]"], "study.noise must be finite numbers of at least 0, got [inf]"),
        (["--evaluation.warmup_rate", "-1"], "evaluation.warmup_rate must be at least 0 and finite, got -1"),
        (["--schedule.imitation", "[0.2, .nan]"], "schedule.imitation must be numbers of at least 0, one or more, got"),
        (["--meta.warmup_rate", ".inf"], "meta.warmup_rate must be at least 0 and finite, got inf"),
        (["--meta.lr", ".inf"], "meta.lr must be positive and finite, got inf"),
        (["--perturbation.magnitude", ".inf"], "perturbation.magnitude must be at least 0 and finite, got inf"),
        ([*CHOICE, "--method.policy", "x"], "method.policy must be empty for a choice policy, got 'x'"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    line = refusal(training.main, arguments(*options, "--run.folder", folder), capsys)
    assert message in line and not folder.exists()


def test_the_papers_student_of_a_choice_waits_for_its_policy(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(training.main, ["--config", CONFIGS / "paper_choice_student.yaml"], capsys)
    assert line.startswith("method.policy must be a run of a choice policy or its weights")


def test_races_have_minibatches_of_no_more_than_all_images() -> None:
    with pytest.raises(ConfigError, match=r"evaluation.problems must be at most 200, .* got 'tiny14:201'"):
        raced_problem(config(), "tiny14:201")


def test_the_checkpoint_of_another_student_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = training.MetaTraining(
        raced_problem(config(), "tiny14"), training.make_rule(config(*CHOICE).method), config().meta, config().schedule
    )
    monkeypatch.setattr(training.Run, "restore", lambda _: {"training": other.state_dict(), "episode": 1})
    with pytest.raises(CheckpointError, match=r"checkpoint.pt: a snapshot of replicate 0 must have lstm0_kernel of sh"):
        train(config(), tmp_path / "run", quiet)


def test_settings_have_the_papers_defaults() -> None:
    assert (MetaConfig().unroll, MetaConfig().lr, MetaConfig().spread) == (100, 1e-3, 3.0)
    assert (EvaluationConfig().warmup, EvaluationConfig().warmup_rate) == (100, 0.05)
    with pytest.raises(ConfigError, match=r"study.arms must be any of pool"):
        AmalgamationStudy(arms=["dm"])


def test_runs_are_named_after_what_they_train() -> None:
    assert run_name(config()) == "rnnprop-max-adam-rmsprop-seed0"
    assert run_name(config(*CHOICE, "--seed", 3)) == "choice-seed3"
