"""Networks as ONNX and robustness questions as VNN-LIB, VNN-COMP's formats, so that other verifiers can be asked too.

A property is satisfiable iff the box holds a counterexample: `sat` stands for our falsified and misclassified, `unsat`
for verified. A tie counts as a counterexample in the file; our verifier leaves it unknown.
"""

from __future__ import annotations

import copy
from decimal import Decimal
from math import inf
from pathlib import Path

import torch
from torch import Tensor, nn

from certified_pruning.ibp import channel_stats, input_box, margin_spec
from certified_pruning.optional import need
from certified_pruning.verifier import Normalization
from common.runs import write_atomically

OPSET = 18
INSTALL = "onnx onnxscript"


def write_onnx(model: nn.Module, input_shape: tuple[int, ...], path: Path) -> None:
    """The network as an ONNX file of opset 18 for batches of one: input `input` (1, *input_shape), output `logits`.

    Batch normalisation is folded by torch's exporter, in float32: outputs agree to about 1e-5, not bit for bit.

    Args:
        model: any graph torch can export, in eval mode; takes normalised inputs.
        input_shape: of one input, e.g. (3, 32, 32).
        path: of the file.

    Raises:
        MissingPackageError: `onnx` or `onnxscript` is not installed. ValueError: train mode. OSError.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("model must be in eval mode (call model.eval()), got train mode")
    onnx = need("onnx", INSTALL)
    need("onnxscript", INSTALL)
    x = torch.zeros(1, *input_shape)
    program = torch.onnx.export(
        copy.deepcopy(model).cpu(),
        (x,),
        dynamo=True,
        opset_version=OPSET,
        input_names=["input"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    # The exporter notes where in this machine's files each node comes from.
    del proto.metadata_props[:]
    for part in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
    for part in (proto.graph, *proto.graph.initializer):
        del part.metadata_props[:]
    onnx.checker.check_model(proto)
    write_atomically(Path(path), proto.SerializeToString())


def vnnlib(x_lb: Tensor, x_ub: Tensor, label: int, n_classes: int, comment: str = "") -> str:
    """The text of one property: inputs in the box, and some logit of another class at least that of `label`.

    Args:
        x_lb, x_ub: box of one image in the network's (normalised) coordinates, any shape, row-major order. Numbers are
            written without exponents and read back as exactly the same float64.
        label: in [0, n_classes).
        n_classes: number of logits.
        comment: for the first line.

    Raises:
        ValueError: shapes that differ, x_lb > x_ub, NaN or Inf, a label out of range.
    """
    margin_spec(torch.tensor([label]), n_classes)
    if x_lb.shape != x_ub.shape or not bool(((x_lb <= x_ub) & (x_lb > -inf) & (x_ub < inf)).all()):
        raise ValueError(f"x_lb must be finite, <= x_ub and of its shape {tuple(x_ub.shape)}, got {tuple(x_lb.shape)}")
    bounds = list(zip(_numbers(x_lb), _numbers(x_ub), strict=True))
    lines = [f"; {' '.join(comment.split())}"] if comment else []
    lines += [f"(declare-const X_{i} Real)" for i in range(len(bounds))]
    lines += [f"(declare-const Y_{t} Real)" for t in range(n_classes)]
    for i, (low, high) in enumerate(bounds):
        lines += [f"(assert (>= X_{i} {low}))", f"(assert (<= X_{i} {high}))"]
    others = [f"    (and (>= Y_{t} Y_{label}))" for t in range(n_classes) if t != label]
    return "\n".join([*lines, "(assert (or", *others, "))", ""])


def export_instances(
    folder: Path,
    model: nn.Module,
    raw: Tensor,
    y: Tensor,
    eps: float,
    n_classes: int,
    *,
    normalize: Normalization = ((0.0,), (1.0,)),
    timeout_s: float = 300.0,
) -> Path:
    """A benchmark folder as VNN-COMP lays it out: onnx/network.onnx, vnnlib/image_<i>.vnnlib, instances.csv.

    Args:
        folder: made if missing.
        model: in eval mode; takes normalised inputs.
        raw: images (B, *input_shape) in [0, 1].
        y: labels (B,).
        eps: radius of the L-inf ball in raw units; the ball is cut to [0, 1] and normalised in float64, as
            `CompleteVerifier` does.
        normalize: (mean, std) a channel.
        timeout_s: seconds an instance, for the csv.

    Returns:
        The path of instances.csv: one line "onnx file,vnnlib file,seconds" an image, paths relative to `folder`.

    Raises:
        MissingPackageError, OSError: see `write_onnx`. ValueError: eps, pixels, labels or timeout out of range.
    """
    if not 0 < timeout_s < inf:
        raise ValueError(f"timeout_s must be finite and > 0, got {timeout_s}")
    margin_spec(y, n_classes)
    raw = raw.detach().cpu().double()
    mean, std = channel_stats(*normalize, raw)
    x_lb, x_ub = input_box(raw, eps, mean, std)
    folder = Path(folder)
    write_onnx(model, tuple(raw.shape[1:]), folder / "onnx" / "network.onnx")
    lines = []
    for i, label in enumerate(y.tolist()):
        name = f"vnnlib/image_{i}.vnnlib"
        text = vnnlib(x_lb[i], x_ub[i], label, n_classes, f"image {i}, label {label}, eps {eps} in raw pixels")
        write_atomically(folder / name, text.encode())
        lines.append(f"onnx/network.onnx,{name},{timeout_s:g}\n")
    write_atomically(folder / "instances.csv", "".join(lines).encode())
    return folder / "instances.csv"


def _numbers(x: Tensor) -> list[str]:
    # repr is the shortest text that reads back to the same float64; SMT-LIB's decimals know no exponent.
    return [format(Decimal(repr(value)), "f") for value in x.detach().cpu().double().flatten().tolist()]
