"""What the regularizers cost: time of a step, and of inference after training, against the plain network."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor, nn

from diverse_vit.settings import Config, ObjectiveConfig
from diverse_vit.train import mixer, regularized


def interleaved(works: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median of each work's time over the first one's in the same repeat; in turning order, after one warm-up each."""
    ratios: list[list[float]] = [[] for _ in works]
    for repeat in range(-1, repeats):
        order = list(range(len(works)))[:: 1 if repeat % 2 else -1]
        times = [0.0] * len(works)
        for index in order:
            start = _now()
            works[index]()
            times[index] = _now() - start
        if repeat >= 0:
            for own, spent in zip(ratios, times, strict=True):
                own.append(spent / times[0])
    return [median(own) for own in ratios]


def _now() -> float:
    """Seconds of this process's work: on a processor without those that others take from it."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def cost_ratios(
    config: Config, trained: nn.Module, plain: nn.Module, images: Tensor, labels: Tensor, repeats: int = 15
) -> Mapping[str, float]:
    """`step_ratio`: a training step with the objective over one of the plain network; `inference_ratio` likewise.

    Args:
        config: of the run that `trained` comes from.
        trained: its network, without hooks.
        plain: a network of the same sizes that never had any.
        images: what the network sees, an even number of them.
        labels: of the images.
    """
    mixed = mixer(config, 0)(images, labels) if config.train.mixup or config.train.cutmix else labels

    def step(model: nn.Module, objective: ObjectiveConfig) -> Callable[[], object]:
        model = copy.deepcopy(model).train()
        regularizer = regularized(model, replace(config, objective=objective))

        def work() -> None:
            model.zero_grad()
            regularizer(images, mixed).loss.backward()

        return work

    def inference(model: nn.Module) -> Callable[[], object]:
        model.eval()

        def work() -> None:
            with torch.no_grad():
                model(images)

        return work

    steps = interleaved([step(plain, ObjectiveConfig()), step(trained, config.objective)], repeats)
    inferences = interleaved([inference(plain), inference(trained)], repeats)
    return {"step_ratio": steps[1], "inference_ratio": inferences[1]}
