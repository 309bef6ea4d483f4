"""Meta-training of R replicates at once (Sec. 3, 4; spec c4 to c8), episode by episode.

Each replicate has its own weights, draws and schedule; those whose next episode is of the same kind run it together.
What one draws depends on the seed, its number and its own count of episodes only, so that it is the same alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from common.runs import generator
from optimizer_amalgamation.episode import begin, draw_scale
from optimizer_amalgamation.meta_gradient import meta_gradient
from optimizer_amalgamation.noisy_policy import make_policy
from optimizer_amalgamation.perturb import add, cgd, fgsm, pgd
from optimizer_amalgamation.problems import Problem
from optimizer_amalgamation.replicate import Replicate
from optimizer_amalgamation.rule import Context, Rule, Weights
from optimizer_amalgamation.schedules import ScheduleConfig
from optimizer_amalgamation.settings import MetaConfig, PerturbationConfig
from optimizer_amalgamation.unroll import Guide, Path, Policy, Reduce, unroll

TRAIN, VALIDATE, WEIGHTS, NOISE = range(4)  # second key of what is drawn
VALIDATION_INIT = 12345  # every validation begins at the same parameters
Teaching = Callable[[Sequence[int]], Sequence[Guide]]


class MetaTraining:
    """Meta-trains replicates of a rule on a problem.

    Args:
        problem: the optimizee.
        rule: what is trained.
        options: of the training.
        schedule: of every replicate.
        seed: all that is drawn depends on it.
        teaching: numbers of replicates -> their teachers; None for the meta loss only.
        reduce: over the teachers' distances.
        perturbation: of the weights.
    """

    def __init__(
        self,
        problem: Problem,
        rule: Rule,
        options: MetaConfig,
        schedule: ScheduleConfig,
        seed: int = 0,
        teaching: Teaching | None = None,
        reduce: Reduce = "max",
        perturbation: PerturbationConfig | None = None,
    ) -> None:
        self.problem, self.rule, self.options, self.seed = problem, rule, options, seed
        self.teaching, self.reduce = teaching, reduce
        self.noise = perturbation or PerturbationConfig()
        self.context = Context.of(problem.shapes, problem.inputs)
        self.replicates = [Replicate(number, self._fresh(number), schedule) for number in options.replicates]

    @property
    def finished(self) -> bool:
        """Whether all replicates are."""
        return all(one.schedule.finished for one in self.replicates)

    @property
    def fraction(self) -> float:
        """Of all work that is done, as `Schedule.fraction`."""
        return sum(one.schedule.fraction for one in self.replicates) / len(self.replicates)

    def episode(self) -> dict[str, float]:
        """One episode of the replicates whose turn it is: training's mean losses, or those of a validation."""
        group = self._group()
        first = group[0]
        plan, validating = first.schedule.plan, first.validating
        depth = plan.validation_depth if validating else plan.depth
        draws = [self._generator(one) for one in group]
        fresh = [self.problem.init(generator(VALIDATION_INIT) if validating else rng) for rng in draws]
        start = torch.stack(fresh).to(self.problem.inputs)
        scales = [draw_scale(self.problem.size, self.options.spread, rng) for rng in draws]
        scale = torch.stack(scales).to(start)
        teachers = self.teaching([one.number for one in group]) if self.teaching and not validating else ()
        warmup = self._rows(draws) if plan.warmup or validating else None
        path = begin(self.problem, self.rule, self.context, start, scale, teachers, warmup, self.options.warmup_rate)
        weight = torch.tensor([one.schedule.plan.imitation for one in group]).to(scale)
        nearest = torch.zeros(len(group), len(teachers)).to(scale)
        total, imitation, stopped = (torch.zeros(len(group)).to(scale) for _ in range(3))
        for number in range(depth):
            rows = self._rows(draws)
            if validating:
                found = self._validate(group, path, rows, scale, number)
            else:
                found = self._meta_step(group, path, rows, scale, teachers, weight, number)
            total, path = total + found.meta / depth, found.path
            imitation, nearest = imitation + found.imitation / depth, nearest + found.nearest / depth
            stopped = stopped + ~found.alive / depth
        if not validating:
            for one, meta, shares in zip(group, total.tolist(), nearest.tolist(), strict=True):
                one.history.append([meta, *shares])
        validations = self._count(group, total.tolist())
        share = nearest.mean(0).tolist()
        logged = {"meta_loss": float(total.mean()), "replicates": len(group), "depth": depth}
        if stopped.any():
            logged |= {"stopped": float(stopped.mean())}
        if bool((finite := imitation[imitation.isfinite()]).numel()) and teachers:
            logged |= {"imitation_loss": float(finite.mean())}
        if teachers:
            logged |= {f"nearest_{index}": value for index, value in enumerate(share)}
        return {**logged, **({"validation": sum(validations) / len(validations)} if validations else {})}

    def weights(self) -> Weights:
        """Of all replicates, (R, *shape) each."""
        return stacked(self.replicates)

    # One meta-step

    def _meta_step(
        self,
        group: Sequence[Replicate],
        path: Path,
        rows: Tensor,
        scale: Tensor,
        teachers: Sequence[Guide],
        weight: Tensor,
        number: int,
    ) -> Any:
        weights = stacked(group)
        policy = self._policy(group, len(rows), TRAIN, number, noisy=True)
        noise = self.noise

        def gradient(at: Weights) -> tuple[Any, Weights]:
            found = unroll(self.problem, policy, at, path, rows, scale, teachers, self.reduce)
            return found, meta_gradient(self.problem, policy, at, found, rows, scale, weight)

        delta = {name: torch.zeros_like(value) for name, value in weights.items()}
        for _ in range(noise.steps if noise.kind in ("fgsm", "pgd", "cgd") else 0):
            _, up = gradient(add(weights, delta))
            if noise.kind == "fgsm":
                delta = fgsm(delta, up, noise.magnitude)
            elif noise.kind == "pgd":
                delta = pgd(delta, up, noise.lr, noise.magnitude, noise.norm, batched=True)
            else:
                delta = cgd(delta, up, weights, noise.magnitude, noise.normalize, batched=True)
        found, grads = gradient(add(weights, delta))
        for index, one in enumerate(group):
            one.descend({name: value[index] for name, value in grads.items()}, self.options.lr)
        return found

    def _validate(self, group: Sequence[Replicate], path: Path, rows: Tensor, scale: Tensor, number: int) -> Any:
        policy = self._policy(group, len(rows), VALIDATE, number, noisy=self.noise.perturb_validation)
        return unroll(self.problem, policy, stacked(group), path, rows, scale, keep=False)

    def _policy(self, group: Sequence[Replicate], steps: int, what: int, number: int, noisy: bool) -> Policy:
        """The rule with its context and, where `noisy`, with noise drawn once for each step."""
        options = self.noise if noisy else PerturbationConfig()
        keys = [(self.seed, NOISE, one.number, what, one.episodes, one.episode, number) for one in group]
        rngs, training = [generator(*some) for some in keys], what == TRAIN
        return make_policy(self.rule, self.context, self.problem.shapes, options, steps, rngs, stacked(group), training)

    # Whose turn it is, and what is drawn for it

    def _group(self) -> list[Replicate]:
        """Unfinished replicates whose next episode is of one kind: that of the one with the fewest meta-steps."""

        def kind(one: Replicate) -> tuple[int, ...]:
            plan = one.schedule.plan
            return (1, plan.validation_depth) if one.validating else (0, plan.depth, plan.warmup)

        waiting = [one for one in self.replicates if not one.schedule.finished]
        first = min(waiting, key=lambda one: one.meta_steps + one.skipped)
        return [one for one in waiting if kind(one) == kind(first)]

    def _generator(self, one: Replicate) -> torch.Generator:
        """Validations of a replicate see the same draws every time."""
        if one.validating:
            return generator(self.seed, VALIDATE, one.number, one.episode)
        return generator(self.seed, TRAIN, one.number, one.episodes)

    def _rows(self, draws: Sequence[torch.Generator]) -> Tensor:
        rows = [self.problem.draw(self.options.unroll, rng) for rng in draws]
        return torch.stack(rows, 1).to(self.problem.labels.device)

    def _fresh(self, number: int) -> Weights:
        weights = self.rule.init(generator(self.seed, WEIGHTS, number))
        return {name: value.to(self.problem.inputs) for name, value in weights.items()}

    def _count(self, group: Sequence[Replicate], losses: Sequence[float]) -> list[float]:
        """Book an episode's losses; returns the validation losses of periods that have ended."""
        ended = []
        for one, loss in zip(group, losses, strict=True):
            options = one.schedule.options
            one.losses.append(loss)
            one.episode += 1
            one.episodes += not one.validating
            if one.episode == (options.validation_episodes if one.validating else options.episodes):
                if one.validating:
                    ended.append(one.finish_period())
                else:
                    one.training = sum(one.losses) / len(one.losses)
                one.validating, one.episode, one.losses = not one.validating, 0, []
        return ended

    # Snapshots

    def state_dict(self) -> dict[str, Any]:
        """All that the next episode depends on, as plain data."""
        return {"replicates": [one.state_dict() for one in self.replicates]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: of another number of replicates, or of another rule's; nothing is changed then.
        """
        found = state.get("replicates")
        if not isinstance(found, list) or len(found) != len(self.replicates):
            count = len(found) if isinstance(found, list) else "none"
            raise ValueError(f"a snapshot must have {len(self.replicates)} replicates, got {count}")
        for one, saved in zip(self.replicates, found, strict=True):
            one.check_state(saved)
        for one, saved in zip(self.replicates, found, strict=True):
            one.load_state_dict(saved)


def stacked(group: Sequence[Replicate]) -> Weights:
    """The weights of these replicates, (R, *shape) each."""
    return {name: torch.stack([one.weights[name] for one in group]) for name in group[0].weights}
