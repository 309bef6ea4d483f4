"""Compress one network: python uvc_vit/train.py --config uvc_vit/configs/demo.yaml --model.weights RUN/model.pt

Stage 1 finds what goes (arm uvc); the other arms choose at once and have its epochs in stage 2 as well. The network is
made physically smaller; stage 2 trains what is left. Ends in model.pt (weights of the small network), before.pt (the
same before stage 2) and plan.json. Data-parallel: torchrun --nproc_per_node=N uvc_vit/train.py --config ...
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import distributed
from common.augment import mix, roll, soft_labels
from common.config import command
from common.data import Splits, load, pixels, steps_per_epoch
from common.experiment import accuracy, train_command
from common.masks import Masks
from common.runs import NonFiniteError, Run, generator, read_json, save_checkpoint, seed_everything, write_atomically
from uvc_vit.choose import choose, controller, network, pruning, stream
from uvc_vit.decay import decay_groups
from uvc_vit.distill import Teacher, distilled_loss
from uvc_vit.plan import Plan
from uvc_vit.replicas import broadcast_, broadcast_text
from uvc_vit.schedule import warmup_cosine
from uvc_vit.settings import Config
from uvc_vit.slim import slim
from uvc_vit.unstructured import Pruning


def train(
    config: Config,
    folder: Path,
    progress: Callable[[float], None] | None = None,
    logits: dict[int, Tensor] | None = None,
) -> dict[str, Any]:
    """Compress in `folder`, from where the run stands; returns and leaves in done.json the final training metrics.

    Args:
        config: of the run.
        folder: the run's.
        progress: called with the finished fraction instead of drawing a progress bar.
        logits: the teacher's by step, found and left here by runs with the same teacher, images and seed.

    Raises:
        ConfigError: where the budget cannot be met or the network is not supported.
    """
    with distributed.process_group() as device:
        splits = load(config.data)
        per_epoch = steps_per_epoch(splits.train, config.train.batch_size)
        seed_everything(config.seed)
        model = network(config, splits.train).to(device)
        search = config.search.epochs * per_epoch if config.arm == "uvc" else 0
        total = (config.search.epochs + config.train.epochs) * per_epoch
        every = config.run.checkpoint_every
        run = Run(folder, config, total_steps=total, checkpoint_every=every, progress=progress)
        if run.finished:
            return read_json(folder / "done.json")
        with run:
            return _fit(config, run, splits, model, search, total, logits)


def _fit(
    config: Config,
    run: Run,
    splits: Splits,
    model: nn.Module,
    search: int,
    total: int,
    logits: dict[int, Tensor] | None,
) -> dict[str, Any]:
    classes = splits.train.classes
    teacher = Teacher(model, classes, logits) if config.kd.active else None
    loss = partial(_loss, config, teacher, classes)
    saved = run.restore()
    if saved is not None and saved["plan"]:
        plan = Plan.from_json(saved["plan"])
    elif config.arm == "uvc":
        plan, saved = _search(config, run, splits, model, loss, search, saved), None
    else:
        plan = choose(config, model, splits.train)
    plan = Plan.from_json(broadcast_text(plan.to_json()))
    small = slim(model, plan, config.layout)
    sparse = pruning(config, small, splits.train, total)
    if sparse is not None:
        sparse.masks.apply_(small)
    if saved is None and run.writes:
        write_atomically(run.folder / "plan.json", (plan.to_json() + "\n").encode())
        save_checkpoint(run.folder / "before.pt", {"model": small.state_dict()})

    _tune(config, run, splits, small, loss, search, total, plan, sparse, saved)
    parameters = sum(p.numel() for p in small.parameters())
    metrics: dict[str, Any] = {"parameters": parameters, "plan": plan.sha256(), "blocks": sum(plan.keep_block)}
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
    groups = decay_groups(model, options.weight_decay)
    if released:  # the authors' weights' optimiser moves the gates too
        groups = [*groups, {"params": gates, "weight_decay": options.weight_decay}]
    optimizer = torch.optim.AdamW(groups, lr=config.search.lr, fused=True)
    position = 0
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        method.load_state_dict(saved["method"])
        position = saved["step"]

    def snapshot() -> dict[str, Any]:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "method": method.state_dict()}
        return {**state, "plan": "", "step": position}

    forward = torch.compile(model) if options.compile else model
    batches = stream(config, splits.train, position, next(model.parameters()).device)
    for step in run.steps(position, steps, snapshot):
        images, labels = next(batches)
        method.gates.generator = generator(config.seed, 3, step)
        model.train()
        optimizer.zero_grad(set_to_none=True)
        value = loss(forward, images, labels, step)
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
            raise NonFiniteError(f"{error}; {run.kept}") from error
        position = step + 1
        run.log(position, "search", R=info.R, z=info.z, target=info.target)
        if position % per_epoch == 0:
            broadcast_([*vars(method.variables).values(), method.memory.total, method.memory.momentum])
            run.log(position, "train", epoch=position // per_epoch, loss=distributed.mean(value.item()))
    method.detach()
    return method.as_is() if released else method.finalise(even=config.layout == "padded")


def _tune(
    config: Config,
    run: Run,
    splits: Splits,
    model: nn.Module,
    loss: Callable[..., Tensor],
    first: int,
    total: int,
    plan: Plan,
    sparse: Pruning | None,
    saved: Mapping[str, Any] | None,
) -> None:
    """Stage 2: the steps [first, total) of the run train what is left."""
    options, per_epoch = config.train, steps_per_epoch(splits.train, config.train.batch_size)
    groups = decay_groups(model, options.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=options.lr, fused=True)
    position = first
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        position = saved["step"]
        if sparse is not None:
            sparse.masks = Masks(saved["masks"])
    schedule = replace(options, epochs=(total - first) // per_epoch)
    if sparse is not None:
        sparse.attach(optimizer)

    def snapshot() -> dict[str, Any]:
        masks = {} if sparse is None else sparse.masks.state_dict()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "masks": masks}
        return {**state, "plan": plan.to_json(), "step": position}

    forward = torch.compile(model) if options.compile else model
    batches = stream(config, splits.train, position, next(model.parameters()).device)
    for step in run.steps(position, total, snapshot):
        images, labels = next(batches)
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
        if sparse is not None:
            sparse.after(position, optimizer)
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
            return teacher(inputs, step)

        return distilled_loss(outputs, targets, taught, config.kd)


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def main() -> None:
    """The command line."""

    def summary(metrics: Mapping[str, Any]) -> str:
        return f"{metrics['parameters']:,} parameters in {metrics['blocks']} blocks"

    train_command(__file__, Config, train, lambda config: f"{config.arm}-seed{config.seed}", summary)


if __name__ == "__main__":
    command(main)
