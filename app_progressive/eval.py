"""Measure a finished run: python app_progressive/eval.py --folder runs/app_progressive/app-snip-seed0

Writes eval.json into the run's folder: what train.py noted after each state, and for the last weights test accuracy,
clean training accuracy and gap (eval mode, no augmentation), and the non-zero weights counted.
"""

from pathlib import Path
from typing import Any

from app_progressive.configured import megabatches, network
from app_progressive.images import pool_and_test
from app_progressive.metrics import generalization_gap
from app_progressive.prunable import prunable
from app_progressive.settings import Config
from common.config import command
from common.experiment import Progress, accuracy, device, eval_command, load_weights, measurement
from common.runs import load_checkpoint, read_json

Metrics = dict[str, Any]


@measurement(Config)
def evaluate(config: Config, folder: Path, progress: Progress) -> Metrics:
    """Accuracies on the test images and on what the last state trained on, their gap, and the weights left."""
    pool, test = pool_and_test(config)
    model = network(config, pool).to(device())
    load_weights(model, load_checkpoint(folder / "model.pt"), folder / "model.pt")
    rows, _ = megabatches(config, pool).state(config.stream.states)
    test_acc = accuracy(model, test, batch_size=config.eval.batch_size)
    progress(0.5)
    train_acc = accuracy(model, pool.subset(rows), batch_size=config.eval.batch_size)
    weights = prunable(model).values()
    total = sum(weight.numel() for weight in weights)
    metrics: Metrics = {
        **read_json(folder / "done.json"),
        "test_accuracy": test_acc,
        "clean_train_acc": train_acc,
        "clean_gap": generalization_gap(train_acc, test_acc),
        "weights": total,
        "nonzero": sum(int(weight.count_nonzero()) for weight in weights),
    }
    return metrics


def words(metrics: Metrics, config: Config) -> str:
    """The metrics as a table, one line a state."""
    lines = ["state   test accuracy   errors   gap, last epoch   density nominal   effective"]
    columns = ("test_acc", "errors", "gap_last", "density_target", "density")
    for state, row in enumerate(zip(*(metrics[name] for name in columns), strict=True), 1):
        lines.append("{:5d}   {:13.2f}   {:6d}   {:15.2f}   {:15.4f}   {:9.4f}".format(state, *row))
    clean = f"clean gap {metrics['clean_gap']:.2f} points"
    cer = f"CER {metrics['cer']:,} ({metrics['cer_per_test']:.3f} a test image)"
    lines.append(f"test accuracy {metrics['test_accuracy']:.2f} %, {cer}, {clean}")
    lines.append(f"{metrics['nonzero']:,} of {metrics['weights']:,} prunable weights are not zero")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    eval_command(__file__, Config, evaluate, words)


if __name__ == "__main__":
    command(main)
