"""Train one network: python diverse_vit/train.py --config diverse_vit/configs/demo.yaml

The network, the regularizer around it, AdamW, one loop; the weights end in model.pt.
Data-parallel: torchrun --nproc_per_node=N diverse_vit/train.py --config ...
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from common import distributed
from common.augment import erase, roll
from common.config import ConfigError, command, require
from common.data import ImageSet, Splits, batches, load, pixels, steps_per_epoch
from common.experiment import accuracy, train_command
from common.runs import NonFiniteError, Run, generator, read_json, save_checkpoint, seed_everything
from common.vit import build_vit, follow
from diverse_vit.patch_mixup import PatchMixup
from diverse_vit.regularizer import DiverseRegularizer
from diverse_vit.settings import Config

MOST_SKIPPED = 10  # steps in a row without a finite loss


def train(config: Config, folder: Path, progress: Callable[[float], None] | None = None) -> dict[str, Any]:
    """Train in `folder`, from where the run stands; returns and leaves in done.json the final training metrics.

    Args:
        config: of the run.
        folder: the run's.
        progress: called with the finished fraction instead of drawing a progress bar.
    """
    with distributed.process_group() as device:
        splits = load(config.data)
        per_epoch = steps_per_epoch(splits.train, config.train.batch_size)
        total = config.train.epochs * per_epoch
        seed_everything(config.seed)
        model = build_vit(config.model, splits.train).to(device)
        keys = set(model.state_dict())
        average = copy.deepcopy(model).requires_grad_(False) if config.train.ema else None
        regularizer = regularized(model, config)
        check_mixing(config, model, splits.train)
        run = Run(folder, config, total_steps=total, checkpoint_every=config.run.checkpoint_every, progress=progress)
        if run.finished:
            return read_json(folder / "done.json")
        with run:
            return _fit(config, run, splits, model, average, regularizer, per_epoch, keys)


def _fit(
    config: Config,
    run: Run,
    splits: Splits,
    model: nn.Module,
    average: nn.Module | None,
    regularizer: DiverseRegularizer,
    per_epoch: int,
    keys: set[str],
) -> dict[str, Any]:
    options, device = config.train, next(model.parameters()).device
    undecayed = list(getattr(model, "no_weight_decay", set)())
    groups = param_groups_weight_decay(model, options.weight_decay, no_weight_decay_list=undecayed)
    optimizer = torch.optim.AdamW(groups, lr=options.lr)
    start = skipped = in_a_row = 0
    if saved := run.restore():
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if average is not None:
            average.load_state_dict(saved["average"])
        start, skipped, in_a_row = saved["step"], saved["skipped"], saved["in_a_row"]
    position, kept = start, f"the last good checkpoint is in {run.folder}"

    def snapshot() -> dict[str, Any]:
        state: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"step": position, "skipped": skipped, "in_a_row": in_a_row}
        return state if average is None else {**state, "average": average.state_dict()}

    stream = batches(splits.train, options.batch_size, config.data, seed=config.seed, step=start)
    for step in run.steps(start, options.epochs * per_epoch, snapshot):
        images, labels = (tensor.to(device, non_blocking=True) for tensor in next(stream))
        draws = generator(config.seed, 1, step)
        images = config.model.normalize(pixels(roll(images, options.roll, draws)))
        images = erase(images, options.erasing, draws)
        mixed = mixer(config, step)(images, labels) if options.mixup or options.cutmix else None

        model.train()
        torch.manual_seed(generator(config.seed, 2, step, distributed.rank()).initial_seed())  # drop-path
        regularizer.step = step
        with torch.autocast(device.type, torch.bfloat16, enabled=options.amp):
            output = regularizer(images if mixed is None else mixed.x, labels if mixed is None else mixed)
        finite = not distributed.any_rank(not math.isfinite(output.loss.item()))
        position, in_a_row = step + 1, 0 if finite else in_a_row + 1
        if finite:
            optimizer.zero_grad(set_to_none=True)
            output.loss.backward()
            distributed.synchronize(model)
            if options.clip:
                norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip).item()
                if not math.isfinite(norm):  # the same on every rank
                    raise NonFiniteError(f"gradient norm is {norm} at step {step}; {kept}")
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate(step - skipped, per_epoch)
            optimizer.step()
            if average is not None:
                follow(average, model, options.ema)
        else:  # as with a scaler of gradients: weights, average and schedule stay as they are
            skipped += 1
            run.log(position, "skipped", skipped=skipped)
            if in_a_row == MOST_SKIPPED:
                raise NonFiniteError(f"loss is not finite at step {step}, {MOST_SKIPPED} steps in a row; {kept}")

        if position % per_epoch == 0:
            if finite:
                values = {name: distributed.mean(term.item()) for name, term in output.terms.items()}
                hits = (output.logits.argmax(1) == labels).float().mean().item()
                values |= {"loss": distributed.mean(output.loss.item()), "accuracy": 100 * distributed.mean(hits)}
                run.log(position, "train", epoch=position // per_epoch, **values)
            if len(splits.val):
                run.log(position, "val", val_accuracy=accuracy(model, splits.val, config.model.normalize))
    content = {"model": model.state_dict()}
    content.update({} if average is None else {"average": average.state_dict()})
    if bad := [f"{name} {key}" for name, state in content.items() for key in not_finite(state)]:
        raise NonFiniteError(f"{bad[0]} is not finite after step {position - 1}; {kept}")
    regularizer.detach()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    metrics: dict[str, Any] = {"parameters": parameters, "skipped": skipped, "hooks_left": hook_count(model)}
    metrics["keys_changed"] = len(keys ^ set(model.state_dict()))
    if len(splits.val):
        metrics["val_accuracy"] = accuracy(model, splits.val, config.model.normalize)
    if run.writes:
        save_checkpoint(run.folder / "model.pt", content)
    run.finish(metrics)
    return metrics


def regularized(model: nn.Module, config: Config) -> DiverseRegularizer:
    """The objective around the network, compiled if train.compile says so. Raises `ConfigError` if it does not fit."""
    inner = torch.compile(model) if config.train.compile else model
    try:
        return DiverseRegularizer(
            inner,  # type: ignore[arg-type]
            **asdict(config.objective),
            seed=config.seed,
            smoothing=config.train.smoothing,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"objective does not fit model.name {config.model.name}: {error}") from error


def check_mixing(config: Config, model: nn.Module, data: ImageSet) -> None:
    """Raise `ConfigError` where images are to be mixed, but patches or the part of the batch of a rank do not fit."""
    if not (config.train.mixup or config.train.cutmix):
        return
    patch, (_, size) = config.model.patch, config.model.image_shape(data)
    own = model.feature_info[-1]["reduction"]  # type: ignore[index,union-attr]
    require(patch == own, "model.patch", patch, f"{own}, that of model.name {config.model.name}, with mixup or cutmix")
    require(size % patch == 0, "model.patch", patch, f"a divisor of the images' side {size} with mixup or cutmix")
    ranks, batch = distributed.world_size(), config.train.batch_size
    require(batch % (2 * ranks) == 0, "train.batch_size", batch, f"even on each of {ranks} ranks with mixup or cutmix")


def mixer(config: Config, step: int) -> PatchMixup:
    """Mixup of one step; each rank draws its own and mixes its own images, as released."""
    draws = np.random.SeedSequence((config.seed, 3, step, distributed.rank())).generate_state(8)
    options = config.train
    return PatchMixup(
        options.mixup, options.cutmix, patch_size=config.model.patch, generator=np.random.RandomState(draws)
    )


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or Inf."""
    return [name for name, value in state.items() if not value.isfinite().all()]


def hook_count(model: nn.Module) -> int:
    """How many forward hooks the network carries."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def main() -> None:
    """The command line."""

    def name(config: Config) -> str:
        terms = [key for key, value in asdict(config.objective).items() if value and key != "attn_layers"]
        return f"{'-'.join(terms) or 'plain'}-seed{config.seed}"

    def summary(metrics: Mapping[str, Any]) -> str:
        return (
            f"{metrics['parameters']:,} parameters, {metrics['skipped']} steps skipped for a loss that was not finite"
        )

    train_command(__file__, Config, train, name, summary)


if __name__ == "__main__":
    command(main)
