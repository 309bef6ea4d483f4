"""The optimisers to import: learnt ones with their weights, and the pool's members (spec g)."""

from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from optimizer_amalgamation.choice import ChoiceRule
from optimizer_amalgamation.lstm import dense
from optimizer_amalgamation.pool import LARGE_CHOICE, Pool, Teacher
from optimizer_amalgamation.rule import Context, State, Weights
from optimizer_amalgamation.rule_optimizer import RuleOptimizer
from optimizer_amalgamation.scale import ScaleRule
from optimizer_amalgamation.stepping import wide_type
from optimizer_amalgamation.students import OriginalRule, StudentRule
from optimizer_amalgamation.weights import Source, load_weights


class Options(TypedDict, total=False):
    """What all optimisers here understand: see `RuleOptimizer`."""

    lr: float
    warmup: int
    warmup_lr: float
    weight_decay: float
    state_dtype: torch.dtype | None
    impl: str
    maximize: bool


class AmalgamatedOptimizer(RuleOptimizer):
    """The student RNNProp with learnt weights; 82 floats of state a coordinate.

    Args:
        weights: a shipped name, a path, or its eight tensors by name in Keras's layout.
        alpha: largest update of a step.
        betas, eps: of the averages that the LSTM sees; those that it was trained with.

    The others, and the errors: see `RuleOptimizer`; ValueError too for betas, eps and weights.
    """

    def __init__(
        self,
        params: Any,
        weights: Source = "choice-large",
        *,
        alpha: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-10,
        **options: Unpack[Options],
    ) -> None:
        rule = StudentRule(1.0, betas, eps)
        super().__init__(params, rule, load_weights(weights, rule.shapes), alpha=alpha, **options)


class ChoiceOptimizer(RuleOptimizer):
    """The choice policy itself: a learnt mixture of the pool's updates. See `RuleOptimizer` and `ChoiceRule`."""

    rule: ChoiceRule

    def __init__(
        self,
        params: Any,
        weights: Source,
        pool: Pool = LARGE_CHOICE,
        *,
        hardness: float = 0.0,
        multiplier: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        rule = ChoiceRule(pool, hardness, multiplier)
        super().__init__(params, rule, load_weights(weights, rule.shapes), **options)

    @torch.no_grad()
    def choices(self) -> dict[int, Tensor]:
        """Mean choice (k,) of the last step over each parameter's coordinates, by its number in `state_dict`.

        Parameters that have not moved yet are left out.
        """
        found = {}
        for number, p in enumerate(p for group in self.param_groups for p in group["params"]):
            if state := self.state.get(p):
                h = state["h1"].mT.to(wide_type(p))
                logits = dense(self.weights_on(h.device, h.dtype), "choice", h)
                found[number] = self.rule.soft_choice(logits, None).mean(0)
        return found


class LearnedGD(RuleOptimizer):
    """The first learnt optimiser, `OriginalRule`. See `RuleOptimizer`."""

    def __init__(
        self,
        params: Any,
        weights: Source,
        *,
        alpha: float = 0.1,
        **options: Unpack[Options],
    ) -> None:
        rule = OriginalRule(1.0)
        super().__init__(params, rule, load_weights(weights, rule.shapes), alpha=alpha, **options)


class ScaleOptimizer(RuleOptimizer):
    """The hierarchical optimiser, `ScaleRule`: its tensors see each other, across groups. See `RuleOptimizer`.

    Raises:
        ValueError: for parameters on several devices, or some in double precision, or another impl than flat.
    """

    def __init__(self, params: Any, weights: Source, **options: Unpack[Options]) -> None:
        if options.setdefault("impl", "flat") != "flat":
            raise ValueError(f"impl must be 'flat', got {options['impl']!r}")
        rule = ScaleRule()
        super().__init__(params, rule, load_weights(weights, rule.shapes), **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Raises as the class."""
        super().add_param_group(param_group)
        kinds = {(p.device, wide_type(p)) for group in self.param_groups for p in group["params"]}
        if len(kinds) > 1:
            self.param_groups.pop()
            raise ValueError(f"parameters must be on one device and of one precision, got {sorted(map(str, kinds))}")


class PoolRule:
    """A teacher of rate 1 as a rule without weights."""

    def __init__(self, teacher: Teacher) -> None:
        self.pool = Pool((teacher,))
        self.shapes: dict[str, tuple[int, ...]] = {}

    def init(self, generator: torch.Generator | None = None, replicates: int | None = None) -> Weights:
        """No weights."""
        return {}

    def zero_state(self, like: Tensor, context: Context | None = None) -> State:
        """See `Rule`."""
        return self.pool.zero_state(like)

    def warmup(self, state: State, grad: Tensor) -> State:
        """See `Rule`."""
        return {**state, **self.pool.advance(state, grad)}

    def step(
        self, weights: Weights, state: State, grad: Tensor, context: Context | None = None
    ) -> tuple[Tensor, State]:
        """See `Rule`."""
        updates, state = self.pool.step(state, grad)
        return updates[0], state


class PoolOptions(TypedDict, total=False):
    """What the pool's members understand besides their own: see `RuleOptimizer`."""

    weight_decay: float
    maximize: bool


class _PoolOptimizer(RuleOptimizer):
    def __init__(self, params: Any, lr: float, teacher: Teacher, options: PoolOptions) -> None:
        super().__init__(params, PoolRule(teacher), {}, lr=lr, warmup=0, **options)


def _two(betas: tuple[float, float]) -> tuple[float, float]:
    if len(betas) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    return betas


class PoolSGD(_PoolOptimizer):
    """u = lr g."""

    def __init__(self, params: Any, lr: float = 0.2, **options: Unpack[PoolOptions]) -> None:
        super().__init__(params, lr, Teacher("sgd", 1.0), options)


class PoolMomentum(_PoolOptimizer):
    """u = lr m, m the moving average: a tenth of torch's momentum at beta 0.9."""

    def __init__(self, params: Any, lr: float = 0.5, *, beta: float = 0.9, **options: Unpack[PoolOptions]) -> None:
        super().__init__(params, lr, Teacher("momentum", 1.0, beta1=beta), options)


class PoolRMSProp(_PoolOptimizer):
    """u = lr g / sqrt(r + eps)."""

    def __init__(
        self, params: Any, lr: float = 0.005, *, rho: float = 0.9, eps: float = 1e-10, **options: Unpack[PoolOptions]
    ) -> None:
        super().__init__(params, lr, Teacher("rmsprop", 1.0, eps, rho=rho), options)


class PoolAdam(_PoolOptimizer):
    """Adam with the constants 1 - beta in place of 1 - beta^t: its step rises to 2.06 lr and decays to 0.32 lr."""

    def __init__(
        self,
        params: Any,
        lr: float = 0.005,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-10,
        **options: Unpack[PoolOptions],
    ) -> None:
        super().__init__(params, lr, Teacher("adam", 1.0, eps, *_two(betas)), options)


class _SignOptimizer(_PoolOptimizer):
    name: str

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-10,
        adaptive: bool = False,
        **options: Unpack[PoolOptions],
    ) -> None:
        name = f"ada{self.name}" if adaptive else self.name
        super().__init__(params, lr, Teacher(name, 1.0, eps, *_two(betas)), options)


class PowerSign(_SignOptimizer):
    """u = lr exp(a) g, a in [-1, 1] the agreement of gradient and average; `adaptive`: over sqrt(v + eps)."""

    name = "powersign"


class AddSign(_SignOptimizer):
    """u = lr (1 + a) g; see `PowerSign`."""

    name = "addsign"
