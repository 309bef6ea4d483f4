"""Pre-trained weights of other projects: python -m double_win_lth.convert IN.pt OUT.safetensors

Robust ImageNet checkpoints wrap the network and put a normaliser in front; here only the network's own names stay.
Nothing in the file is executed: one that holds more than tensors and plain data is refused.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from common.config import command, require
from common.runs import CheckpointError, write_atomically

WRAPPERS = ("module.", "model.", "net.", "1.")  # "1.": nn.Sequential(normaliser, network)
NORMALISER = ("normalizer.", "normalize.", "normalization.", "0.")
OTHERS = ("attacker.",)  # a second copy of the network in checkpoints of the robustness library
CONTAINERS = ("state_dict", "model_state_dict", "model", "net")


def plain_names(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The network's own tensors of a state dict, without wrappers' prefixes, normaliser and second copies."""
    found = {}
    for key, value in state.items():
        name = key
        while name.startswith(WRAPPERS):
            name = name.partition(".")[2]
        if isinstance(value, Tensor) and not name.startswith((*NORMALISER, *OTHERS)) and name not in ("mean", "std"):
            found[name] = value
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors or a torch file. Raises `CheckpointError` if it is missing or unreadable."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file of weights")
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        for name in CONTAINERS:
            content = content[name] if isinstance(content.get(name), Mapping) else content
        found = plain_names(content)
    except Exception as error:  # torch, pickle, zip and safetensors each have their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: not a state dict of tensors and plain data ({reason})") from error
    if not found:
        keys = ", ".join(map(str, list(content)[:5]))
        raise CheckpointError(f"{path}: must hold a state dict, by itself or under {', '.join(CONTAINERS)}, got {keys}")
    return found


def load_pretrained(model: nn.Module, state: Mapping[str, Tensor], path: Path, without: str = "") -> None:
    """Load `state` into `model`, all of it but the tensors of the module `without` (a head of its own).

    Raises:
        CheckpointError: naming the first tensor that is missing, unknown or of another shape; `model` is unchanged.
    """
    own = {k: v for k, v in model.state_dict().items() if not without or not k.startswith(f"{without}.")}
    given = {k: v for k, v in state.items() if not without or not k.startswith(f"{without}.")}
    counters = {key for key in own if key.endswith("num_batches_tracked")}  # missing in old files
    for key in sorted(own.keys() - given.keys() - counters):
        raise CheckpointError(f"{path}: lacks {key} of this network")
    for key in sorted(given.keys() - own.keys()):
        raise CheckpointError(f"{path}: holds {key}, which this network has not")
    for key, value in given.items():
        if value.shape != own[key].shape:
            raise CheckpointError(f"{path}: {key} must be {tuple(own[key].shape)}, got {tuple(value.shape)}")
    model.load_state_dict(given, strict=False)


def main() -> None:
    """The command line."""
    require(len(sys.argv) == 3, "arguments", sys.argv[1:], "the file to read and the .safetensors file to write")
    source, target = map(Path, sys.argv[1:])
    require(target.suffix == ".safetensors", "output", str(target), "a .safetensors file")
    weights = {name: value.contiguous() for name, value in read_weights(source).items()}
    write_atomically(target, safetensors.torch.save(weights))
    print(f"{len(weights)} tensors, {sum(value.numel() for value in weights.values()):,} numbers in {target}")


if __name__ == "__main__":
    command(main)
