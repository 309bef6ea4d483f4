"""Compress one network: python uvc_vit/train.py --config uvc_vit/configs/demo.yaml --model.weights RUN/model.pt

Stage 1 finds what goes (method uvc) or chooses it at once (the baselines); the network is made physically smaller;
stage 2 trains what is left. Ends in model.pt (weights of the small network), before.pt (the same before stage 2) and
plan.json. Arm dense is stage 2 alone. Data-parallel: torchrun --nproc_per_node=N uvc_vit/train.py --config ...
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from common import distributed
from common.augment import mix, roll, soft_labels
from common.config import ConfigError, command
from common.data import ImageSet, Splits, batches, load, pixels, steps_per_epoch
from common.experiment import accuracy, load_weights, train_command
from common.runs import (
    NonFiniteError,
    Run,
    generator,
    load_checkpoint,
    read_json,
    save_checkpoint,
    seed_everything,
    write_atomically,
)
from common.vit import build_vit
from uvc_vit.adapter import ViTAdapter
from uvc_vit.controller import UVCController
from uvc_vit.distill import Teacher, distilled_loss
from uvc_vit.group_norms import group_norms
from uvc_vit.one_shot import first_blocks, gradient_scores, random_scores, uniform_plan
from uvc_vit.plan import Plan
from uvc_vit.schedule import warmup_cosine
from uvc_vit.settings import Config
from uvc_vit.slim import slim
from uvc_vit.solve import Relative


def train(config: Config, folder: Path, progress: Callable[[float], None] | None = None) -> dict[str, Any]:
    """Compress in `folder`, from where the run stands; returns and leaves in done.json the final training metrics.

    Args:
        config: of the run.
        folder: the run's.
        progress: called with the finished fraction instead of drawing a progress bar.

    Raises:
        ConfigError: where the budget cannot be met or the network is not supported.
    """
    with distributed.process_group() as device:
        splits = load(config.data)
        per_epoch = steps_per_epoch(splits.train, config.train.batch_size)
        seed_everything(config.seed)
        model = network(config, splits.train).to(device)
        search = config.search.epochs * per_epoch if config.arm == "uvc" else 0
        tuning = config.train.epochs if config.arm in ("dense", "uvc") else config.train.epochs + config.search.epochs
        total = search + tuning * per_epoch
        every = config.run.checkpoint_every
        run = Run(folder, config, total_steps=total, checkpoint_every=every, progress=progress)
        if run.finished:
            return read_json(folder / "done.json")
        with run:
            return _fit(config, run, splits, model, search, total)


def _fit(config: Config, run: Run, splits: Splits, model: nn.Module, search: int, total: int) -> dict[str, Any]:
    classes = splits.train.classes
    teacher = Teacher(model, classes) if config.kd.active else None
    if teacher is not None and hasattr(teacher.model, "set_distilled_training"):
        teacher.model.set_distilled_training(False)
    loss = partial(_loss, config, teacher, classes)
    saved = run.restore()

    if saved is not None and saved["plan"]:
        plan = Plan.from_json(saved["plan"])
    elif config.arm == "uvc":
        plan, saved = _search(config, run, splits, model, loss, search, saved), None
    else:
        plan = choose(config, model, splits.train)
    small = slim(model, plan, config.layout)
    if saved is None and run.writes:
        write_atomically(run.folder / "plan.json", (plan.to_json() + "\n").encode())
        save_checkpoint(run.folder / "before.pt", {"model": small.state_dict()})

    _tune(config, run, splits, small, loss, search, total, plan, saved)
    metrics: dict[str, Any] = {"parameters": sum(p.numel() for p in small.parameters()), "plan": plan.sha256()}
    metrics["blocks"] = sum(plan.keep_block)
    if len(splits.val):
        metrics["val_accuracy"] = accuracy(small, splits.val, config.model.normalize, config.eval.batch_size)
    if run.writes:
        save_checkpoint(run.folder / "model.pt", {"model": small.state_dict()})
    run.finish(metrics)
    return metrics


def _search(
    config: Config,
    run: Run,
    splits: Splits,
    model: nn.Module,
    loss: Callable[..., Tensor],
    steps: int,
    saved: Mapping[str, Any] | None,
) -> Plan:
    """Stage 1: weights, amounts, multipliers and gates move together."""
    options, per_epoch = config.train, steps_per_epoch(splits.train, config.train.batch_size)
    method = controller(config, model, splits.train, steps)
    method.attach()
    gates, released = method.parameters(), config.method.mode == "released"
    groups = param_groups_weight_decay(model, options.weight_decay)
    if released:  # the authors' weights' optimiser moves the gates too
        groups = [*groups, {"params": gates, "weight_decay": options.weight_decay}]
    optimizer = torch.optim.AdamW(groups, lr=config.search.lr)
    position = 0
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        method.load_state_dict(saved["method"])
        position = saved["step"]

    def snapshot() -> dict[str, Any]:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "method": method.state_dict()}
        return {**state, "plan": "", "step": position}

    stream = _stream(config, splits.train, position, next(model.parameters()).device)
    for step in run.steps(position, steps, snapshot):
        images, labels = next(stream)
        method.gates.generator = generator(config.seed, 3, step)
        model.train()
        optimizer.zero_grad(set_to_none=True)
        method.gates.zero_grad(set_to_none=True)
        value = loss(model, images, labels, step)
        run.require_finite(step, loss=value.item())
        value.backward()
        distributed.synchronize(model)
        distributed.average_([gate.grad for gate in gates if gate.grad is not None])
        if options.clip:
            nn.utils.clip_grad_norm_([*model.parameters(), *(gates if released else [])], options.clip)
        _set_lr(optimizer, config.search.lr * warmup_cosine(step, config.search.warmup_steps, steps))
        optimizer.step()
        advanced = config.search.lr * warmup_cosine(step + 1, config.search.warmup_steps, steps)
        try:
            info = method.step(advanced, generator(config.seed, 4, step))
        except FloatingPointError as error:
            raise NonFiniteError(f"{error}; the last good checkpoint is in {run.folder}") from error
        position = step + 1
        run.log(position, "search", R=info.R, z=info.z, target=info.target)
        if position % per_epoch == 0:
            run.log(position, "train", epoch=position // per_epoch, loss=distributed.mean(value.item()))
    method.detach()
    return method.as_is() if released else method.finalise()


def network(config: Config, data: ImageSet) -> nn.Module:
    """The network to compress with its starting weights. Raises ConfigError or CheckpointError."""
    net = build(config, data)
    if config.model.weights:
        path = Path(config.model.weights)
        load_weights(net, load_checkpoint(path), path)
    return net


def build(config: Config, data: ImageSet) -> nn.Module:
    """The network for images like those of `data`; one with a distillation token gives both outputs in training."""
    net: Any = build_vit(config.model, data)
    if hasattr(net, "set_distilled_training"):
        net.set_distilled_training(True)
    return net


def _tune(
    config: Config,
    run: Run,
    splits: Splits,
    model: nn.Module,
    loss: Callable[..., Tensor],
    first: int,
    total: int,
    plan: Plan,
    saved: Mapping[str, Any] | None,
) -> None:
    """Stage 2: the steps [first, total) of the run train what is left."""
    options, per_epoch = config.train, steps_per_epoch(splits.train, config.train.batch_size)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, options.weight_decay), lr=options.lr)
    position = first
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        position = saved["step"]
    schedule = replace(options, epochs=(total - first) // per_epoch)

    def snapshot() -> dict[str, Any]:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        return {**state, "plan": plan.to_json(), "step": position}

    forward = torch.compile(model) if options.compile else model
    stream = _stream(config, splits.train, position, next(model.parameters()).device)
    for step in run.steps(position, total, snapshot):
        images, labels = next(stream)
        model.train()
        optimizer.zero_grad(set_to_none=True)
        value = loss(forward, images, labels, step)
        run.require_finite(step, loss=value.item())
        value.backward()
        distributed.synchronize(model)
        if options.clip:
            nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        _set_lr(optimizer, schedule.learning_rate(step - first, per_epoch))
        optimizer.step()
        position = step + 1
        if position % per_epoch == 0:
            run.log(position, "train", epoch=position // per_epoch, loss=distributed.mean(value.item()))


def _loss(
    config: Config, teacher: Teacher | None, classes: int, forward: Any, images: Tensor, labels: Tensor, step: int
) -> Tensor:
    """Of one batch of raw images, augmented by what the run's seed and the step draw."""
    options, device = config.train, labels.device
    draws = generator(config.seed, 1, step)
    inputs = config.model.normalize(pixels(roll(images, options.roll, draws)))
    targets = soft_labels(labels, classes, options.smoothing)
    inputs, targets = mix(inputs, targets, options.mixup, options.cutmix, draws)
    torch.manual_seed(generator(config.seed, 2, step, distributed.rank()).initial_seed())  # dropout, drop-path
    with torch.autocast(device.type, torch.bfloat16, enabled=options.amp):
        outputs = forward(inputs)

        def taught() -> Tensor:
            assert teacher is not None
            return teacher(inputs)

        return distilled_loss(outputs, targets, taught, config.kd)


