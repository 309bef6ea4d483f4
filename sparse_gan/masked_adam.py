"""Adam whose moments exist only for active weights: memory and work in proportion to the density (spec h).

The trajectory is that of Adam on all weights with masks over weights and moments after each step: an active weight's
update needs only its own gradient and moments, and an inactive weight is never touched.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim.adam import adam

from common.masks import Masks


class MaskedAdam(optim.Optimizer):
    """Adam over all parameters of `module`; those under a mask with gaps keep moments of their active entries only.

    Args:
        module: its weights are masked at once, in place.
        masks: by parameter name; a wrong name or shape raises ValueError.
        lr, betas, eps, weight_decay: as of `torch.optim.Adam`.
    """

    def __init__(
        self,
        module: nn.Module,
        masks: Masks,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.0, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr must be at least 0, got {lr}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        masks.apply_(module)
        # "fused" is what lets a loaded `step` follow its parameter to the GPU
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True}
        super().__init__(module.parameters(), defaults)
        self._active = {module.get_parameter(name): _active_entries(mask) for name, mask in masks.items()}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; active weights are gathered, updated together with all else in one fused call, and put back."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            actives = [self._active.get(p) for p in parameters]
            values = [_gather(p, active) for p, active in zip(parameters, actives, strict=True)]
            states = [self._state_of(p, value) for p, value in zip(parameters, values, strict=True)]
            adam(
                values,
                [_gather(p.grad, active) for p, active in zip(parameters, actives, strict=True)],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for parameter, active, value in zip(parameters, actives, values, strict=True):
                if active is not None:
                    flat = parameter.reshape(-1).index_copy_(0, active.long(), value)
                    if not parameter.is_contiguous():  # channels_last: `flat` is a copy
                        parameter.copy_(flat.view(parameter.shape))
        return loss

    @torch.no_grad()
    def set_mask(self, parameter: nn.Parameter, mask: Tensor, survivors: Tensor) -> None:
        """Give `parameter` another mask: `survivors` keep weight and moments, all else starts from zero."""
        old, new = self._active.get(parameter), _active_entries(mask)
        for key in ("exp_avg", "exp_avg_sq"):
            if key in self.state[parameter]:
                moment = self.state[parameter][key]
                whole = torch.zeros(mask.numel(), dtype=moment.dtype, device=moment.device)
                whole[slice(None) if old is None else old.long()] = moment.reshape(-1)
                whole.mul_(survivors.reshape(-1))
                if new is None:  # in the parameter's memory format
                    self.state[parameter][key] = torch.empty_like(parameter).copy_(whole.view(mask.shape))
                else:
                    self.state[parameter][key] = whole[new.long()]
        parameter.mul_(survivors)
        self._active[parameter] = new

    def state_dict(self) -> dict[str, Any]:
        """Of `torch.optim.Adam`, and "active": the positions the moments belong to, one tensor or None a parameter."""
        return {**super().state_dict(), "active": [self._active.get(p) for p in self._parameters()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on under the masks and moments of a `state_dict`, whatever the masks were; weights are saved apart.

        Raises ValueError where it is of another optimiser or of other parameters.
        """
        if "active" not in state_dict:
            raise ValueError(f"state_dict must be of a MaskedAdam, with active, got {sorted(state_dict)}")
        parameters, actives = self._parameters(), state_dict["active"]
        if len(parameters) != len(actives):
            raise ValueError(f"state_dict must be of {len(parameters)} parameters, got {len(actives)}")
        for number, (parameter, active) in enumerate(zip(parameters, actives, strict=True)):
            moment = state_dict["state"].get(number, {}).get("exp_avg")
            count = parameter.numel() if active is None else len(active)
            fits = moment is None or moment.numel() == count
            if not fits or (active is not None and len(active) and int(active.max()) >= parameter.numel()):
                raise ValueError(f"state_dict must fit parameter {number} of shape {tuple(parameter.shape)}")
        super().load_state_dict(state_dict)
        pairs = zip(parameters, actives, strict=True)
        self._active = {p: None if active is None else active.to(p.device) for p, active in pairs}

    def state_bytes(self) -> int:
        """Bytes of moments and of the positions they belong to."""
        moments = [t for state in self.state.values() for key, t in state.items() if key != "step"]
        positions = [active for active in self._active.values() if active is not None]
        return sum(tensor.nbytes for tensor in moments + positions)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _state_of(self, parameter: Tensor, value: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(value), torch.zeros_like(value)
        return state


def _active_entries(mask: Tensor) -> Tensor | None:
    """Flat positions of the ones, int32 (active,); None where there is no gap."""
    return None if mask.all() else mask.reshape(-1).nonzero().squeeze(1).int()


def _gather(tensor: Tensor, active: Tensor | None) -> Tensor:
    return tensor if active is None else tensor.reshape(-1).index_select(0, active)
