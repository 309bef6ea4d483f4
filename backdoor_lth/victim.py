"""What a run trains on and is judged by: the poisoned training set, the network, clean and triggered test images."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from backdoor_lth.metrics import Normalize
from backdoor_lth.models import build_model
from backdoor_lth.poisoning import FIELD, PLACES, POISON, Poisoned, equalised, poison
from backdoor_lth.restricted_imagenet import restricted
from backdoor_lth.settings import Config
from backdoor_lth.triggers import Trigger, patch_image
from backdoor_lth.warp import Warp, random_field
from common.config import ConfigError, require
from common.data import ImageSet, load
from common.experiment import finished_run, load_weights
from common.runs import generator, load_checkpoint, seed_everything


@dataclass(frozen=True)
class Victim:
    """The data of one run; images have three channels."""

    poisoned: Poisoned
    train: ImageSet
    test: ImageSet
    triggered: ImageSet


class Normalized(nn.Module):
    """A network that takes pixels in [0, 1]."""

    def __init__(self, model: nn.Module, normalize: Normalize) -> None:
        super().__init__()
        self.model, self.normalize = model, normalize

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) in [0, 1] -> logits."""
        return self.model(self.normalize(x))


def coloured(data: ImageSet) -> ImageSet:
    """Grey images repeated to three channels; others as they are."""
    assert isinstance(data.images, Tensor)
    one = data.images.shape[1] == 1
    return replace(data, images=data.images.expand(-1, 3, -1, -1).contiguous()) if one else data


def clean(config: Config) -> tuple[ImageSet, ImageSet]:
    """Training and test images before any poison, in three channels."""
    splits = load(config.data)
    train, test = coloured(splits.train), coloured(splits.test)
    return (restricted(train), restricted(test)) if config.restricted else (train, test)


def victim(config: Config) -> Victim:
    """The configured data, poisoned. Raises `ConfigError` where the attack does not fit it."""
    train, test = clean(config)
    assert isinstance(train.images, Tensor) and isinstance(test.images, Tensor)
    name, got = ("data.classes", config.data.classes) if config.data.classes else ("data", train.classes)
    require(train.classes >= 3, name, got, "of at least 3 classes, or no label's trigger stands out")
    attack, side = config.attack, min(train.images.shape[2:])
    trigger: Trigger | Warp
    if attack.trigger == "warp":
        require(attack.size <= side, "attack.size", attack.size, f"at most {side}, the side of the images")
        trigger = Warp(random_field(attack.field, generator(config.seed, POISON, FIELD)), attack.strength)
    else:
        trigger = Trigger(patch_image(attack.trigger, attack.size), attack.place, attack.margin)
    try:
        made = poison(
            train.images,
            train.labels,
            trigger,
            ratio=0.0 if attack.kind == "none" else attack.ratio,
            target=attack.target,
            mode="dirty" if attack.kind == "none" else attack.kind,
            select=attack.select,
            seed=config.seed,
            surrogate=_surrogate(config, train) if attack.kind == "clean_label" else None,
        )
        triggered = trigger.stamp(test.images, generator(config.seed, POISON, PLACES, 1))
    except ValueError as error:
        raise ConfigError(f"attack: {error}") from error
    made = equalised(made, config.seed) if attack.equalise else made
    poisoned = ImageSet(made.images, made.labels, train.classes)
    return Victim(made, poisoned, test, replace(test, images=triggered))


def network(config: Config, data: ImageSet, device: torch.device) -> nn.Module:
    """The configured network for images like those of `data`, its weights drawn now from the run's seed."""
    channels, size = config.model.image_shape(data)
    seed_everything(config.seed)
    model = build_model(config.model.name, channels, data.classes)
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, channels, size, size))
    except RuntimeError as error:
        raise ConfigError(f"model.name {config.model.name} does not take images of {channels}x{size}x{size}") from error
    return model.train().to(device)


def _surrogate(config: Config, data: ImageSet) -> nn.Module:
    """The robust network of attack.surrogate, for pixels in [0, 1]."""
    folder = Path(config.attack.surrogate)
    there = finished_run(folder, Config)
    model = network(there, data, torch.device("cpu"))
    load_weights(model, load_checkpoint(folder / "model.pt"), folder / "model.pt")
    return Normalized(model, there.model.normalize)
