"""Measure a finished run: python sparse_gan/eval.py --folder runs/sparse_gan/dynamic-g0.05-d0.3-seed0

Writes eval.json into the run's folder: fd_classifier, KID, precision and recall of the averaged generator's images, the
distance over training, topology, FLOPs, and a sheet of samples; sheet.png beside it.
"""

import base64
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config import command, require
from common.data import load
from common.experiment import device, eval_command, load_weights, measurement
from common.masks import Masks
from common.runs import CheckpointError, load_checkpoint, read_json, write_atomically
from common.study import Progress
from sparse_gan.fd_classifier import fd_classifier, real_images
from sparse_gan.fidelity import fidelity_scores
from sparse_gan.figures import sheet_png
from sparse_gan.flops import sparse_flops, training_flops
from sparse_gan.game import build_networks, draw_noise
from sparse_gan.images import as_bytes, channels_of, from_bytes
from sparse_gan.models import Discriminator, Generator
from sparse_gan.settings import Config
from sparse_gan.sparse_state import unpack
from sparse_gan.train import snapshot_path, snapshot_steps

Metrics = dict[str, Any]
SHEET = 20  # images
SAMPLE_KEY = 7  # of the noise that samples start from: none that training draws from


@measurement(Config)
def evaluate(config: Config, folder: Path, progress: Progress) -> Metrics:
    """Scores of the averaged generator, its topology, costs and curve; the classifier is kept beside the folder.

    Raises `UserError` if the classifier is no measure.
    """
    splits = load(config.data)
    compared = getattr(splits, config.eval.split)
    fewer = f"less than the {len(compared)} images compared with"
    require(config.eval.feature_dim < len(compared), "eval.feature_dim", config.eval.feature_dim, fewer)
    path = folder / "model.pt"
    content = load_checkpoint(path)
    g, d = build_networks(config, channels_of(splits.train), splits.train.classes)
    masks_d = _load(d, content, path, "d")
    masks_g = _load(g, content, path, "average")
    metrics: Metrics = {
        **read_json(folder / "done.json"),
        **topology(g, masks_g),
        **costs(config, g, masks_g, d, masks_d),
    }
    evaluator, report = fd_classifier(config, splits, folder.parent)
    progress(0.4)
    real = from_bytes(as_bytes(real_images(compared, config.model.size)))
    images = samples(g.to(device()), config, config.eval.samples)
    metrics |= {**report, **evaluator.score(real, from_bytes(images)), "sheet": packed_sheet(images[:SHEET])}
    if config.eval.fidelity:
        metrics |= fidelity_scores(images, as_bytes(real_images(splits.train, config.model.size)))
    write_atomically(folder / "sheet.png", sheet_png(images[:SHEET]))
    if "masked_average" in content:
        _load(g, content, path, "masked_average")
        masked = samples(g, config, config.eval.samples)
        metrics["masked_average_fd"] = evaluator.distance(real, from_bytes(masked))
    curve: list[list[float]] = []
    for step in snapshot_steps(config):
        progress(0.5 + 0.5 * len(curve) / config.train.snapshots)
        there = snapshot_path(folder, step)
        _load(g, load_checkpoint(there), there, "average")
        curve.append([step, evaluator.distance(real, from_bytes(samples(g, config, config.eval.curve_samples)))])
    metrics["curve"] = curve
    return metrics


@torch.no_grad()
def samples(g: Generator, config: Config, count: int) -> Tensor:
    """The generator's first `count` images of the run's seed, uint8; a smaller count gives the first of a larger."""
    images, where = [], next(g.parameters()).device
    for number, begin in enumerate(range(0, count, config.eval.batch_size)):
        noise = draw_noise(config.eval.batch_size, g.z_dim, max(g.classes, 1), config.seed, SAMPLE_KEY, number)
        images.append(as_bytes(g.eval()(*(part.to(where) for part in noise))[: count - begin]).cpu())
    return torch.cat(images)


def topology(g: Generator, masks: Masks) -> Metrics:
    """Density by layer of the generator's convolutions."""
    layers = [name for name, weight in g.named_parameters() if weight.ndim == 4]
    densities = {name: float(masks[name].double().mean()) if name in masks else 1.0 for name in layers}
    return {"layer_density": {name.removesuffix(".weight"): density for name, density in densities.items()}}


def costs(config: Config, g: Generator, masks_g: Masks, d: Discriminator, masks_d: Masks) -> Metrics:
    """FLOPs: of one image's generation, and of one image's share of a generator step in training; dense and sparse.

    No sparse training FLOPs where densities change in training (gmp, oneshot, imp, balance): the last masks would not
    tell them. Growth by gradient needs the generator's dense weight gradient once in update_every steps, which is not
    counted.
    """
    z, labels = draw_noise(1, g.z_dim, max(g.classes, 1), 0)
    flops_g = sparse_flops(g, (z, labels), masks_g)
    image = torch.zeros(1, g.output.out_channels, config.model.size, config.model.size)
    flops_d = sparse_flops(d, (image, labels), masks_d)
    training = {kind: training_flops(flops_g[kind], flops_d[kind], config.train.n_dis) for kind in ("dense", "sparse")}
    lasting = config.sparsity.method not in ("gmp", "oneshot", "imp") and not config.sparsity.balance
    return {
        "inference_flops": flops_g["sparse"],
        "inference_flops_dense": flops_g["dense"],
        **({"training_flops": training["sparse"]} if lasting else {}),
        "training_flops_dense": training["dense"],
    }


def packed_sheet(images: Tensor) -> dict[str, Any]:
    """Images (n, channels, side, side) uint8 at 16 grey levels, compressed, as text."""
    levels = ((images.float() / 17).round()).to(torch.uint8)
    return {"shape": list(images.shape), "data": base64.b64encode(zlib.compress(levels.numpy().tobytes(), 9)).decode()}


def _load(network: Generator | Discriminator, content: Metrics, path: Path, name: str) -> Masks:
    """Load what was packed as content[name]; returns its masks. Raises `CheckpointError` if it is another network's."""
    try:
        state, masks = unpack(content[name])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: not the weights of this run's network") from error
    load_weights(network, {name: state}, path, name)
    return masks


def main() -> None:
    """The command line."""

    def summary(metrics: Metrics, config: Config) -> str:
        scores = f"fd_classifier {metrics['fd']:.1f} (real images {metrics['floor']:.1f}, noise {metrics['noise']:.1f})"
        more = f"KID {metrics['kid']:.3f}, precision {metrics['precision']:.3f}, recall {metrics['recall']:.3f}"
        use = "inference" if "training_flops" not in metrics else "training"
        share = metrics[f"{use}_flops"] / metrics[f"{use}_flops_dense"]
        return f"{scores}; {more}\n{use} FLOPs {share:.1%} of dense; samples: sheet.png in the run's folder"

    eval_command(__file__, Config, evaluate, summary)


if __name__ == "__main__":
    command(main)
