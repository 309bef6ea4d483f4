"""Train one network: python vit_antioversmooth/train.py --config vit_antioversmooth/configs/demo.yaml

The network, its scales, AdamW with the scales in a group of their own, one loop; the weights end in model.pt.
Data-parallel: torchrun --nproc_per_node=N vit_antioversmooth/train.py --config ...
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn

from common import distributed
from common.augment import erase, mix, roll, soft_labels
from common.config import ConfigError, command
from common.data import ImageSet, Splits, batches, load, pixels, steps_per_epoch
from common.experiment import accuracy, train_command
from common.runs import CheckpointError, Run, generator, load_checkpoint, read_json, save_checkpoint, seed_everything
from common.vit import build_vit, follow
from vit_antioversmooth.attentions import find_attentions
from vit_antioversmooth.attnscale import apply_attnscale
from vit_antioversmooth.featscale import apply_featscale
from vit_antioversmooth.models import NoSkipBlock
from vit_antioversmooth.released import load_released
from vit_antioversmooth.scales import param_groups, scale_parameters
from vit_antioversmooth.settings import Config


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
        model = network(config, splits.train).to(device)
        run = Run(folder, config, total_steps=total, checkpoint_every=config.run.checkpoint_every, progress=progress)
        if run.finished:
            return read_json(folder / "done.json")
        with run:
            return _fit(config, run, splits, model, per_epoch)


def _fit(config: Config, run: Run, splits: Splits, model: nn.Module, per_epoch: int) -> dict[str, Any]:
    options, device = config.train, next(model.parameters()).device
    optimizer = torch.optim.AdamW(param_groups(model, options.lr, options.weight_decay, config.scales.lr_mult))
    average = copy.deepcopy(model).requires_grad_(False) if options.ema else None
    start, total = 0, options.epochs * per_epoch
    if saved := run.restore():
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if average is not None:
            average.load_state_dict(saved["average"])
        start = saved["step"]
    forward = torch.compile(model) if options.compile else model
    normalize = config.model.normalize
    position = start

    def snapshot() -> dict[str, Any]:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": position}
        return state if average is None else {**state, "average": average.state_dict()}

    stream = batches(splits.train, options.batch_size, config.data, seed=config.seed, step=start)
    for step in run.steps(start, total, snapshot):
        images, labels = (tensor.to(device, non_blocking=True) for tensor in next(stream))
        draws = generator(config.seed, 1, step)
        images = erase(normalize(pixels(roll(images, options.roll, draws))), options.erasing, draws)
        targets = soft_labels(labels, splits.train.classes, options.smoothing)
        images, targets = mix(images, targets, options.mixup, options.cutmix, draws)

        model.train()
        torch.manual_seed(generator(config.seed, 2, step, distributed.rank()).initial_seed())  # dropout, drop-path
        with torch.autocast(device.type, torch.bfloat16, enabled=options.amp):
            logits = forward(images)
        loss = F.cross_entropy(logits.float(), targets)
        run.require_finite(step, loss=loss.item())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        distributed.synchronize(model)
        if options.clip:
            nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * options.learning_rate(step, per_epoch) / options.lr
        optimizer.step()
        if average is not None:
            follow(average, model, options.ema)

        position = step + 1
        if position % per_epoch == 0:
            right = 100 * distributed.mean((logits.argmax(1) == labels).float().mean().item())
            run.log(position, "train", epoch=position // per_epoch, loss=distributed.mean(loss.item()), accuracy=right)
            if len(splits.val):
                run.log(position, "val", val_accuracy=_val_accuracy(config, model, splits))
    metrics: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "scales": scale_count(model)}
    if len(splits.val):
        metrics["val_accuracy"] = _val_accuracy(config, model, splits)
    if run.writes:
        content = {"model": model.state_dict()}
        content.update({} if average is None else {"average": average.state_dict()})
        save_checkpoint(run.folder / "model.pt", content)
    run.finish(metrics)
    return metrics


def network(config: Config, data: ImageSet) -> nn.Module:
    """The configured network with its scales for images like those of `data`, its weights drawn or read now.

    Weights are drawn before the scales are applied, and the scales draw nothing: one seed gives all methods the same.

    Raises:
        ConfigError: where sizes do not fit, or an attention that neither scales nor measurements know;
        CheckpointError: where model.weights does not fit.
    """
    model, scales = config.model, config.scales
    net = build_vit(model, data, Block if model.skip else NoSkipBlock, model.drop)
    try:
        find_attentions(net)
        if scales.method in ("attnscale", "both"):
            sharing: dict[str, Any] = {"share": scales.share, "blind": scales.blind}
            apply_attnscale(net, init=scales.init, include_prefix=scales.include_prefix, **sharing)
        if scales.method in ("featscale", "both"):
            form: dict[str, Any] = {"per_channel": scales.per_channel, "tied": scales.blind}
            apply_featscale(net, include_prefix=scales.include_prefix, **form)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"scales.method {scales.method} does not fit model.name {model.name}: {error}") from error
    if model.weights:
        count = scale_count(net)
        _read_weights(net, Path(model.weights), model.featscale_count)
        if scale_count(net) != count:
            raise CheckpointError(f"{model.weights}: holds scales that scales.method {scales.method} has not")
    for parameter in scale_parameters(net):
        parameter.requires_grad_(scales.learn)
    return net


def scale_count(model: nn.Module) -> int:
    """Number of scale parameters."""
    return sum(parameter.numel() for parameter in scale_parameters(model))


def _val_accuracy(config: Config, model: nn.Module, splits: Splits) -> float:
    return accuracy(model, splits.val, config.model.normalize, config.eval.batch_size)


def _read_weights(net: nn.Module, path: Path, featscale_count: int) -> None:
    """Load model.weights into the network; nothing in the file is executed. Raises `CheckpointError`."""
    if not path.exists():
        raise CheckpointError(f"model.weights must be an existing file, got {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(path)
        elif path.name == "model.pt":
            weights = load_checkpoint(path)["model"]
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            weights = weights.get("model", weights)
        load_released(net, weights, featscale_count)
    except CheckpointError:
        raise
    except Exception as error:  # of torch, pickle, zip and safetensors each another kind
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: does not hold weights of this network ({reason})") from error


def main() -> None:
    """The command line."""

    def summary(metrics: Mapping[str, Any]) -> str:
        return f"{metrics['parameters']:,} parameters, {metrics['scales']:,} of them scales"

    train_command(__file__, Config, train, lambda config: f"{config.scales.method}-seed{config.seed}", summary)


if __name__ == "__main__":
    command(main)
