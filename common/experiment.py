"""What the train.py, eval.py and reproduce.py of every paper have in common."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.config import ConfigError, load, parse, require
from common.data import ImageSet, in_order, pixels
from common.runs import CheckpointError, keep_freed_memory, read_json, write_json
from common.study import Progress

C = TypeVar("C")
Metrics = dict[str, Any]


@dataclass(frozen=True)
class InputConfig:
    """What the network sees of an image; the first settings of a paper's ModelConfig."""

    mean: list[float] = field(default_factory=lambda: [0.0])
    """the network sees (pixels - mean) / std, by channel"""
    std: list[float] = field(default_factory=lambda: [1.0])

    def __post_init__(self) -> None:
        require(len(self.mean) == len(self.std) > 0, "model.std", self.std, "as many numbers as model.mean")
        require(all(value > 0 for value in self.std), "model.std", self.std, "positive")

    def normalize(self, raw: Tensor) -> Tensor:
        """The network's inputs for pixels in [0, 1], (batch, channels, height, width)."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(raw) for values in (self.mean, self.std))
        return (raw - mean) / std

    def image_shape(self, data: ImageSet) -> tuple[int, int]:
        """Channels and side of the images. Raises `ConfigError` unless they are square and `mean` fits."""
        if isinstance(data.images, Tensor):
            _, channels, size, width = data.images.shape
        else:
            channels, size, width = 3, data.images.config.size, data.images.config.size
        require(size == width, "data", (size, width), "square images")
        allowed = f"as many numbers as the images' {channels} channels, or one"
        require(len(self.mean) in (1, channels), "model.mean", self.mean, allowed)
        return channels, size


@torch.no_grad()
def accuracy(
    model: nn.Module, data: ImageSet, normalize: Callable[[Tensor], Tensor] = lambda raw: raw, batch_size: int = 500
) -> float:
    """Top-1 accuracy in percent, in eval mode, on the model's device; 0 without images."""
    model.eval()
    device, correct = next(model.parameters()).device, 0
    for images, labels in in_order(data, batch_size):
        logits = model(normalize(pixels(images.to(device))))
        correct += int((logits.argmax(1) == labels.to(device)).sum())
    return 100 * correct / max(len(data), 1)


def load_weights(model: nn.Module, content: Mapping[str, Any], path: Path, name: str = "model") -> None:
    """Load content[name], read from the checkpoint at `path`. Raises `CheckpointError` if it is another network's."""
    try:
        model.load_state_dict(content[name])
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path}: not the weights of this run's network") from error


def device() -> torch.device:
    """This process's GPU (LOCAL_RANK under torchrun, else the first), else the CPU."""
    gpu = torch.cuda.is_available()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")


def finished_run(folder: Path, config_class: type[C]) -> C:
    """The configuration of the finished run in `folder`. Raises `ConfigError` if it is not there or not finished."""
    if not (folder / "config.yaml").exists():
        raise ConfigError(f"{folder}: no such run (it has no config.yaml)")
    if not (folder / "done.json").exists():
        raise ConfigError(f"{folder}: this run is not finished; run train.py with its configuration again")
    try:
        return load(config_class, folder / "config.yaml")
    except ConfigError as error:
        told = str(error).removeprefix(f"{folder / 'config.yaml'}: ")
        raise ConfigError(f"{folder / 'config.yaml'}: {told}") from error


class Evaluate(Protocol):
    """The evaluate() of an eval.py: metrics of the finished run in `folder`; progress takes the fraction in [0, 1]."""

    def __call__(self, folder: Path, progress: Progress | None = None) -> Metrics: ...


def measurement(config_class: type[C]) -> Callable[[Callable[[C, Path, Progress], Metrics]], Evaluate]:
    """Make an `Evaluate` of (configuration of a run, its folder, progress) -> metrics, which it keeps in eval.json.

    A second call reads them there. It raises `ConfigError` if the run is not there or not finished, `CheckpointError`
    if a file of it is damaged.
    """

    def wrap(measure: Callable[[C, Path, Progress], Metrics]) -> Evaluate:
        def evaluate(folder: Path, progress: Progress | None = None) -> Metrics:
            config, kept = finished_run(folder, config_class), folder / "eval.json"
            if not kept.exists():
                write_json(kept, measure(config, folder, progress or (lambda fraction: None)))
            return read_json(kept)  # type: ignore[no-any-return]

        evaluate.__doc__ = measure.__doc__
        return evaluate

    return wrap


def train_command(
    file: str,
    config_class: type[C],
    train: Callable[[C, Path], Mapping[str, Any]],
    name: Callable[[C], str],
    summary: Callable[[Mapping[str, Any]], str],
    share: Callable[[C, Path], tuple[C, Path]] = lambda config, folder: (config, folder),
) -> None:
    """The command line of a train.py.

    Args:
        file: its `__file__`.
        config_class: has `run`, a `RunConfig`.
        train: (configuration, folder) -> final metrics.
        name: of the run's folder where run.folder is empty.
        summary: the final metrics in words.
        share: what this process does of (configuration, folder), and where, if each has a run of its own.
    """
    paper = Path(file).parent.name
    about = f"{paper}: train one run from one YAML file"
    config: Any = parse(config_class, prog=f"python {paper}/train.py", description=about, without=["study"])
    keep_freed_memory()
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    folder = Path(config.run.folder or f"runs/{paper}/{name(config)}")
    config, folder = share(config, folder)
    metrics = train(config, folder)
    if not int(os.environ.get("RANK", 0)):
        print(summary(metrics))
        print(f"finished in {folder}; next: {sys.executable} {paper}/eval.py --folder {folder}")


@dataclass(frozen=True)
class FolderArguments:
    """Which run to measure."""

    folder: str = ""
    """of a finished run of train.py"""

    def __post_init__(self) -> None:
        require(bool(self.folder), "folder", self.folder, "the folder of a run")


def eval_command(
    file: str, config_class: type[C], evaluate: Callable[[Path, Progress], Any], summary: Callable[[Any, C], str]
) -> None:
    """The command line of an eval.py.

    Args:
        file: its `__file__`.
        config_class: of the run.
        evaluate: (folder of a finished run, progress) -> metrics.
        summary: (metrics, configuration of the run) in words.
    """
    paper = Path(file).parent.name
    arguments = parse(FolderArguments, prog=f"python {paper}/eval.py", description=f"{paper}: measure a finished run")
    config = finished_run(Path(arguments.folder), config_class)
    with progress_bar("measuring") as progress:
        metrics = evaluate(Path(arguments.folder), progress)
    print(summary(metrics, config))


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """A bar with the time left; yields a function that takes the finished fraction in [0, 1]."""
    with tqdm(total=1.0, desc=what, bar_format="{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]") as bar:

        def show(fraction: float) -> None:
            bar.update(fraction - bar.n)

        yield show
