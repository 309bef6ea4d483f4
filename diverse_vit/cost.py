"""What the regularizers cost: time of a step, and of inference after training, against the plain network."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from common.bench import interleaved, ratio
from diverse_vit.settings import Config, ObjectiveConfig
from diverse_vit.train import mixer, regularized


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

    steps = interleaved({"plain": step(plain, ObjectiveConfig()), "ours": step(trained, config.objective)}, repeats)
    inferences = interleaved({"plain": inference(plain), "ours": inference(trained)}, repeats)
    return {
        name: ratio(times, "ours", "plain") for name, times in (("step_ratio", steps), ("inference_ratio", inferences))
    }
