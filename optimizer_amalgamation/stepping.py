"""One step of any update rule on many parameters, in two forms: by blocks in the cache, or all coordinates at once."""

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from optimizer_amalgamation.blocks import BLOCK, InPlace, turned
from optimizer_amalgamation.rule import Context, Rule, State, Weights

PER_TENSOR, SHARED, CLOCK = "tensor_h", "global_h", "time"  # state that is not a coordinate's; the clock is `step`
LIMITS = {torch.float32: 1e18, torch.float64: 1e150}  # of a gradient: its square must be a number
Pairs = list[tuple[Tensor, dict[str, Any]]]
"""Parameters with their groups, of one device and type."""


class Stepped(Protocol):
    """What a step needs of `RuleOptimizer`."""

    rule: Rule
    state: Any

    def context(self, params: list[Tensor]) -> Context: ...

    def weights_on(self, device: torch.device, dtype: torch.dtype) -> Weights: ...

    def in_place(self, device: torch.device, dtype: torch.dtype) -> InPlace: ...

    def constants(self, values: list[Any], device: torch.device, dtype: torch.dtype) -> Tensor: ...

    def count_skipped(self, missed: Tensor | int) -> None: ...


def wide_type(p: Tensor) -> torch.dtype:
    """The type to compute a parameter's update in."""
    return torch.promote_types(p.dtype, torch.float32)


def step_blocks(optimizer: Stepped, pairs: Pairs, device: torch.device, wide: torch.dtype) -> None:
    """In place. What is skipped or warming up is decided here: the program waits for each gradient's magnitude."""
    ready: list[tuple[Tensor, dict[str, Any], Tensor]] = []
    for p, group in pairs:
        state = optimizer.state[p]
        g = p.grad.reshape(-1).to(wide)  # type: ignore[union-attr]
        g = g.neg() if group["maximize"] else g
        largest = torch.linalg.vector_norm(g, math.inf)
        warm = bool(state["step"] < group["warmup"])
        if not largest < LIMITS[wide] or (warm and not _fits(p, group, largest * group["warmup_lr"])):
            optimizer.count_skipped(1)
        elif warm:
            for name, tensor in optimizer.rule.warmup({**state, CLOCK: state["step"]}, g).items():
                if name != CLOCK and tensor is not state[name]:
                    state[name].copy_(tensor)
            _move(p, group, state, group["warmup_lr"] * g)
        else:
            ready.append((p, group, g))
    step, most = optimizer.in_place(device, wide), getattr(optimizer.rule, "largest_update", math.inf)
    for some in _batches(ready):
        params, states = [p for p, _, _ in some], [optimizer.state[p] for p, _, _ in some]
        sizes = [p.numel() for p in params]
        names = [name for name in states[0] if name != "step"]
        if len(some) == 1:
            own, g = {name: states[0][name] for name in names}, some[0][2]
            if not _fits(params[0], some[0][1], torch.tensor(most * some[0][1]["alpha"], dtype=wide)):
                own = {name: tensor.clone() for name, tensor in own.items()}  # it may have to stay as it is
        else:
            own = {name: torch.cat([state[name] for state in states], -1) for name in names}
            g = torch.cat([g for _, _, g in some])
        clocks = [state["step"].to(wide).expand(size) for state, size in zip(states, sizes, strict=True)]
        own[CLOCK] = clocks[0] if len(some) == 1 else torch.cat(clocks)
        updates = step(own, g, optimizer.context(params)).split(sizes)
        moving = []
        for number, ((p, group, _), update) in enumerate(zip(some, updates, strict=True)):
            if _fits(p, group, torch.linalg.vector_norm(update.mul_(group["alpha"]), math.inf)):
                moving.append(number)
            else:
                optimizer.count_skipped(1)
        for name in names:
            new = own[name].split(sizes, -1) if len(some) > 1 else [own[name]]
            if moving and new[0] is not states[0][name]:
                torch._foreach_copy_([states[at][name] for at in moving], [new[at] for at in moving])
        for at in moving:
            _move(*some[at][:2], states[at], updates[at])


def _batches(
    ready: list[tuple[Tensor, dict[str, Any], Tensor]],
) -> Iterator[list[tuple[Tensor, dict[str, Any], Tensor]]]:
    """Small tensors together, up to a block of coordinates; others alone."""
    together: list[tuple[Tensor, dict[str, Any], Tensor]] = []
    total = 0
    for one in ready:
        size = one[0].numel()
        if size > BLOCK // 4:
            yield [one]
            continue
        if total + size > BLOCK:
            yield together
            together, total = [], 0
        together.append(one)
        total += size
    if together:
        yield together


