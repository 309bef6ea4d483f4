"""A sharded network moved by every form of the step on two ranks: two_ranks.py FOLDER."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from common import distributed
from symbolic_l2o import SymbolicOptimizer, SymbolicRule, presets
from symbolic_l2o.rule import fir_rule

FORMS = {"loop": {"foreach": False}, "together": {"foreach": True}, "default": {}}


def rules() -> dict[str, SymbolicRule]:
    """A pole rule and one with delay lines."""
    weights = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    return {"pole": presets("rp_pole_mnist5k"), "fir": fir_rule(("mt", "gt"), weights, [0.3, 2.0])}


def trained(rule: SymbolicRule, sharded: bool, **options: bool) -> dict[str, Tensor]:
    """Weights after five steps on the same batches, the last two after the state went through a file."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))  # one row: a rank without any
    if sharded:
        from torch.distributed.fsdp import fully_shard

        fully_shard(net, mesh=torch.distributed.init_device_mesh("cpu", (distributed.world_size(),)))
    optimizer = SymbolicOptimizer(net.parameters(), rule, weight_decay=0.1, **options)
    for step in range(5):
        if step == 3:
            file = io.BytesIO()
            torch.save(optimizer.state_dict()["state"], file)
            saved = {**optimizer.state_dict(), "state": torch.load(io.BytesIO(file.getvalue()), weights_only=False)}
            optimizer = SymbolicOptimizer(net.parameters(), rule, weight_decay=0.1, **options)
            optimizer.load_state_dict(saved)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(distributed.shard(x)).square().mean().backward()
        optimizer.step()
    return {name: (p.full_tensor() if sharded else p).detach().clone() for name, p in net.named_parameters()}


def main(folder: Path) -> None:
    """Rank 0 saves the weights of each rule and form."""
    with distributed.process_group():
        for name, rule in rules().items():
            for form, options in FORMS.items():
                found = trained(rule, True, **options)
                if distributed.rank() == 0:
                    torch.save(found, folder / f"{name}-{form}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
