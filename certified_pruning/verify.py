"""Verify your own network: python certified_pruning/verify.py --checkpoint net.pt --model.name cnn_s --eps 0.1

Or every ticket of runs of train.py: --runs DIR. --paper-verifier is the paper's budgets; options beside it override.
--bounds auto_lirpa bounds any graph of your own, incompletely.
Sharded over images: torchrun --nproc_per_node=N certified_pruning/verify.py ...
"""

import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from certified_pruning.compress import compress_channels
from certified_pruning.errors import UnsupportedLayerError
from certified_pruning.export import export_instances
from certified_pruning.lirpa_verifier import APPLIED, LirpaVerifier
from certified_pruning.settings import Config, ModelConfig
from certified_pruning.train import network
from certified_pruning.verdicts import ImageVerdict, VerifyConfig, VerifyReport
from certified_pruning.verifier import CompleteVerifier
from certified_pruning.weights import load_weights
from common import distributed
from common.config import ConfigError, UserError, command, parse, require
from common.config import load as load_config
from common.data import DataConfig, ImageSet, load, pixels
from common.runs import environment, write_json


@dataclass(frozen=True)
class NetworkConfig(ModelConfig):
    """The network the weights belong to."""

    build: str = ""
    """instead of name and channels: module:function that returns your nn.Module; imports and runs that code of yours"""


@dataclass(frozen=True)
class Arguments:
    """What to verify, on which images, with what budget."""

    checkpoint: str = ""
    """weights of one network, .safetensors or torch; read as plain tensors, never executed"""
    runs: str = ""
    """instead: folder of a run of train.py, or of several; model, data and eps are theirs"""
    model: NetworkConfig = field(default_factory=NetworkConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(val=0.0, val_from="test"))
    eps: float | None = None
    """radius of the L-inf box in pixel units [0, 1]; needed with checkpoint"""
    images: int = 100
    """verified images: the first ones of the test split"""
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    bounds: Literal["native", "auto_lirpa"] = "native"
    """native: the complete verifier, of chains; auto_lirpa: bounds of that package, of any graph, without branching"""
    report: str = "verification.json"
    """file for the verdicts"""
    export: str = ""
    """folder for ONNX and VNN-LIB files of the same questions, for other verifiers; one folder in it a network"""
    threads: int = 0
    """processor threads; 0: torch's choice"""

    def __post_init__(self) -> None:
        require(bool(self.checkpoint) != bool(self.runs), "checkpoint", self.checkpoint, "given, or else runs")
        require(self.eps is not None or bool(self.runs), "eps", self.eps, "given with checkpoint")
        require(self.eps is None or 0 <= self.eps <= 1, "eps", self.eps, "in [0, 1]")
        own = self.model == NetworkConfig() and self.data == DataConfig(val=0.0, val_from="test")
        require(own or not self.runs, "runs", self.runs, "without model.* and data.*, which come from the runs")
        require(self.images >= 1, "images", self.images, "at least 1")
        require(self.threads >= 0, "threads", self.threads, "at least 0")
        require(not Path(self.report).is_dir(), "report", self.report, "a file")


@dataclass(frozen=True)
class Job:
    """One network and its images."""

    name: str
    model: nn.Module
    verifier: CompleteVerifier | LirpaVerifier
    raw: Tensor
    labels: Tensor
    classes: int
    eps: float
    config: ModelConfig


def jobs(arguments: Arguments, device: torch.device) -> list[Job]:
    """The networks to verify, all read and checked. Raises `UserError`."""
    if arguments.checkpoint:
        assert arguments.eps is not None
        test = load(arguments.data).test
        model = _built(arguments.model.build) if arguments.model.build else None
        if model is None:
            model = network(Config(data=arguments.data, model=arguments.model), test)
        load_weights(model, Path(arguments.checkpoint))
        return [_job(arguments.checkpoint, model.to(device), test, arguments.eps, arguments.model, arguments)]
    top = Path(arguments.runs)
    folders = [top] if (top / "config.yaml").exists() else sorted(path.parent for path in top.glob("*/config.yaml"))
    require(bool(folders), "runs", arguments.runs, "the folder of a run, or a folder of such folders")
    found = []
    for folder in folders:
        tickets = sorted((folder / "tickets").glob("*.pt"), key=lambda path: (len(path.stem), path.stem))
        require(bool(tickets), "runs", str(folder), "a run of train.py with at least one ticket")
        config = load_config(Config, folder / "config.yaml")
        test = load(config.data).test
        eps = config.train.eps if arguments.eps is None else arguments.eps
        for ticket in tickets:
            model = network(config, test)
            load_weights(model, ticket)
            try:
                small = compress_channels(model.eval())
            except ValueError as error:
                raise UserError(f"{ticket}: {error}") from error
            found.append(_job(str(ticket), small.to(device), test, eps, config.model, arguments))
    return found


def verify(job: Job, progress: Callable[[float], None]) -> VerifyReport:
    """Verdicts on all images of the job, in their order, on every rank; this rank works on images rank::world.

    Raises `UserError` where the bounds of a layer turn out not to be known.
    """
    rank, world = distributed.rank(), distributed.world_size()
    try:
        mine = job.verifier.verify(job.raw[rank::world], job.labels[rank::world], progress).images
    except ValueError as error:
        raise UserError(f"{job.name}: {error}") from error
    for verdict in mine:
        verdict.witness = None if verdict.witness is None else verdict.witness.cpu()
    parts: list[list[ImageVerdict]] = [mine]
    if world > 1:
        parts = [[] for _ in range(world)]
        dist.all_gather_object(parts, mine)
    verdicts = [ImageVerdict() for _ in range(len(job.raw))]
    for number, part in enumerate(parts):
        verdicts[number::world] = part
    return VerifyReport(verdicts)