def _fits(p: Tensor, group: dict[str, Any], largest: Tensor) -> bool:
    """Whether p can hold what is added to it: an update of the absolute value `largest` (), and the decay."""
    added = largest * float(group["lr"])
    if decay := float(group["lr"]) * group["weight_decay"] * group["alpha"]:
        added = added + decay * torch.linalg.vector_norm(p.to(largest.dtype), math.inf)
    return bool(added <= torch.finfo(p.dtype).max)


def _move(p: Tensor, group: dict[str, Any], state: State, update: Tensor) -> None:
    state["step"] += 1
    lr = float(group["lr"])
    decay = 1 - lr * group["weight_decay"] * group["alpha"]
    if p.dtype == update.dtype:
        (p if decay == 1 else p.mul_(decay)).add_(update.view(p.shape), alpha=-lr)
    else:
        p.copy_(p.to(update.dtype) * decay - lr * update.view(p.shape))


def step_flat(optimizer: Stepped, pairs: Pairs, device: torch.device, wide: torch.dtype) -> None:
    """All coordinates at once. What is skipped or warming up is masked; nothing is waited for."""
    params, groups = [p for p, _ in pairs], [group for _, group in pairs]
    states = [optimizer.state[p] for p in params]
    context = optimizer.context(params)
    sizes, of = [p.numel() for p in params], context.tensors

    def each(name: str, dtype: torch.dtype = wide) -> Tensor:
        return optimizer.constants([group[name] for group in groups], device, dtype)

    g = torch.cat([p.grad.reshape(-1).to(wide) for p in params])  # type: ignore[union-attr]
    keep = torch.stack(torch._foreach_norm(g.split(sizes), math.inf)) < LIMITS[wide]
    g = torch.where(keep[of], g * (1 - 2 * each("maximize"))[of], 0)
    steps = torch.stack([state["step"] for state in states])
    warm = steps < each("warmup", torch.int64)

    names = [name for name in states[0] if name not in ("step", SHARED)]
    old = {name: turned(torch.cat([state[name] for state in states], -1)).to(wide) for name in names}
    if SHARED in states[0]:
        old[SHARED] = states[0][SHARED].mT
    before = {**old, CLOCK: steps.to(wide)[of]}
    update, new = optimizer.rule.step(optimizer.weights_on(device, wide), before, g, context)
    warmed = optimizer.rule.warmup(before, g)
    update = torch.where(warm[of], each("warmup_lr")[of] * g, each("alpha")[of] * update)
    rates = [float(group["lr"]) for group in groups]
    added = torch.stack(torch._foreach_mul(torch._foreach_norm(update.split(sizes), math.inf), rates))
    decays = [lr * group["weight_decay"] * group["alpha"] for lr, group in zip(rates, groups, strict=True)]
    if any(decays):
        norms = [norm.to(wide) for norm in torch._foreach_norm(params, math.inf)]
        added = added + torch.stack(torch._foreach_mul(norms, decays))
    keep = keep & (added <= optimizer.constants([torch.finfo(p.dtype).max for p in params], device, wide))
    for name in names:
        its_keep, its_warm = (keep, warm) if name == PER_TENSOR else (keep[of], warm[of])
        if old[name].dim() > 1:
            its_keep, its_warm = its_keep.unsqueeze(-1), its_warm.unsqueeze(-1)
        result = torch.where(its_keep, torch.where(its_warm, warmed[name], new[name]), old[name])
        counts = [1] * len(sizes) if name == PER_TENSOR else sizes
        torch._foreach_copy_([state[name] for state in states], list(turned(result).split(counts, -1)))
    if SHARED in old:
        moved = torch.where(warm.all() | ~new[SHARED].isfinite().all(), old[SHARED], new[SHARED]).mT.contiguous()
        for state in optimizer.state.values():
            state[SHARED] = moved
    torch._foreach_add_([state["step"] for state in states], list(keep.to(torch.int64).unbind()))
    optimizer.count_skipped((~keep).sum())
    for p, lr, decay, one, kept in zip(params, rates, decays, update.split(sizes), keep.unbind(), strict=True):
        result = p.to(wide) * (1 - decay) - lr * one.view(p.shape)
        p.copy_(torch.where(kept, result, p.to(wide)))