def _stream(config: Config, data: ImageSet, step: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Raw images and labels of this rank from step `step` of the run on."""
    for images, labels in batches(data, config.train.batch_size, config.data, seed=config.seed, step=step):
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def controller(config: Config, model: nn.Module, data: ImageSet, steps: int) -> UVCController:
    """The method for `steps` steps. Raises ConfigError where network or budget do not fit."""
    _, size = config.model.image_shape(data)
    try:
        return UVCController(ViTAdapter(model), replace(config.method, stage1_steps=steps), (size, size))
    except (NotImplementedError, ValueError) as error:
        raise ConfigError(f"method: {error}") from error


def choose(config: Config, model: nn.Module, data: ImageSet) -> Plan:
    """The plan of a method that needs no stage 1. Raises ConfigError where network or budget do not fit."""
    there = controller(config, model, data, 1)
    sizes, costs, budget = there.adapter.dims, there.final_costs, config.method.budget
    norms = group_norms(there.adapter)
    relative = Relative.of(norms)(norms)
    try:
        if config.arm == "dense":
            return Plan.full(sizes)
        if config.arm == "drop-last":
            return first_blocks(costs, sizes, budget)
        if config.arm == "gradient":
            scores = gradient_scores(there.adapter, _scored(config, model, data), F.cross_entropy, norms)
            return uniform_plan(scores, costs, sizes, budget, "heads")
        noise = random_scores(norms, generator(config.seed, 5))
        return uniform_plan(relative if config.arm == "magnitude" else noise, costs, sizes, budget, "dims")
    except ValueError as error:
        raise ConfigError(f"method: {error}") from error


def _scored(config: Config, model: nn.Module, data: ImageSet) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches that gradients are scored on, as the network sees them."""
    model.eval()
    stream = _stream(config, data, 0, next(model.parameters()).device)
    for images, labels in islice(stream, config.search.accumulate):
        yield config.model.normalize(pixels(images)), labels


def main() -> None:
    """The command line."""

    def summary(metrics: Mapping[str, Any]) -> str:
        return f"{metrics['parameters']:,} parameters in {metrics['blocks']} blocks"

    train_command(__file__, Config, train, lambda config: f"{config.arm}-seed{config.seed}", summary)


if __name__ == "__main__":
    command(main)
