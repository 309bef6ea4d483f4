"""The measure of generated images: a Fréchet distance in the features of a classifier of the same real images.

The classifier is trained here, once for all runs beside each other, always from the same seed and on one thread, so
that it comes out the same. Its numbers are `fd_classifier`, never FID, and compare only within one configuration.
"""

import fcntl
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import UserError
from common.data import ImageSet, Splits, batches, in_order, steps_per_epoch
from common.experiment import load_weights
from common.runs import generator, load_checkpoint, save_checkpoint
from sparse_gan.generative_evaluator import GenerativeEvaluator
from sparse_gan.images import blurred, channels_of, prepare
from sparse_gan.settings import Config

SEED = 12345
BLURS = (0.5, 1.0, 2.0)  # pixels
Report = dict[str, Any]


class Classifier(nn.Module):
    """Stages of convolution, batch norm, ReLU with max-pooling behind each; one hidden layer, whose output is used."""

    def __init__(self, size: int, channels: int, classes: int, widths: list[int], convs: int, feature_dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            for _ in range(convs):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        side = size >> len(widths)
        hidden = nn.Linear(channels * side**2, feature_dim)
        self.features = nn.Sequential(*layers, nn.Flatten(), hidden, nn.ReLU(inplace=True))
        self.output = nn.Linear(feature_dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, channels, size, size) in [-1, 1] -> (batch, classes)."""
        return self.output(self.features(images))


def fd_classifier(config: Config, splits: Splits, folder: Path) -> tuple[GenerativeEvaluator, Report]:
    """The evaluator and what is known about it; trained at the first call and kept in `folder`.

    Safe against other processes that ask at the same time: one trains, the others wait.

    Returns:
        The evaluator, and {"classifier_accuracy": percent on test, "floor": distance of training and test images,
        "noise": of uniform noise, "blur": of test images blurred by BLURS pixels}.

    Raises:
        UserError: where the classifier is too weak, or its distance does not order floor, blurs and noise.
    """
    options = config.eval
    size, classes = config.model.size, splits.train.classes
    channels = channels_of(splits.train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        classifier = Classifier(size, channels, classes, options.widths, options.convs, options.feature_dim)
    described = (config.data, size, options.widths, options.convs, options.feature_dim, options.epochs)
    identity = f"{described} {options.crop_padding} {options.flip} {options.min_accuracy} {torch.__version__}"
    path = folder / f"classifier-{hashlib.sha256(identity.encode()).hexdigest()[:8]}.pt"
    folder.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the system however this process ends
        if not path.exists():
            report = _train(classifier, config, splits)
            save_checkpoint(path, {"model": classifier.state_dict(), "report": report})
    content = load_checkpoint(path)
    load_weights(classifier, content, path)
    return _evaluator(classifier, config), content["report"]


def real_images(data: ImageSet, size: int) -> Tensor:
    """All images of a split in [-1, 1] at `size`."""
    return torch.cat([prepare(images, size) for images, _ in in_order(data, 1000)])


def _evaluator(classifier: Classifier, config: Config) -> GenerativeEvaluator:
    features: Callable[[Tensor], Tensor] = classifier.eval().requires_grad_(False).features
    return GenerativeEvaluator(features, config.eval.batch_size)


def _train(classifier: Classifier, config: Config, splits: Splits) -> Report:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _fit(classifier, config, splits.train)
        return _checked(classifier, config, splits)
    finally:
        torch.set_num_threads(threads)


def _fit(classifier: Classifier, config: Config, train: ImageSet, batch_size: int = 100, lr: float = 3e-3) -> None:
    options = config.eval
    data = replace(config.data, crop_padding=options.crop_padding, flip=options.flip)
    batch_size = min(batch_size, len(train))
    total = options.epochs * steps_per_epoch(train, batch_size)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total)
    stream = batches(train, batch_size, data, seed=SEED)
    classifier.train()
    for _ in range(total):
        images, labels = next(stream)
        loss = F.cross_entropy(classifier(prepare(images, config.model.size)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _checked(classifier: Classifier, config: Config, splits: Splits) -> Report:
    classifier.eval()
    test = real_images(splits.test, config.model.size)
    guesses = torch.cat([classifier(batch).argmax(1) for batch in test.split(config.eval.batch_size)])
    accuracy = 100 * float((guesses == splits.test.labels).double().mean())
    if accuracy < config.eval.min_accuracy:
        least = config.eval.min_accuracy
        raise UserError(f"the classifier of fd_classifier must reach {least} % on test images, got {accuracy:.2f} %")
    evaluator = _evaluator(classifier, config)
    noise = torch.rand(test.shape, generator=generator(SEED)) * 2 - 1
    floor = evaluator.distance(test, real_images(splits.train, config.model.size))
    blur = [evaluator.distance(test, blurred(test, sigma)) for sigma in BLURS]
    noisy = evaluator.distance(test, noise)
    ordered = [floor, *blur]
    if ordered != sorted(ordered) or not noisy > max(blur[0], floor):
        found = f"floor {floor:.1f}, blurs {', '.join(f'{value:.1f}' for value in blur)}, noise {noisy:.1f}"
        raise UserError(
            f"fd_classifier must rise from the floor with blur, and noise be worse than a blur, got {found}"
        )
    return {"classifier_accuracy": accuracy, "floor": floor, "noise": noisy, "blur": blur}
