"""A compressed model as a file for other programs: torch.export or ONNX, compared with the model before it counts."""

import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

BATCHES = 64  # largest of a dynamic batch


@torch.no_grad()
def export(
    model: nn.Module,
    path: Path | str,
    images: Tensor,
    format: Literal["pt2", "onnx"] = "pt2",
    dynamic_batch: bool = True,
    atol: float = 1e-4,
) -> float:
    """Write the model to `path`, read it back and compare outputs; a file that was there stays where they differ.

    Args:
        model: in eval mode.
        path: of the file.
        images: an example, at least two, (batch, channels, height, width), on the model's device.
        format: "pt2" for torch.export.load; "onnx" with opset 18 (needs the packages onnx and onnxscript).
        dynamic_batch: whether the file takes any batch from 1 to 64.
        atol: largest difference of the outputs allowed.

    Returns:
        The largest difference; where onnxruntime is not installed ONNX's reference evaluator computes it.

    Raises:
        ValueError: on another format, a model in training mode, one image alone, or outputs that differ.
    """
    path = Path(path)
    if format not in ("pt2", "onnx"):
        raise ValueError(f"format must be pt2 or onnx, got {format!r}")
    if model.training:
        raise ValueError("model must be in eval mode, got training mode")
    if len(images) < 2:
        raise ValueError(f"images must be at least two, got {len(images)}")
    dynamic = ({0: torch.export.Dim("batch", min=1, max=BATCHES)},) if dynamic_batch else None
    program = torch.export.export(model, (images,), dynamic_shapes=dynamic)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        fresh = Path(folder) / path.name
        if format == "pt2":
            torch.export.save(program, fresh)
            found = torch.export.load(fresh).module()(images)
        else:
            torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False).save(fresh)  # type: ignore[union-attr]
            found = _run_onnx(fresh, images)
        difference = (found.to(images.device) - model(images)).abs().max().item()
        if not difference <= atol:
            raise ValueError(f"outputs of {path} must be within {atol} of the model's, got {difference:.3g}")
        for file in Path(folder).iterdir():  # of a large ONNX model also its data
            os.replace(file, path.parent / file.name)
    return difference


def _run_onnx(path: Path, images: Tensor) -> Tensor:
    import onnx  # here: optional

    onnx.checker.check_model(str(path))
    session: Any
    try:
        import onnxruntime  # type: ignore[import-untyped]

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        session = ReferenceEvaluator(str(path))
        name = session.input_names[0]
    return torch.from_numpy(session.run(None, {name: images.cpu().numpy()})[0])
