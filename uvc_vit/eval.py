"""Measure a finished run: python uvc_vit/eval.py --folder runs/uvc_vit/uvc-seed0

Writes eval.json into the run's folder: test accuracy after and before stage 2, multiply-adds by formula and by torch's
counter, their share of the uncompressed network's, and what is left of each block.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from common.config import command
from common.data import load
from common.experiment import Progress, accuracy, device, eval_command, load_weights, measurement
from common.masks import prunable_weights
from common.runs import CheckpointError, load_checkpoint
from uvc_vit.adapter import ViTAdapter
from uvc_vit.choose import build
from uvc_vit.macs import count_flops, macs
from uvc_vit.plan import Plan
from uvc_vit.settings import Config
from uvc_vit.slim import slim

Metrics = dict[str, Any]


@measurement(Config)
def evaluate(config: Config, folder: Path, progress: Progress) -> Metrics:
    """Accuracy before and after fine-tuning; FLOPs, parameters and latency of the slim network; what is left."""
    splits = load(config.data)
    _, size = config.model.image_shape(splits.train)
    plan = read_plan(folder / "plan.json")
    dense = build(replace(config, model=replace(config.model, pretrained=False)), splits.train)
    try:
        model: Any = slim(dense, plan, config.layout).to(device())
    except ValueError as error:
        raise CheckpointError(f"{folder}/plan.json: {error}") from error
    metrics: Metrics = {}
    for name, file in (("before_accuracy", "before.pt"), ("test_accuracy", "model.pt")):
        load_weights(model, load_checkpoint(folder / file), folder / file)
        metrics[name] = accuracy(model, splits.test, config.model.normalize, config.eval.batch_size)
        progress(1.0 if name == "test_accuracy" else 0.5)
    metrics |= cost(dense.to(device()), model, (size, size))
    metrics |= left(plan) | {"density": density(model)}
    return metrics


def read_plan(path: Path) -> Plan:
    """The plan in a file. Raises CheckpointError where it is missing or damaged."""
    try:
        return Plan.from_json(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such plan") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error


def cost(dense: nn.Module, model: nn.Module, input_size: tuple[int, int]) -> Metrics:
    """Multiply-adds, classifier included, and shares of the uncompressed network's, classifier not included."""
    head = ViTAdapter(dense).head_macs()
    whole, counted = macs(dense, input_size), count_flops(model, input_size) // 2
    parameters = [sum(p.numel() for p in net.parameters()) for net in (model, dense)]
    return {
        "macs": macs(model, input_size),
        "counted_macs": counted,
        "share": (counted - head) / (whole - head),
        "parameters": parameters[0],
        "parameter_share": parameters[0] / parameters[1],
    }


def density(model: nn.Module) -> float:
    """Share of the weights of linear and convolutional layers that are not zero."""
    weights = prunable_weights(model, (nn.Linear, nn.Conv2d)).values()
    return sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)


def left(plan: Plan) -> Metrics:
    """By block, 0 where it is skipped: share of heads, of the value dimensions of all heads, of neurons."""
    shares: dict[str, list[float]] = {"heads": [], "dims": [], "neurons": []}
    for index, (keep, sizes) in enumerate(zip(plan.keep_block, plan.sizes, strict=True)):
        heads = plan.heads(index)
        dims = sum(len(plan.keep_dim[index][head]) for head in heads)
        shares["heads"].append(keep * len(heads) / max(sizes.heads, 1))
        shares["dims"].append(keep * dims / max(sum(sizes.v_dims), 1))
        shares["neurons"].append(keep * len(plan.keep_mlp[index]) / max(sizes.hidden, 1))
    return {"blocks": sum(plan.keep_block), **shares}


def main() -> None:
    """The command line."""

    def summary(metrics: Metrics, config: Config) -> str:
        accuracies = (
            f"{metrics['test_accuracy']:.2f} % of test images ({metrics['before_accuracy']:.2f} before stage 2)"
        )
        counts = {"exact": "", "released": " by the authors' count", "latency": " of measured time"}
        budget = f"budget {config.method.budget:.0%}{counts[config.method.accounting]}"
        share = f"{metrics['share']:.2%} of the multiply-adds (exact, {budget})"
        return f"{accuracies}; {share}; {metrics['blocks']} blocks; mode {config.method.mode}"

    eval_command(__file__, Config, evaluate, summary)


if __name__ == "__main__":
    command(main)
