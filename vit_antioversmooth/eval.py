"""Measure a finished run: python vit_antioversmooth/eval.py --folder runs/vit_antioversmooth/plain-seed0

Writes eval.json into the run's folder: test accuracy; by layer frequencies, cosines and attention maps on the first
test images; the learnt scales; for a plain vision transformer also the paper's theorems, map by map.
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.config import ConfigError, command, parse, require
from common.config import load as load_config
from common.data import ImageSet, in_order, load, pixels
from common.runs import CheckpointError, load_checkpoint, read_json, write_json
from vit_antioversmooth.attnscale import AttnScale
from vit_antioversmooth.probe import FrequencyProbe
from vit_antioversmooth.scales import scale_modules
from vit_antioversmooth.settings import Config
from vit_antioversmooth.theory_check import bound_violations, lowpass_share
from vit_antioversmooth.train import accuracy, network, normalizer

Metrics = dict[str, Any]


@dataclass(frozen=True)
class EvalArguments:
    """Which run to measure."""

    folder: str = ""
    """of a finished run of train.py"""

    def __post_init__(self) -> None:
        require(bool(self.folder), "folder", self.folder, "the folder of a run")


def evaluate(folder: Path) -> Metrics:
    """Metrics of the finished run in `folder`, kept in eval.json and read from there.

    Raises:
        ConfigError: if the run is not there or not finished; CheckpointError: if its weights are damaged.
    """
    if not (folder / "config.yaml").exists():
        raise ConfigError(f"{folder}: no such run (it has no config.yaml)")
    if not (folder / "done.json").exists():
        raise ConfigError(f"{folder}: this run is not finished; run train.py with its configuration again")
    if (folder / "eval.json").exists():
        return read_json(folder / "eval.json")
    config = load_config(Config, folder / "config.yaml")
    splits = load(config.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = folder / "model.pt"
    content = load_checkpoint(path)
    model = network(config, splits.train).to(device)
    metrics: Metrics = {}
    for name in ("average", "model"):  # the moving average first: the weights stay for what follows
        if name == "average" and not config.train.ema:
            continue
        try:
            model.load_state_dict(content[name])
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path}: not the weights of this run's network") from error
        metrics["test_accuracy" if name == "model" else "average_accuracy"] = accuracy(model, splits.test, config)
    metrics |= measure(model, splits.test, config)
    write_json(folder / "eval.json", metrics)
    return metrics


def measure(model: nn.Module, test: ImageSet, config: Config) -> Metrics:
    """Frequencies, cosines and maps by layer, scales, and for a plain vision transformer the theorems' numbers."""
    model.eval()
    metrics: Metrics = {**probed(model, test, config), **learnt_scales(model)}
    if config.scales.method == "plain" and isinstance(model, VisionTransformer):
        images = first_images(model, test, config, config.eval.theory_images)
        lowpass, judged, curves = lowpass_share(model, images)
        metrics |= {"lowpass_maps": lowpass, "judged_maps": judged, "lowpass_curves": curves}
        metrics |= bound_violations(model, images)
    return metrics


@torch.no_grad()
def probed(
    model: nn.Module, test: ImageSet, config: Config, what: tuple[str, ...] = ("hc", "cos", "attn", "rho")
) -> dict[str, list[float]]:
    """What `FrequencyProbe` says on the first eval.probe_images test images."""
    images = first_images(model, test, config, config.eval.probe_images)
    with FrequencyProbe(model, what) as probe:
        for batch in images.split(config.eval.batch_size):
            model(batch)
    return probe.results()


def first_images(model: nn.Module, test: ImageSet, config: Config, count: int) -> Tensor:
    """The network's inputs for the first `count` test images, on its device."""
    needed = -(-count // config.eval.batch_size)
    raw = torch.cat([images for images, _ in islice(in_order(test, config.eval.batch_size), needed)])[:count]
    return normalizer(config)(pixels(raw.to(next(model.parameters()).device)))


def learnt_scales(model: nn.Module) -> Metrics:
    """By layer: `omega` of each head, means over channels of `s` and `t`; absent where the model has no such scale."""
    found: Metrics = {}
    for _, scale in scale_modules(model):
        if isinstance(scale, AttnScale):
            found.setdefault("omega", []).append(scale.omega.tolist())
        else:
            found.setdefault("s", []).append(scale.s.mean().item())
            found.setdefault("t", []).append(scale.t.mean().item())
    return found


def main() -> None:
    """The command line."""
    arguments = parse(
        EvalArguments, prog="python vit_antioversmooth/eval.py", description=(__doc__ or "").splitlines()[0]
    )
    metrics = evaluate(Path(arguments.folder))
    print(f"test accuracy {metrics['test_accuracy']:.2f} %")
    print("layer   HC/DC   patch cosine")
    for layer, pair in enumerate(zip(metrics["hc_over_dc"], metrics["patch_cosine"], strict=True)):
        print(f"{layer:5d} {pair[0]:7.2f} {pair[1]:14.2f}")


if __name__ == "__main__":
    command(main)
