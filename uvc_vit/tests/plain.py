"""The controller's step as loops over every column with one scalar tensor each: the oracle of the vectorised form."""

from __future__ import annotations

import torch
from torch import Tensor

from uvc_vit.adapter import ViTAdapter
from uvc_vit.gate_values import noisy_keep
from uvc_vit.released import ReleasedSettings
from uvc_vit.resource import Costs
from uvc_vit.variables import Variables


class Loops:
    """Mode released: variables and weights move as by `UVCController.step`, block by block, column by column.

    Args:
        adapter: of the model, all heads equally wide.
        costs: with accounting "released".
        budget: share of the dense cost.
    """

    def __init__(self, adapter: ViTAdapter, costs: Costs, budget: float) -> None:
        self.blocks, self.dims, self.costs, self.budget = adapter.blocks, adapter.dims, costs, budget
        self.now, self.settings = Variables.start(costs), ReleasedSettings()
        self.steps = 0
        self.kept: list[Tensor] = []
        self.momentum = torch.zeros_like(self.now.gates)

    @torch.no_grad()
    def step(self, w_lr: float, task_grad: Tensor, noise: Tensor) -> float:
        """One step; returns R before it at the first noise."""
        now, options = self.now, self.settings
        self._shrink(w_lr)
        slope_s, slope_r = torch.zeros_like(now.s), torch.zeros_like(now.r)
        for i, (columns, heads, neurons) in enumerate(self._norms()):
            slope_s[i, 0] = _next(heads, now.s[i, 0])
            slope_s[i, 1] = _next(neurons, now.s[i, 1])
            for h, own in enumerate(columns):
                slope_r[i, h] = _next(own, now.r[i, h])
        share, by_s, by_r, by_gate = self._resource(noise[0])
        z = now.z if abs(share - self.budget) <= options.z_clip else now.z * 0
        self._move_gates(task_grad + z * options.gating_weight * by_gate)
        most_s = torch.tensor([[dims.heads - 1.0, dims.hidden - 1.0] for dims in self.dims])
        most_r = torch.tensor([[size - 1.0 for size in dims.v_dims] for dims in self.dims])
        _move(now.s, now.y * slope_s + z * by_s, most_s, options.slr)
        _move(now.r, now.p * slope_r + z * by_r, most_r, options.rlr)
        for i, (columns, heads, neurons) in enumerate(self._norms()):
            now.y[i, 0] += options.ylr * _sum(heads, now.s[i, 0])
            now.y[i, 1] += options.ylr * _sum(neurons, now.s[i, 1])
            for h, own in enumerate(columns):
                now.p[i, h] += options.plr * _sum(own, now.r[i, h])
        now.z.add_(options.zlr * (self._resource(noise[1])[0] - self.budget)).clamp_(min=0)
        return share

    def _norms(self) -> list[tuple[list[list[Tensor]], list[Tensor], list[Tensor]]]:
        """Of each block: columns by head, heads, neurons."""
        found = []
        for block, dims in zip(self.blocks, self.dims, strict=True):
            proj, fc2 = block.attn.proj.weight, block.mlp.fc2.weight
            columns, start = [], 0
            for size in dims.v_dims:
                columns.append([proj[:, start + j].square().sum() for j in range(size)])
                start += size
            neurons = [fc2[:, j].square().sum() for j in range(dims.hidden)]
            found.append((columns, [torch.stack(own).sum() for own in columns], neurons))
        return found

    def _shrink(self, eta: float) -> None:
        for i, (columns, heads, neurons) in enumerate(self._norms()):
            proj, fc2 = self.blocks[i].attn.proj.weight, self.blocks[i].mlp.fc2.weight
            dead, start = _smallest(heads, self.now.s[i, 0]), 0
            for h, own in enumerate(columns):
                for j in _smallest(own, self.now.r[i, h]):
                    proj[:, start + j] /= 1 + 2 * eta * self.now.p[i, h]
                if h in dead:
                    for j in range(len(own)):
                        proj[:, start + j] /= 1 + 2 * eta * self.now.y[i, 0]
                start += len(own)
            for j in _smallest(neurons, self.now.s[i, 1]):
                fc2[:, j] /= 1 + 2 * eta * self.now.y[i, 1]

    def _resource(self, noise: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
        """R and its derivatives in s, r and the gates."""
        now, costs = self.now, self.costs
        total, dense = float(costs.embed), costs.dense.item()
        by_s, by_r, by_gate = torch.zeros_like(now.s), torch.zeros_like(now.r), torch.zeros_like(now.gates)
        keeps, slopes = noisy_keep(now.gates, noise, self.settings.tau)
        for i, block in enumerate(self.blocks):
            parts = block.attn.proj.weight.split(list(self.dims[i].v_dims), dim=1)
            heads = [part.square().sum() for part in parts]
            head, dim, neuron = (float(part[i]) for part in (costs.head, costs.dim, costs.neuron))
            dims, keep = self.dims[i], keeps[i].item()
            removed, gone = now.s[i].ceil().tolist(), _smallest(heads, now.s[i, 0])
            values = sum(dims.v_dims) - removed[0] * dims.v_dims[0]
            for h in range(dims.heads):
                if h not in gone:
                    values -= float(now.r[i, h].ceil())
                    by_r[i, h] = -dim * keep / dense
            left = head * (dims.heads - removed[0]) + dim * values + neuron * (dims.hidden - removed[1])
            total += keep * left
            by_s[i, 0] = -(head + dim * dims.v_dims[0]) * keep / dense
            by_s[i, 1] = -neuron * keep / dense
            by_gate[i] = slopes[i] * left / dense
        return total / dense, by_s, by_r, by_gate

    def _move_gates(self, gradient: Tensor) -> None:
        options = self.settings
        self.steps += 1
        self.kept.append(gradient * (self.steps % options.gating_interval))
        if (self.steps + 1) % options.gating_interval == 0:
            mean = torch.stack(self.kept).mean(0) + options.gate_decay * self.now.gates
            self.momentum = options.gate_momentum * self.momentum + mean
            self.now.gates -= options.glr * self.momentum
            self.kept = []


def _smallest(norms: list[Tensor], amount: Tensor) -> list[int]:
    order = sorted(range(len(norms)), key=lambda index: norms[index].item())
    return order[: int(amount.ceil())]


def _next(norms: list[Tensor], amount: Tensor) -> Tensor:
    return sorted(norms)[min(int(amount.ceil()), len(norms) - 1)]


def _sum(norms: list[Tensor], amount: Tensor) -> Tensor:
    return sum(sorted(norms)[: int(amount.ceil())], torch.zeros(()))


def _move(amounts: Tensor, gradient: Tensor, most: Tensor, step: float) -> None:
    full = amounts >= most
    for i, j in torch.ones_like(amounts).nonzero().tolist():
        if full[i, j]:
            gradient[i, j] = max(gradient[i, j], 0)
        if amounts[i, j] <= 0:
            gradient[i, j] = min(gradient[i, j], 0)
    scale = min(1.0, 1 / (gradient.abs().max().item() + 1e-6))
    amounts -= step * scale * gradient
    amounts.clamp_(min=0)
    amounts[full] = most[full]
