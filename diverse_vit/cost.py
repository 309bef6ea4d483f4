"""What the regularizers cost: time of a step, and of inference after training, against the plain network."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from common.bench import interleaved, ratio
from diverse_vit.regularizer import DiverseRegularizer
from diverse_vit.settings import Config, ObjectiveConfig
from diverse_vit.train import mixer, regularized


def cost_ratios(
    config: Config, trained: nn.Module, plain: nn.Module, images: Tensor, labels: Tensor, repeats: int = 15
) -> Mapping[str, float]:
    """`step_ratio`: a training step with the objective over one of the plain network; `inference_ratio` likewise.

    Inference is that of the very networks that made the steps, once their hooks are removed.

    Args:
        config: of the run that `trained` comes from.
        trained: its network, without hooks.
        plain: a network of the same sizes that never had any.
        images: what the network sees, an even number of them.
        labels: of the images.
    """
    mixed = mixer(config, 0)(images, labels) if config.train.mixup or config.train.cutmix else labels
    regularizers = {
        "plain": regularized(plain, replace(config, objective=ObjectiveConfig())),
        "ours": regularized(trained, config),
    }

    def step(regularizer: DiverseRegularizer) -> Callable[[], object]:
        regularizer.model.train()

        def work() -> None:
            regularizer.model.zero_grad()
            regularizer(images, mixed).loss.backward()

        return work

    def inference(regularizer: DiverseRegularizer) -> Callable[[], object]:
        regularizer.detach()
        model = regularizer.model.eval()

        def work() -> None:
            with torch.no_grad():
                model(images)

        return work

    steps = interleaved({name: step(regularizer) for name, regularizer in regularizers.items()}, repeats)
    inferences = interleaved({name: inference(regularizer) for name, regularizer in regularizers.items()}, repeats)
    return {
        name: ratio(times, "ours", "plain") for name, times in (("step_ratio", steps), ("inference_ratio", inferences))
    }
