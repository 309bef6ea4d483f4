"""The metrics of a whole stream, from the records of its states."""

from collections.abc import Mapping
from typing import Any

from app_progressive.cost import forward_macs, stream_macs, training_images
from app_progressive.metrics import AnytimeMetrics
from app_progressive.settings import Config


def summary(config: Config, history: list[dict[str, Any]], macs: Mapping[str, int], n_test: int) -> dict[str, Any]:
    """The metrics of a finished stream: those of each state as lists, and what they add up to."""
    anytime = AnytimeMetrics(n_test)
    for record in history:
        anytime.update(record["errors"])
    sizes = [record["train_images"] for record in history]
    lists = ("errors", "test_acc", "gap_best", "gap_last", "test_gap_last", "density_target", "density", "best_epoch")
    by_state = {name: [record[name] for record in history] for name in lists}
    epochs = config.train.epochs
    return {
        **by_state,
        "final_acc": history[-1]["test_acc"],
        "mean_acc": anytime.mean_acc,
        "cer": anytime.cer,
        "cer_per_test": anytime.cer / n_test,
        "are": anytime.are,
        "per_layer": history[-1]["per_layer"],
        "train_images": training_images(sizes, epochs),
        "score_images": sum(record["score_images"] for record in history),
        "macs_dense": stream_macs(sizes, epochs, [forward_macs(macs)] * len(sizes)),
        "macs": stream_macs(sizes, epochs, [record["macs"] for record in history]),
        "memory": sum(record["weights"] for record in history),
    }
