"""Facts about being interrupted: in every regime, pruner and kind of rewinding a chain ends as if it had not been."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from torch import Tensor

from certified_pruning import train as training
from certified_pruning.settings import Config, Method, Regime
from certified_pruning.tests.test_regimes import ADAM, CHANNELS, config, quiet
from certified_pruning.train import train
from common.tests import children

METHODS, REGIMES = get_args(Method), get_args(Regime)
KINDS = ["lt", "rewind_lt", "pt", "rewind_trained", "finetune"]
UNFUSED = ["--train.regime", "crown_ibp", "--train.loss_fusion", "false", *ADAM]
VARIANTS: list[list[object]] = [
    ["--prune.method", method, "--train.regime", REGIMES[i % 5], "--prune.prune_type", KINDS[i % 5]]
    + ["--prune.rewind_epoch", 1, "--prune.rate", 0.25 if method in CHANNELS else 0.5, *(ADAM if i % 2 else [])]
    for i, method in enumerate(METHODS)
]
VARIANTS += [
    [*UNFUSED, "--prune.method", "imp+nrs"],
    [*UNFUSED, "--train.bounds", "auto_lirpa"],
    ["--prune.method", "snip", "--prune.rounds", 1, "--prune.at_init", "true", "--prune.rate", 0.9],
]


class Stop(Exception):
    pass


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(map(str, options)).replace("--", ""))
def test_an_interrupted_chain_ends_bit_for_bit_like_an_undisturbed_one(options: list, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(config(*options), whole, quiet)
    loss = training._loss
    for stop_at in (2, 5, 10):

        def stopping(
            config: Config, model: Any, raw: Tensor, labels: Tensor, step: int, *rest: Any, at: int = stop_at
        ) -> Any:
            if step == at:
                raise Stop
            return loss(config, model, raw, labels, step, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "_loss", stopping)
            try:
                train(config(*options), broken, quiet)
            except Stop:
                continue
    train(config(*options), broken, quiet)
    patterns = ["tickets/*.pt", "metrics.jsonl", "done.json"]
    assert children.tree(broken, patterns) == children.tree(whole, patterns)
