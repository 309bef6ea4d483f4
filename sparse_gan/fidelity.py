"""FID, IS and KID proper by torch-fidelity, where its Inception weights can be had (optional)."""

import torch
import torch.utils.data
from torch import Tensor

from common.config import UserError


class _Images(torch.utils.data.Dataset[Tensor]):
    """uint8 images (3, side, side) one by one; grey ones are repeated."""

    def __init__(self, images: Tensor) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return self._images[index].expand(3, -1, -1)


def fidelity_scores(fake: Tensor, real: Tensor) -> dict[str, float]:
    """{"fid", "inception_score", "inception_kid"} of uint8 images (n, 1 or 3, side, side).

    Raises UserError where torch-fidelity is not installed or its weights cannot be had.
    """
    try:
        import torch_fidelity  # type: ignore[import-not-found]
    except ImportError:
        raise UserError("eval.fidelity needs torch-fidelity: pip install torch-fidelity") from None
    try:
        scores = torch_fidelity.calculate_metrics(
            input1=_Images(fake),
            input2=_Images(real),
            cuda=torch.cuda.is_available(),
            isc=True,
            fid=True,
            kid=True,
            kid_subset_size=min(1000, len(fake), len(real)),
            verbose=False,
        )
    except OSError as error:  # of the network
        raise UserError(f"eval.fidelity: the Inception weights could not be had ({error})") from error
    names = {
        "fid": "frechet_inception_distance",
        "inception_score": "inception_score_mean",
        "inception_kid": "kernel_inception_distance_mean",
    }
    return {name: float(scores[theirs]) for name, theirs in names.items()}
