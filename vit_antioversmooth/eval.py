"""Measure a finished run: python vit_antioversmooth/eval.py --folder runs/vit_antioversmooth/plain-seed0

Writes eval.json into the run's folder: test accuracy; by layer frequencies, cosines and attention maps on the first
test images; the learnt scales; for a plain vision transformer also the paper's theorems, map by map.
"""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.config import command
from common.data import ImageSet, in_order, load, pixels
from common.experiment import Progress, accuracy, device, eval_command, load_weights, measurement
from common.runs import load_checkpoint
from vit_antioversmooth.attnscale import AttnScale
from vit_antioversmooth.probe import FrequencyProbe
from vit_antioversmooth.scales import scale_modules
from vit_antioversmooth.settings import Config
from vit_antioversmooth.theory_check import bound_violations, bounds_apply, lowpass_share
from vit_antioversmooth.train import network

Metrics = dict[str, Any]


@measurement(Config)
def evaluate(config: Config, folder: Path, progress: Progress) -> Metrics:
    """Test accuracy; by layer frequencies, cosines and maps; scales; the theorems' numbers."""
    splits = load(config.data)
    path = folder / "model.pt"
    content = load_checkpoint(path)
    untrained = replace(config.model, weights="", pretrained=False)  # what training started from may be gone
    model = network(replace(config, model=untrained), splits.train).to(device())
    metrics: Metrics = {}
    if config.train.ema:  # the moving average first: the weights stay for what follows
        load_weights(model, content, path, "average")
        metrics["average_accuracy"] = accuracy(model, splits.test, config.model.normalize, config.eval.batch_size)
    load_weights(model, content, path)
    metrics["test_accuracy"] = accuracy(model, splits.test, config.model.normalize, config.eval.batch_size)
    progress(0.5)
    metrics |= measure(model, splits.test, config)
    return metrics


def measure(model: nn.Module, test: ImageSet, config: Config) -> Metrics:
    """Frequencies, cosines and maps by layer, scales, and for a plain vision transformer the theorems' numbers."""
    model.eval()
    metrics: Metrics = {**probed(model, test, config), **learnt_scales(model)}
    if config.scales.method == "plain" and isinstance(model, VisionTransformer):
        images = first_images(model, test, config, config.eval.theory_images)
        lowpass, judged, curves = lowpass_share(model, images)
        metrics |= {"lowpass_maps": lowpass, "judged_maps": judged, "lowpass_curves": curves}
        if bounds_apply(model):
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
    return config.model.normalize(pixels(raw.to(next(model.parameters()).device)))


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

    def summary(metrics: Metrics, config: Config) -> str:
        layers = enumerate(zip(metrics["hc_over_dc"], metrics["patch_cosine"], strict=True))
        return "\n".join(
            [f"test accuracy {metrics['test_accuracy']:.2f} %", "layer   HC/DC   patch cosine"]
            + [f"{layer:5d} {hc:7.2f} {cosine:14.2f}" for layer, (hc, cosine) in layers]
        )

    eval_command(__file__, Config, evaluate, summary)


if __name__ == "__main__":
    command(main)
