"""The learnt numerical optimisers: an LSTM applied to every coordinate of the optimizee (spec c.3)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from symbolic_l2o.features import GradFeatures, feature_names
from symbolic_l2o.lstm import affine, elu, lstm_step


class Kind(NamedTuple):
    """Features, width of the layer before the LSTM (0: none), widths of the LSTM, whether the output is a tanh."""

    features: str
    before: int
    lstm: tuple[int, ...]
    saturates: bool


KINDS = {
    "dm": Kind("DM", 0, (20, 20), False),
    "dm_raw": Kind("g", 0, (20, 20), False),
    "rp": Kind("RP", 20, (20, 20), True),
    "rp_s": Kind("RP_s", 6, (7,), True),
    "rp_si": Kind("RP_si", 6, (7,), True),
    "rp_5": Kind("RP_5", 9, (12,), True),
}
State = list[Tensor]


class LSTMTeacher(nn.Module):
    """Features (P, F) of P coordinates -> raw update (P,), which is then multiplied by eta.

    Args:
        kind: of KINDS.
        eps: of the features.

    Raises:
        ValueError: for an unknown kind.
    """

    def __init__(self, kind: str = "rp_s", eps: float = 1e-8) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        sizes = KINDS[kind]
        self.kind, self.saturates = kind, sizes.saturates
        self.features = GradFeatures(sizes.features, eps=eps)
        width = len(feature_names(sizes.features))
        self.before = nn.Linear(width, sizes.before) if sizes.before else None
        cells: list[nn.LSTMCell] = []
        for size in sizes.lstm:
            cells.append(nn.LSTMCell(sizes.before or width if not cells else cells[-1].hidden_size, size))
        self.cells = nn.ModuleList(cells)
        self.output = nn.Linear(sizes.lstm[-1], 1)

    @property
    def state_floats(self) -> int:
        """Numbers kept for each coordinate, moments of the features included."""
        return 2 * sum(cell.hidden_size for cell in self.cells) + len(self.features.buffers)  # type: ignore[misc]

    def init_state(self, like: Tensor) -> State:
        """Zero state (h, c of each layer, coordinates first) for coordinates like `like` (P,)."""
        sizes = [cell.hidden_size for cell in self.cells for _ in range(2)]
        return [like.new_zeros(len(like), int(size)) for size in sizes]  # type: ignore[arg-type]

    def step(self, z: Tensor, state: State) -> tuple[Tensor, State]:
        """Raw update (P,) for features (P, F), and the next state."""
        x = z.T if self.before is None else elu(affine(self.before, z.T))
        kept: State = []
        for number, cell in enumerate(self.cells):
            h, c = (tensor.T for tensor in state[2 * number : 2 * number + 2])
            x, memory = lstm_step(cell, x, h, c)  # type: ignore[arg-type]
            kept += [x.T, memory.T]
        out = affine(self.output, x)[0]
        return torch.tanh(out) if self.saturates else out, kept

    forward = step