def as_json(job: Job, report: VerifyReport) -> dict[str, Any]:
    """The entry of one network in the report file."""
    entry = json.loads(report.to_json())
    for index, (row, label) in enumerate(zip(entry["images"], job.labels.tolist(), strict=True)):
        entry["images"][index] = {"image": index, "label": label, **row}
    return {"network": job.name, "eps": job.eps, **entry}


def expand(argv: Sequence[str]) -> list[str]:
    """The command line with `--paper-verifier` written out as the options it stands for, before all others."""
    if "--paper-verifier" not in argv:
        return list(argv)
    options = dataclasses.asdict(VerifyConfig.paper()).items()
    paper = [f"--verify.{name}={json.dumps(value) if value is None else value}" for name, value in options]
    return paper + [argument for argument in argv if argument != "--paper-verifier"]


def _job(name: str, model: nn.Module, test: ImageSet, eps: float, config: ModelConfig, arguments: Arguments) -> Job:
    if not isinstance(test.images, Tensor):
        raise ConfigError("data.name must be a data set that fits memory, got 'imagefolder'")
    raw, labels = pixels(test.images[: arguments.images]), test.labels[: arguments.images]
    normalize, kind = (config.mean, config.std), CompleteVerifier if arguments.bounds == "native" else LirpaVerifier
    try:
        verifier = kind(model.eval(), tuple(raw.shape[1:]), eps, test.classes, arguments.verify, normalize=normalize)
    except UnsupportedLayerError as error:
        raise UserError(f"{name}: {error}; bounds auto_lirpa takes other graphs") from error
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    return Job(name, model, verifier, raw, labels, test.classes, eps, config)


def _built(path: str) -> nn.Module:
    """What the user's own function returns."""
    module, _, function = path.partition(":")
    require(bool(module and function), "model.build", path, "module:function, such as my.nets:build")
    sys.path.append(os.getcwd())  # as `python -m` would
    try:
        model = getattr(importlib.import_module(module), function)()
    except Exception as error:  # the user's own code
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"model.build must be a function that runs, got {path!r} ({line})") from error
    require(isinstance(model, nn.Module), "model.build", path, "a function that returns an nn.Module")
    return model


def _export(job: Job, folder: Path, timeout_s: float | None) -> None:
    name = job.name.removesuffix(".pt").removesuffix(".safetensors").strip("./").replace("/", "-")
    normalize = (job.config.mean, job.config.std)
    budget = {} if timeout_s is None else {"timeout_s": timeout_s}
    export_instances(folder / name, job.model, job.raw, job.labels, job.eps, job.classes, normalize=normalize, **budget)


def _show(found: list[tuple[Job, VerifyReport]]) -> None:
    """The table: a row an image for one network, a row a network for several."""
    from rich.console import Console
    from rich.table import Column, Table

    rows: list[tuple[object, ...]]
    if len(found) == 1:
        job, report = found[0]
        table = Table("image", "label", "verdict", "decided by", "margin at least", "nodes", "seconds", title=job.name)
        rows = [
            (index, label, v.status, v.stage, f"{v.lb:.4g}", v.nodes, f"{v.seconds:.2f}")
            for index, (label, v) in enumerate(zip(job.labels.tolist(), report.images, strict=True))
        ]
    else:
        table = Table(
            Column("network", overflow="fold"), "eps", "clean %", "verified %", "falsified", "unknown", "nodes"
        )
        rows = [
            (job.name, f"{job.eps:.4g}", f"{r.clean_accuracy:.1f}", f"{r.verified_accuracy:.1f}")
            + (r.counts["falsified"], r.counts["unknown"], r.nodes)
            for job, r in found
        ]
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)
    if len(found) == 1:
        counts = ", ".join(f"{count} {status}" for status, count in report.counts.items())
        print(f"{len(report.images)} images at eps {job.eps}: verified {report.verified_accuracy:.1f} % ({counts})")


def _verify_all(arguments: Arguments, device: torch.device) -> None:
    from tqdm import tqdm

    first = distributed.rank() == 0
    work = jobs(arguments, device)
    budget = dataclasses.asdict(arguments.verify)
    if arguments.bounds == "auto_lirpa":
        budget = {name: budget[name] for name in APPLIED}
    heading = {**environment(), "bounds": arguments.bounds, "verify": budget}
    networks: list[dict[str, Any]] = []
    if first:
        write_json(
            Path(arguments.report), {**heading, "networks": networks}
        )  # a place that cannot be written to fails now
        for job in work if arguments.export else ():
            _export(job, Path(arguments.export), arguments.verify.timeout_s)
    found: list[tuple[Job, VerifyReport]] = []
    bar_format = "verify: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
    with tqdm(total=len(work), bar_format=bar_format, disable=not first) as bar:

        def show(fraction: float) -> None:
            bar.update(len(found) + fraction - bar.n)

        for job in work:
            report = verify(job, show)
            found.append((job, report))
            networks.append(as_json(job, report))
            if first:  # after each network: a killed command leaves what it has found
                write_json(Path(arguments.report), {**heading, "networks": networks})
    if first:
        _show(found)
        print(f"verdicts in {arguments.report}" + (f"; files in {arguments.export}" if arguments.export else ""))


def main() -> None:
    """The command line."""
    description = " ".join((__doc__ or "").split("\n")[:4])
    argv = expand(sys.argv[1:])
    arguments = parse(Arguments, argv, prog="python certified_pruning/verify.py", description=description)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with distributed.process_group() as device:
        _verify_all(arguments, device)


if __name__ == "__main__":
    command(main)
