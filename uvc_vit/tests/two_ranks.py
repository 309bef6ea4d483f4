"""What each rank of a data-parallel run finds: two_ranks.py FOLDER, the rank's own in FOLDER/RANK.pt.

The classifier is not zero, so that gradients score something. Rank 1 sees other norms than rank 0, moves and plans by
them, and is to end with what rank 0 has all the same.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from common import distributed
from common.config import parse
from common.data import load
from common.runs import seed_everything
from common.tests.paper_checks import quiet
from uvc_vit import train as training
from uvc_vit.choose import choose, network, pruning
from uvc_vit.controller import UVCController
from uvc_vit.settings import Config

SMOKE = Path(training.__file__).parent / "configs" / "smoke.yaml"


def main(folder: Path) -> None:
    """The plan of arm gradient, the masks of arm taylor; plan and variables of a run of arm uvc."""
    with distributed.process_group():
        config = parse(Config, ["--config", str(SMOKE), "--method.budget", "0.6"], prog="two_ranks")
        data = load(config.data).train
        seed_everything(0)
        model: Any = network(config, data)
        torch.nn.init.normal_(model.head.weight)
        sparse = pruning(replace(config, arm="taylor"), model, data, 10)
        assert sparse is not None
        found: dict[str, Any] = {"gradient": choose(replace(config, arm="gradient"), model, data).to_json()}
        found["taylor"] = torch.cat([mask.flatten() for mask in sparse.masks.values()])
        methods: list[UVCController] = []

        def watched(*arguments: Any) -> UVCController:
            methods.append(controller(*arguments))
            methods[0].relative.neuron.mul_(torch.linspace(1, 1 + 9 * distributed.rank(), 3)[:, None])  # of the blocks
            return methods[0]

        controller = training.controller
        with mock.patch.object(training, "controller", watched):
            found["plan"] = training.train(config, folder / "run", quiet)["plan"]
        torch.save({**found, **methods[0].variables.state_dict()}, folder / f"{distributed.rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
