"""What a teacher did, as data for regression: windows of features and the output that followed (spec c.6)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.runs import generator
from symbolic_l2o.inner import Learner, begin
from symbolic_l2o.problems import Problem


@dataclass(frozen=True)
class SRData:
    """Windows X (N, L, F), X[:, 0] now; outputs y (N,) before eta; group (N,): the run and coordinate a row is of."""

    X: Tensor
    y: Tensor
    group: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def rows(self, index: Tensor) -> "SRData":
        """Those rows."""
        return SRData(self.X[index], self.y[index], self.group[index])

    def split(self, seed: int, test: float = 0.15) -> tuple["SRData", "SRData"]:
        """Training and test rows; no group is in both. Raises ValueError with fewer than two groups."""
        groups = self.group.unique()
        if len(groups) < 2:
            raise ValueError(f"data must have at least two groups to be split, got {len(groups)}")
        order = groups[torch.randperm(len(groups), generator=generator(seed))]
        count = min(max(round(test * len(groups)), 1), len(groups) - 1)
        held_out = torch.isin(self.group, order[:count])
        return self.rows((~held_out).nonzero().squeeze(1)), self.rows(held_out.nonzero().squeeze(1))

    def subsample(self, count: int, seed: int) -> "SRData":
        """At most `count` rows, drawn at random."""
        return self.rows(torch.randperm(len(self), generator=generator(seed))[:count])


def window_count(steps: int, length: int) -> int:
    """Windows of one coordinate in a run: floor(T / L) - 2. Raises ValueError where T < 3 L, or L < 4."""
    if length < 4 or steps < 3 * length:
        raise ValueError(f"steps must be at least 3 windows of at least 4, got {steps} steps and windows of {length}")
    return steps // length - 2


def draw_starts(steps: int, length: int, count: int, rng: torch.Generator) -> Tensor:
    """Starts (count, k) of k windows that do not overlap, at random distances, for `count` coordinates."""
    k = window_count(steps, length)
    shares = torch.rand(count, k + 1, generator=rng, dtype=torch.float64)
    gaps = (shares / shares.sum(1, keepdim=True) * (steps - k * length - 2)).long()[:, :k]
    return gaps.cumsum(1) + length * torch.arange(k)


def extract_windows(records: Tensor, starts: Tensor, length: int) -> SRData:
    """Rows in the order run, coordinate, window, without those whose gradient is zero at index 3 floor(L / 4) - 1.

    Args:
        records: (runs, T, coordinates, 1 + F + 1): gradient, features, output.
        starts: (runs, coordinates, k).
        length: L.
    """
    runs, steps, coordinates, width = records.shape
    k = starts.shape[-1]
    index = starts.reshape(runs, coordinates, k, 1) + torch.arange(length)
    if int(index.max()) >= steps or int(index.min()) < 0:
        raise ValueError(f"windows must lie within the {steps} steps")
    lines = records.transpose(1, 2)[:, :, None].expand(-1, -1, k, -1, -1)
    windows = lines.gather(3, index[..., None].expand(-1, -1, -1, -1, width)).reshape(-1, length, width)
    group = torch.arange(runs * coordinates).repeat_interleave(k)
    kept = windows[:, 3 * (length // 4) - 1, 0] != 0
    windows, group = windows[kept], group[kept]
    return SRData(windows[:, :, 1:-1].flip(1), windows[:, -1, -1], group)


@torch.no_grad()
def collect(
    learner: Learner,
    problem: Problem,
    length: int = 20,
    steps: int = 300,
    runs: int = 6,
    seed: int = 0,
    per_tensor: int = 10,
    eta: float = 0.01,
) -> SRData:
    """Records of `runs` runs of the learner on the problem.

    Args:
        learner: the teacher.
        problem: its optimizee.
        length: L of the windows.
        steps: T of a run.
        runs: from fresh starts.
        seed: of starts, batches, coordinates and windows.
        per_tensor: coordinates of each parameter tensor, chosen once a run; all where it has fewer.
        eta: step of x.
    """
    window_count(steps, length)
    owner, found = problem.tensor_of(), []
    for number in range(runs):
        rng = generator(seed, number)
        chosen = []
        for tensor in range(int(owner.max()) + 1):
            places = (owner == tensor).nonzero().squeeze(1)
            chosen.append(places[torch.randperm(len(places), generator=rng)[:per_tensor]])
        coords = torch.cat(chosen)
        path, lines = begin(learner, problem, rng), []
        for step in range(steps):
            _, g = problem.gradient(path.x, problem.batch(seed, number, step))
            z = learner.features(g, path.moments)
            out, path.state = learner.step(z, path.state)
            path.x = path.x + eta * out
            lines.append(torch.cat([g[coords, None], z[coords], out[coords, None]], 1))
        found.append(torch.stack(lines))
    records = torch.stack(found).double().cpu()
    coordinates = records.shape[2]
    starts = torch.stack([draw_starts(steps, length, coordinates, generator(seed, n, 1)) for n in range(runs)])
    return extract_windows(records, starts, length)
