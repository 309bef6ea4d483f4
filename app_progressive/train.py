"""Train along a stream: python app_progressive/train.py --config app_progressive/configs/demo.yaml

For each megabatch: score and mask, train, load the best weights back, test. One step of the run is one epoch of one
state. Data-parallel: torchrun --nproc_per_node=N app_progressive/train.py --config ...
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from app_progressive.configured import FRESH, another, check_batches, make_pruner, megabatches, network
from app_progressive.cost import forward_macs, layer_macs
from app_progressive.images import epoch_batches, pool_and_test
from app_progressive.metrics import first_best, generalization_gap
from app_progressive.models import Normalized
from app_progressive.pruner import AnytimePruner
from app_progressive.settings import Config
from app_progressive.stream import MegabatchStream
from app_progressive.summary import summary
from app_progressive.warmstart import shrink_and_perturb_
from common import distributed
from common.config import ConfigError, command
from common.data import ImageSet
from common.experiment import accuracy, train_command
from common.runs import Run, generator, read_json, save_checkpoint, seed_everything

TRAIN, VALIDATE, SCORE = 1, 2, 3  # keys of the random draws


def train(config: Config, folder: Path, progress: Callable[[float], None] | None = None) -> dict[str, Any]:
    """Train in `folder`, from where the run stands; returns and leaves in done.json the metrics of the stream.

    Args:
        config: of the run.
        folder: the run's; its last weights end in model.pt.
        progress: called with the finished fraction instead of drawing a progress bar.
    """
    with distributed.process_group() as device:
        pool, test = pool_and_test(config)
        stream = megabatches(config, pool)
        seed_everything(config.seed)
        model = network(config, pool).to(device)
        pruner = make_pruner(config, model)
        check_batches(config, stream, model, torch.zeros(1, *pool.images.shape[1:], device=device))  # type: ignore[union-attr]
        total = config.stream.states * config.train.epochs
        run = Run(folder, config, total_steps=total, checkpoint_every=config.run.checkpoint_every, progress=progress)
        if run.finished:
            return read_json(folder / "done.json")  # type: ignore[no-any-return]
        with run:
            return _fit(config, run, pool, test, stream, model, pruner)


def _fit(
    config: Config,
    run: Run,
    pool: ImageSet,
    test: ImageSet,
    stream: MegabatchStream,
    model: Normalized,
    pruner: AnytimePruner | None,
) -> dict[str, Any]:
    options, device = config.train, next(model.parameters()).device
    if options.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    macs = layer_macs(model, torch.zeros(1, *pool.images.shape[1:], device=device))  # type: ignore[union-attr]
    pool = ImageSet(pool.images.to(device), pool.labels.to(device), pool.classes)  # type: ignore[union-attr]
    optimizer = SGD(model.parameters(), options.lr, options.momentum, weight_decay=options.weight_decay, fused=True)
    if pruner is not None:
        pruner.attach(optimizer)
    history: list[dict[str, Any]] = []  # a record a finished state
    now: dict[str, Any] = {}  # the state in progress: its density, accuracies by epoch, and best weights
    position = 0
    if saved := run.restore():
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if pruner is not None:
            pruner.load_state_dict(saved["pruner"])
        history, now, position = saved["history"], saved["now"], saved["position"]

    def snapshot() -> dict[str, Any]:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history, "now": now}
        return {**state, "position": position, **({} if pruner is None else {"pruner": pruner.state_dict()})}

    for step in run.steps(position, config.stream.states * options.epochs, snapshot):
        state, epoch = step // options.epochs + 1, step % options.epochs
        train_rows, val_rows = stream.state(state)
        if epoch == 0:
            now = {"train": [], "val": [], **_begin(config, pool, stream, model, pruner, optimizer, state)}
        rate = options.lr * 0.1 ** sum(epoch >= milestone for milestone in options.milestones)
        for group in optimizer.param_groups:
            group["lr"] = rate

        model.train()
        right, losses = torch.zeros((), device=device), torch.zeros((), device=device)
        for images, labels in _batches(config, pool, train_rows, (TRAIN, state, epoch)):
            with torch.autocast(device.type, torch.bfloat16, enabled=options.amp):
                logits = model(images).float()
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            distributed.synchronize(model)
            optimizer.step()
            right += (logits.detach().argmax(1) == labels).sum()
            losses += loss.detach() * len(labels)
        seen = len(train_rows) - len(train_rows) % distributed.world_size()
        ranks = distributed.world_size()
        run.require_finite(step, loss=losses.item())
        now["train"].append(100 * distributed.mean(right.item()) * ranks / seen)
        now["val"].append(_val_accuracy(config, model, pool, val_rows, (VALIDATE, state, epoch)))
        if first_best(now["val"]) == epoch:
            now["best"] = {"epoch": epoch, "model": copy.deepcopy(model.state_dict())}
            if pruner is not None:
                now["best"]["pruner"] = copy.deepcopy(pruner.state_dict())
        mean_loss = distributed.mean(losses.item()) * ranks / seen
        gap = generalization_gap(now["train"][-1], now["val"][-1])
        run.log(step + 1, "train", state=state, epoch=epoch + 1, lr=rate, loss=mean_loss, accuracy=now["train"][-1])
        run.log(step + 1, "val", state=state, epoch=epoch + 1, accuracy=now["val"][-1], gap=gap)

        if epoch == options.epochs - 1:
            history.append(_end(config, now, model, pruner, test, macs))
            history[-1] |= {"state": state, "train_images": len(train_rows)}
            run.log(step + 1, "test", state=state, accuracy=history[-1]["test_acc"], density=history[-1]["density"])
        position = step + 1
    metrics = summary(config, history, macs, len(test))
    if run.writes:
        final = model.state_dict() if pruner is None else pruner.export()
        save_checkpoint(run.folder / "model.pt", {"model": final})
    run.finish(metrics)
    return metrics


def _begin(
    config: Config,
    pool: ImageSet,
    stream: MegabatchStream,
    model: Normalized,
    pruner: AnytimePruner | None,
    optimizer: SGD,
    state: int,
) -> dict[str, Any]:
    """What comes before training on a megabatch: the weights to start from, then score and mask. Returns densities."""
    start = config.train.start if state > 1 else "continue"
    with _whole(pruner):
        if start == "scratch":
            model.load_state_dict(another(config, pool, model, state).state_dict())
        elif start == "shrink":
            shrink_and_perturb_(model, another(config, pool, model, state))
    if state > 1 and (config.train.reset_momentum or start in ("scratch", "rewind")):
        optimizer.state.clear()
    found: dict[str, Any] = {"density_target": 1.0, "density": 1.0, "per_layer": {}, "score_images": 0}
    if pruner is not None:
        found = _masked(config, pool, stream, pruner, state)
    if start == "rewind":
        seed_everything(config.seed)
        with _whole(pruner):
            model.load_state_dict(network(config, pool).to(next(model.parameters()).device).state_dict())
    return found


def _whole(pruner: AnytimePruner | None) -> AbstractContextManager[None]:
    """Within it all weights may be changed; see `AnytimePruner.whole`."""
    return nullcontext() if pruner is None else pruner.whole()


def _masked(
    config: Config, pool: ImageSet, stream: MegabatchStream, pruner: AnytimePruner, state: int
) -> dict[str, Any]:
    """Score and mask, or where one-shot pruning has done so before keep its mask. Returns densities."""
    if config.prune.method == "osp" and state > 1:
        densities = {"density": pruner.density(), "per_layer": pruner.per_layer()}
        return {"density_target": pruner.target(1)[1], **densities, "score_images": 0}
    rows = stream.score_idx(state, config.prune.q, config.prune.subset)
    batches = _whole_batches(config, pool, rows, (SCORE, state))
    draws = generator(config.seed, FRESH, state)
    try:
        found = pruner.step(batches, state, generator=draws, reduce=distributed.average_)
    except ValueError as error:
        raise ConfigError(f"prune.criterion {config.prune.criterion} in state {state}: {error}") from error
    return {name: found[name] for name in ("density_target", "density", "per_layer")} | {"score_images": len(rows)}


def _end(
    config: Config,
    now: dict[str, Any],
    model: Normalized,
    pruner: AnytimePruner | None,
    test: ImageSet,
    macs: Mapping[str, int],
) -> dict[str, Any]:
    """What comes after training on a megabatch: the best weights are loaded back and tested."""
    best = now.pop("best")
    model.load_state_dict(best["model"])
    if pruner is not None:
        pruner.load_state_dict(best["pruner"])
    test_acc = accuracy(model, test, batch_size=config.eval.batch_size)
    names = ("density_target", "density", "per_layer", "score_images")
    masked = 0 if pruner is None else pruner.masks.total - pruner.masks.kept
    epoch = best["epoch"]
    return {
        **{name: now[name] for name in names},
        "best_epoch": epoch,
        "errors": round(len(test) * (1 - test_acc / 100)),
        "test_acc": test_acc,
        "gap_best": generalization_gap(now["train"][epoch], now["val"][epoch]),
        "gap_last": generalization_gap(now["train"][-1], now["val"][-1]),
        "test_gap_last": generalization_gap(now["train"][-1], test_acc),
        "macs": forward_macs(macs, now["per_layer"]),
        "weights": sum(parameter.numel() for parameter in model.parameters()) - masked,
    }


def _batches(config: Config, pool: ImageSet, rows: Tensor, place: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled, augmented training batches of this rank."""
    keys = (config.seed, *place)
    for images, labels in epoch_batches(pool, rows, config.train.batch_size, config.data, keys):
        yield (images.contiguous(memory_format=torch.channels_last) if config.train.channels_last else images), labels


