"""Measure a finished run: python diverse_vit/eval.py --folder runs/diverse_vit/plain-seed0

Writes eval.json into the run's folder: test accuracy, the redundancy report on the first test images, singular values,
and what of the regularizers is left in the network (nothing should be).
"""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.config import command
from common.data import ImageSet, Splits, in_order, load, pixels
from common.experiment import Progress, accuracy, device, eval_command, load_weights, measurement
from common.runs import load_checkpoint, read_json
from common.vit import build_vit
from diverse_vit.redundancy import gaussian_rre, redundancy_report, spectrum
from diverse_vit.settings import Config
from diverse_vit.timm_parts import blocks_of, qkv_weights

Metrics = dict[str, Any]


@measurement(Config)
def evaluate(config: Config, folder: Path, progress: Progress) -> Metrics:
    """Test accuracy, and redundancy of embeddings, attention maps and weights by layer."""
    splits = load(config.data)
    model, average_accuracy = trained_network(folder, config, splits)
    metrics: Metrics = {} if average_accuracy is None else {"average_accuracy": average_accuracy}
    metrics["test_accuracy"] = accuracy(model, splits.test, config.model.normalize, config.eval.batch_size)
    progress(0.5)
    done = read_json(folder / "done.json")
    metrics |= {key: done[key] for key in ("parameters", "skipped", "hooks_left", "keys_changed")}
    metrics |= redundancy(model, splits.test, config)
    return metrics


def trained_network(folder: Path, config: Config, splits: Splits) -> tuple[nn.Module, float | None]:
    """The run's network with its weights, and the test accuracy of their moving average where there is one."""
    path = folder / "model.pt"
    content = load_checkpoint(path)
    model = build_vit(replace(config.model, pretrained=False), splits.train).to(device())
    average = None
    if config.train.ema:
        load_weights(model, content, path, "average")
        average = accuracy(model, splits.test, config.model.normalize, config.eval.batch_size)
    load_weights(model, content, path)
    return model.eval(), average


def redundancy(model: nn.Module, test: ImageSet, config: Config) -> Metrics:
    """The redundancy report, singular values of q, k, v, and the reconstruction error of a Gaussian matrix."""
    needed = -(-config.eval.images // config.eval.batch_size)
    place = next(model.parameters()).device
    batches = islice(in_order(test, config.eval.batch_size), needed)
    seen = (config.model.normalize(pixels(images.to(place))) for images, _ in batches)
    first = qkv_weights(blocks_of(model)[0], 0)[0]
    return {
        **redundancy_report(model, seen, config.eval.images),
        "spectrum": spectrum(model),
        "gaussian_rre_25": gaussian_rre((first.shape[1], first.shape[2])),
    }


def main() -> None:
    """The command line."""

    def summary(metrics: Metrics, config: Config) -> str:
        layers = enumerate(metrics["embedding_cosine"])
        heads = ["", *(f"{value:12.2f}" for value in metrics.get("head_cosine", []))]
        lines = [f"test accuracy {metrics['test_accuracy']:.2f} %", "layer  patch cosine  head cosine"]
        lines += [f"{layer:5d} {value:13.2f} {heads[layer] if layer < len(heads) else ''}" for layer, value in layers]
        errors = ", ".join(f"{name} {mean(weight['rre_25']):.3f}" for name, weight in metrics["weights"].items())
        return "\n".join([*lines, f"reconstruction error of weights at 25 % of the rank: {errors}"])

    def mean(values: list[float]) -> float:
        return float(torch.tensor(values).mean())

    eval_command(__file__, Config, evaluate, summary)


if __name__ == "__main__":
    command(main)
