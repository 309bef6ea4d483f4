"""One step of SGD on perturbed images, and what it needs: the network and the stream of batches (spec c)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from common import distributed
from common.config import ConfigError
from common.data import DataConfig, ImageSet, batches, pixels
from common.runs import Run, generator
from double_win_lth.grouped import TicketBatch
from double_win_lth.models import build_model
from double_win_lth.pgd import mean_loss, uniform_start
from double_win_lth.regimes import Regime
from double_win_lth.settings import Config
from double_win_lth.views import random_resized_crop

STARTS, CROPS = 1, 2  # what a generator is for
Batch = tuple[Tensor, Tensor, Tensor | None]


def network(config: Config, data: ImageSet, device: torch.device) -> nn.Module:
    """The configured network for images like those of `data`, its weights drawn now. Raises `ConfigError`."""
    channels, _ = config.model.image_shape(data)
    try:
        model = build_model(
            config.model.name, channels, data.classes, config.model.mean, config.model.std, config.model.width
        )
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error
    return model.to(
        device, memory_format=torch.channels_last if config.model.channels_last else torch.contiguous_format
    )


def adversarial_batches(
    data: ImageSet, batch_size: int, config: DataConfig, regime: Regime, *, size: int, seed: int, step: int
) -> Iterator[Batch]:
    """Without end from `step` on: this rank's images in [0, 1], labels, and where the attack starts (None: at x)."""
    stream = batches(data, batch_size, config, seed=seed, step=step)
    while True:
        raw, labels = next(stream)
        x = random_resized_crop(pixels(raw), size, generator(seed, CROPS, step))
        start = None
        if regime.steps and regime.random_start:
            shape = (batch_size, *x.shape[1:])
            start = distributed.shard(uniform_start(shape, regime.eps, generator(seed, STARTS, step)))
        yield x, labels, start
        step += 1


def sgd_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    regime: Regime,
    lr: float,
    *,
    amp: bool = False,
    attack_bn: str = "train",
) -> tuple[float, float]:
    """Attack the network as it is, then one step on the attacked images.

    Args:
        model: a network, or a `TicketBatch`, each ticket of which gets its own adversarial images from one start.
        optimizer: stepped with learning rate `lr`; with `Masks.attach` masked weights stay zero.
        batch: images (N, channels, height, width) in [0, 1], labels (N,), start of the attack or None.
        regime: the perturbation.
        amp: bfloat16 autocast of the network alone.
        attack_bn: "train": every step of the attack moves the batch-norm statistics, "eval": none does.

    Returns:
        Loss (of a `TicketBatch` the sum over tickets) and accuracy on the attacked images, percent.
    """
    device = next(model.parameters()).device
    x, y, start = (None if tensor is None else tensor.to(device, non_blocking=True) for tensor in batch)
    assert x is not None and y is not None
    if regime.steps:
        x, start = each_ticket(model, x), None if start is None else each_ticket(model, start)
    model.train(attack_bn == "train")
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        x = regime.perturb(model, x, y, start=start)
        model.train()
        logits = model(x).float()
    loss = mean_loss(logits, y)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    distributed.synchronize(model)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return loss.item(), 100 * (logits.argmax(-1) == y).float().mean().item()


def checked_step(
    run: Run,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    regime: Regime,
    lr: float,
    **options: bool | str,
) -> tuple[float, float]:
    """`sgd_step`, which ends the run with `NonFiniteError` where the loss, or that of the attack, is not finite."""
    with finite(run, step):
        loss, accuracy = sgd_step(model, optimizer, batch, regime, lr, **options)  # type: ignore[arg-type]
    run.require_finite(step, loss=loss)
    return loss, accuracy


def require_finite_weights(run: Run, step: int, model: nn.Module) -> None:
    """End the run with `NonFiniteError`, naming the first tensor, where the last step left NaN or Inf in `model`."""
    run.require_finite(step, **{name: value.abs().max().item() for name, value in model.state_dict().items()})


@contextmanager
def finite(run: Run, step: int) -> Iterator[None]:
    """End the run with `NonFiniteError` at `step` where an attack or accuracy inside meets NaN or Inf."""
    try:
        yield
    except FloatingPointError:
        run.require_finite(step, loss=math.nan)


def each_ticket(model: nn.Module, x: Tensor) -> Tensor:
    """x (N, ...) as (N, T, ...) for a `TicketBatch` of T tickets, x itself for one network."""
    return x.unsqueeze(1).expand(-1, model.tickets, -1, -1, -1) if isinstance(model, TicketBatch) else x