def _whole_batches(config: Config, pool: ImageSet, rows: Tensor, place: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Augmented batches to score on: every rank takes all of them whole, so that batch statistics are those of one."""
    keys = (config.seed, *place)
    return list(epoch_batches(pool, rows, config.prune.score_batch, config.data, keys, shuffle=False, whole=True))


def _val_accuracy(config: Config, model: nn.Module, pool: ImageSet, rows: Tensor, place: tuple[int, ...]) -> float:
    """Validation accuracy, percent, in eval mode; on augmented images only where the released code is followed."""
    options, device = config.train, pool.labels.device
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=options.amp):
        if not (options.val_augment and (config.data.crop_padding or config.data.flip)):
            return accuracy(model, pool.subset(rows.to(device)), batch_size=config.eval.batch_size)
        keys = (config.seed, *place)
        model.eval()
        right = 0
        for images, labels in epoch_batches(
            pool, rows, config.eval.batch_size, config.data, keys, shuffle=False, whole=True
        ):
            right += int((model(images).argmax(1) == labels).sum())
        return 100 * right / len(rows)


def main() -> None:
    """The command line."""

    def words(metrics: Mapping[str, Any]) -> str:
        nominal, effective = metrics["density_target"][-1], metrics["density"][-1]
        return (
            f"test accuracy {metrics['final_acc']:.2f} % at the end, {metrics['mean_acc']:.2f} % on average; "
            f"CER {metrics['cer']:,}; density nominal {nominal:.4f}, effective {effective:.4f}"
        )

    def name(config: Config) -> str:
        return f"{config.prune.method}-{config.prune.criterion}-seed{config.seed}"

    train_command(__file__, Config, train, name, words)


if __name__ == "__main__":
    command(main)
