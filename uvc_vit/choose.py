"""What a run starts from: its network, the controller, and the plans and masks of the arms that need no stage 1."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import ConfigError
from common.data import ImageSet, batches, pixels
from common.experiment import load_weights
from common.masks import prunable_weights
from common.runs import generator, load_checkpoint
from common.vit import build_vit
from uvc_vit.adapter import ViTAdapter
from uvc_vit.controller import UVCController
from uvc_vit.group_norms import group_norms
from uvc_vit.latency import LatencyTable
from uvc_vit.models import t2t_weights
from uvc_vit.one_shot import first_blocks, gradient_scores, random_scores, uniform_plan
from uvc_vit.plan import Plan
from uvc_vit.settings import UNSTRUCTURED, Config
from uvc_vit.solve import Relative
from uvc_vit.unstructured import Pruning, magnitude_mask, taylor_scores, top_share


def network(config: Config, data: ImageSet) -> nn.Module:
    """The network to compress with its starting weights. Raises ConfigError or CheckpointError."""
    net = build(config, data)
    if config.model.weights:
        path = Path(config.model.weights)
        foreign = path.suffix in (".pth", ".tar")
        load_weights(net, {"model": t2t_weights(path)} if foreign else load_checkpoint(path), path)
    return net


def build(config: Config, data: ImageSet) -> nn.Module:
    """The network for images like those of `data`; one with a distillation token gives both outputs in training."""
    net: Any = build_vit(config.model, data)
    if hasattr(net, "set_distilled_training"):
        net.set_distilled_training(True)
    return net


def stream(config: Config, data: ImageSet, step: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Raw images and labels of this rank from step `step` of the run on."""
    for images, labels in batches(data, config.train.batch_size, config.data, seed=config.seed, step=step):
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def controller(config: Config, model: nn.Module, data: ImageSet, steps: int | None = None) -> UVCController:
    """The method for `steps` steps, or for its costs alone. Raises ConfigError where network or method do not fit."""
    _, size = config.model.image_shape(data)
    method = replace(config.method, stage1_steps=steps) if steps else replace(config.method, warmup_steps=0)
    try:
        adapter = ViTAdapter(model)
        costs = LatencyTable.read(Path(method.table)).costs(adapter) if method.table else None
        return UVCController(adapter, method, (size, size), costs)
    except (NotImplementedError, ValueError) as error:
        raise ConfigError(f"method: {error}") from error


def choose(config: Config, model: nn.Module, data: ImageSet) -> Plan:
    """The plan of a method that needs no stage 1. Raises ConfigError where network or budget do not fit."""
    try:
        if config.arm in ("dense", *UNSTRUCTURED):
            return Plan.full(ViTAdapter(model).dims)
        there = controller(config, model, data)
        sizes, costs, budget = there.adapter.dims, there.final_costs, config.method.budget
        if config.arm == "drop-last":
            return first_blocks(costs, sizes, budget)
        norms, align, even = group_norms(there.adapter), config.method.align, config.layout == "padded"
        if config.arm == "gradient":
            scores = gradient_scores(there.adapter, scored(config, model, data), F.cross_entropy, norms)
            return uniform_plan(scores, costs, sizes, budget, "heads", align, even)
        noise = random_scores(norms, generator(config.seed, 5))
        scores = Relative.of(norms)(norms) if config.arm == "magnitude" else noise
        return uniform_plan(scores, costs, sizes, budget, "dims", align, even)
    except (NotImplementedError, ValueError) as error:
        raise ConfigError(f"method: {error}") from error


def pruning(config: Config, model: nn.Module, data: ImageSet, steps: int) -> Pruning | None:
    """Of single weights in `steps` steps of stage 2, in the arms that do so; its density is the budget."""
    if config.arm not in UNSTRUCTURED:
        return None
    weights, density = prunable_weights(model, (nn.Linear, nn.Conv2d)), config.method.budget
    if config.arm == "gmp":
        return Pruning.gradual(model, density, steps)
    if config.arm == "omp":
        return Pruning(model, magnitude_mask(weights, density))
    scores = taylor_scores(model, weights, scored(config, model, data), F.cross_entropy)
    return Pruning(model, top_share(scores, density))


def scored(config: Config, model: nn.Module, data: ImageSet) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches that gradients are scored on, as the network sees them."""
    model.eval()
    device = next(model.parameters()).device
    for images, labels in islice(stream(config, data, 0, device), config.search.accumulate):
        yield config.model.normalize(pixels(images)), labels
