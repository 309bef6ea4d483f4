"""Binary masks over a network's weights: which weights can be pruned, scores to masks, and masked training.

Weights are masked in place. A surviving weight's update needs only its own value and gradient, so training equals, bit
for bit, the usual weight * mask parametrisation, with nothing left in the state dict and no product in the forward.
"""

from collections import UserDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn, optim

# Optimisers whose update of an entry depends on that entry alone: with a zero gradient, zero weight and zero state
# they leave it at zero, weight decay and momentum included, so that masking the gradient is enough.
ELEMENTWISE = (optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.RMSprop, optim.Adagrad)


def prunable_weights(model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Conv2d,)) -> dict[str, nn.Parameter]:
    """The `weight` of every module of the given kinds, by parameter name, in module order; never biases or norms."""
    of_kinds = (name for name, module in model.named_modules() if isinstance(module, kinds))
    names = [f"{name}.weight".removeprefix(".") for name in of_kinds]
    if not names:
        raise ValueError(f"model must have a weight to prune in {[kind.__name__ for kind in kinds]}, got none")
    return {name: model.get_parameter(name) for name in names}


class Masks(UserDict[str, Tensor]):
    """Parameter name -> bool tensor, True where the weight is kept. Refuses anything else the moment it is set.

    Values of 0 and 1 of any dtype are taken as bool. Raises ValueError naming the mask otherwise.
    """

    def __setitem__(self, name: str, mask: Tensor) -> None:
        if not isinstance(mask, Tensor):
            raise ValueError(f"mask {name} must be a tensor, got {type(mask).__name__}")
        if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"mask {name} must hold only 0 and 1, got values in [{mask.min()}, {mask.max()}]")
        super().__setitem__(name, mask.detach().bool())

    @classmethod
    def ones_like(cls, weights: Mapping[str, Tensor]) -> "Masks":
        """Masks that keep every one of `weights`."""
        return cls({name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()})

    @property
    def kept(self) -> int:
        """Number of weights kept."""
        return sum(int(mask.sum()) for mask in self.values())

    @property
    def total(self) -> int:
        """Number of weights under a mask."""
        return sum(mask.numel() for mask in self.values())

    @property
    def density(self) -> float:
        """kept / total; 1 - sparsity."""
        return self.kept / self.total

    @property
    def sparsity(self) -> float:
        """Fraction of masked-out weights."""
        return 1 - self.density

    def state_dict(self) -> dict[str, Tensor]:
        """The masks as plain data for a checkpoint; `Masks(state)` reads it back."""
        return dict(self)

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        parameters = dict(model.named_parameters())
        for name, mask in self.items():
            if name not in parameters:
                raise ValueError(f"mask {name} must name a parameter of the model, got none of that name")
            if parameters[name].shape != mask.shape:
                raise ValueError(f"mask {name} must be {tuple(parameters[name].shape)}, got {tuple(mask.shape)}")
        return {name: parameters[name] for name in self}

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Set the masked-out weights of `model` to zero, in place. Raises ValueError on a wrong name or shape."""
        for name, parameter in self._parameters(model).items():
            parameter.mul_(self[name].to(parameter.device))

    def attach(self, model: nn.Module, optimizer: optim.Optimizer) -> Callable[[], None]:
        """Keep masked-out weights, their gradients and their optimiser state at exactly zero from now on.

        Gradients are masked as `backward` accumulates them: in cache, and before clipping looks at their norm.
        Optimisers that mix entries (Muon, Adafactor, LBFGS, unknown ones) are followed up after each step.

        Args:
            model: its named parameters carry these masks.
            optimizer: any torch optimiser over these parameters; its present state is masked too.

        Returns:
            A function that detaches again; the weights stay as they are.
        """
        multipliers: dict[Tensor, Tensor] = {p: self[name].to(p) for name, p in self._parameters(model).items()}

        @torch.no_grad()
        def mask_all(*_: Any) -> None:
            for parameter, multiplier in multipliers.items():
                state = optimizer.state.get(parameter, {}).values()
                for tensor in (parameter, parameter.grad, *state):
                    if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
                        tensor.mul_(multiplier)

        def mask_gradient(parameter: Tensor) -> None:
            if parameter.grad is not None:
                parameter.grad.mul_(multipliers[parameter])

        mask_all()
        hooks = [parameter.register_post_accumulate_grad_hook(mask_gradient) for parameter in multipliers]
        if type(optimizer) not in ELEMENTWISE:
            hooks.append(optimizer.register_step_post_hook(mask_all))

        def detach() -> None:
            for hook in hooks:
                hook.remove()

        return detach


def keep_top(scores: Mapping[str, Tensor], keep: int, within: Mapping[str, Tensor] | None = None) -> Masks:
    """Keep exactly `keep` entries of the highest score over all tensors together (one global threshold).

    Among equal scores the entry that comes first (tensor order, then flattened index) is pruned first.

    Args:
        scores: real tensors by name; -inf is allowed, NaN raises ValueError.
        keep: from 0 to the number of candidates, else ValueError.
        within: only entries True here are candidates (nested masks); all if None.
    """
    for name, score in scores.items():
        if score.isnan().any():
            raise ValueError(f"score {name} must not hold NaN, got {int(score.isnan().sum())}")
    # kthvalue is linear in the entries; ties at the threshold are then dropped by index, so the count is exact.
    flat = torch.cat([score.detach().reshape(-1) for score in scores.values()])
    candidates = torch.cat([within[name].reshape(-1).to(flat.device) for name in scores]) if within else None
    values = flat[candidates] if candidates is not None else flat
    if not 0 <= keep <= len(values):
        raise ValueError(f"keep must be in [0, {len(values)}], got {keep}")
    threshold = values.kthvalue(len(values) - keep + 1).values if keep else torch.inf
    chosen = values >= threshold if keep else torch.zeros_like(values, dtype=torch.bool)
    if surplus := int(chosen.sum()) - keep:
        chosen[(values == threshold).nonzero().squeeze(1)[:surplus]] = False
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[... if candidates is None else candidates] = chosen
    parts = kept.split([score.numel() for score in scores.values()])
    return Masks({name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)})


def keep_top_per_layer(
    scores: Mapping[str, Tensor], keep: Mapping[str, int], within: Mapping[str, Tensor] | None = None
) -> Masks:
    """`keep_top` within each tensor: exactly keep[name] entries of scores[name]."""
    layers = (keep_top({n: s}, keep[n], {n: within[n]} if within else None) for n, s in scores.items())
    return Masks({name: mask for layer in layers for name, mask in layer.items()})


def random_scores(weights: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Uniform scores in [0, 1), drawn on the CPU from `generator`, so that every device gets the same."""
    return {name: torch.rand(weight.shape, generator=generator).to(weight.device) for name, weight in weights.items()}


def saliency_scores(weights: Mapping[str, Tensor], gradients: Iterable[Tensor]) -> dict[str, Tensor]:
    """|w * dL/dw|: SNIP's |dL/dmask| at mask 1 (Lee et al. 2019, Eq. 3) and first-order Taylor pruning alike."""
    pairs = zip(weights.items(), gradients, strict=True)
    return {name: (weight.detach() * gradient).abs() for (name, weight), gradient in pairs}


def erk_densities(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """Erdős–Rényi-kernel density of each layer, min(1, eps * sum(shape) / prod(shape)) (Evci et al. 2020, Sec. 3).

    eps makes the mean over all weights equal `density`; a layer that would pass 1 is dense, the others share the rest.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    sizes = {name: float(torch.Size(shape).numel()) for name, shape in shapes.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        sparse = [name for name in shapes if name not in dense]
        if not sparse:
            return dict.fromkeys(shapes, 1.0)
        budget = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        eps = budget / sum(raw[name] * sizes[name] for name in sparse)
        over = [name for name in sparse if eps * raw[name] > 1]
        if not over:
            return {name: 1.0 if name in dense else eps * raw[name] for name in shapes}
        dense.update(over)  # eps only grows as layers leave, so that none of them comes back below 1
