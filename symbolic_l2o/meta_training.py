"""Meta-training of a learner: a teacher's weights, or the coefficients of a rule (spec c.4, c.5, c.9)."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common.runs import generator
from symbolic_l2o.curriculum import Curriculum
from symbolic_l2o.imitation import demonstrate, imitation_loss
from symbolic_l2o.inner import begin, end_loss, run, run_window, scaled_gradient
from symbolic_l2o.meta_gradient import ForwardMode, meta_gradient
from symbolic_l2o.problems import Problem, random_scale
from symbolic_l2o.settings import MetaConfig

# First key of what is drawn: initial x, batches, coordinates, tricks; evaluation has streams of its own.
INIT, BATCH, COORDS, TRICK, EVAL = range(5)


class MetaTraining:
    """Epoch by epoch; each epoch is a run of `horizon` steps from a fresh start, in windows of `unroll`.

    Args:
        learner: a module with features, init_state and step (see `inner.Learner`); its parameters are trained.
        problem: the optimizee.
        options: of the training.
        seed: all that is drawn depends on it and on the epoch, nothing on global random state.
        validation: problem of the evaluations; `problem` if None.
    """

    def __init__(
        self,
        learner: Any,
        problem: Problem,
        options: MetaConfig,
        seed: int,
        validation: Problem | None = None,
    ) -> None:
        self.learner, self.problem, self.options, self.seed = learner, problem, options, seed
        self.validation = validation or problem
        self.parameters = [p for p in learner.parameters() if p.requires_grad]
        kind: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
        self.optimizer = kind(self.parameters, lr=options.lr)
        if options.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.parameters, lr=options.lr, momentum=0.9)
        self.imitator = torch.optim.Adam(self.parameters, lr=options.lr)
        self.curriculum = Curriculum(options.horizons) if options.horizons else None
        self.epochs, self.best, self.best_weights = 0, float("inf"), copy.deepcopy(learner.state_dict())
        self.history: list[float] = []

    @property
    def finished(self) -> bool:
        """Whether all epochs are done or the curriculum has stopped."""
        return self.epochs >= self.options.epochs or bool(self.curriculum and self.curriculum.stopped)

    def epoch(self) -> dict[str, float]:
        """One epoch; returns its mean loss, and the evaluation loss where one was due."""
        options, number = self.options, self.epochs
        if number == 0:
            self._start_evaluation()
        horizon = self.curriculum.horizon if self.curriculum else options.horizon
        stage = self.curriculum.index if self.curriculum else len(options.imitation) - 1
        chance = options.imitation[min(stage, len(options.imitation) - 1)]
        imitates = float(torch.rand((), generator=generator(self.seed, TRICK, number))) < chance
        if imitates:
            found = {"imitation_loss": self._imitate(horizon)}
        elif options.mode == "forward":
            found = {"loss": self._descend_forward(horizon)}
        else:
            found = {"loss": self._descend(horizon)}
        self.epochs += 1
        if self.epochs % options.evaluate_every == 0 or self.finished:
            found["evaluation"] = self._evaluate()
        return found

    def keep_best(self) -> float:
        """Put the best evaluated weights into the learner; returns their evaluation loss."""
        self.learner.load_state_dict(self.best_weights)
        return self.best

    def _descend(self, horizon: int) -> float:
        options, number = self.options, self.epochs
        scale = self._scale()
        path = begin(self.learner, self.problem, generator(self.seed, INIT, number), scale)
        losses = []
        for window in range(horizon // options.unroll):
            keys = (self.seed, BATCH, number)
            seen = run_window(
                self.learner,
                self.problem,
                path,
                options.unroll,
                keys,
                eta=options.eta,
                scale=scale,
                stale_tail=options.stale_tail,
            )
            coords = None
            if 0 < options.coords < self.problem.size:
                order = torch.randperm(self.problem.size, generator=generator(self.seed, COORDS, number, window))
                coords = order[: options.coords].to(path.x.device)
            found = meta_gradient(
                self.learner.step,
                self.parameters,
                seen.gradients,
                seen.features,
                seen.start,
                eta=options.eta,
                coords=coords,
                stale_tail=seen.stale_tail,
            )
            self._step(self.optimizer, found)
            losses.append(float(seen.losses.mean()))
        return sum(losses) / len(losses)

    def _descend_forward(self, horizon: int) -> float:
        """The same windows and gradient by forward mode; for a learner with one vector `theta` and `step_at`."""
        options, number = self.options, self.epochs
        scale = self._scale()
        path = begin(self.learner, self.problem, generator(self.seed, INIT, number), scale)
        theta = self.learner.theta
        mode = ForwardMode(self.learner.step_at, theta.detach(), path.x, path.state, options.eta)
        losses = []
        for step in range(horizon):
            loss, g = scaled_gradient(self.problem, path.x, (self.seed, BATCH, number, step, 0), scale)
            mode.see(g)
            path.x = path.x + options.eta * mode.step(self.learner.features(g, path.moments))
            losses.append(float(loss))
            if (step + 1) % options.unroll == 0:
                loss, g = scaled_gradient(self.problem, path.x, (self.seed, BATCH, number, step + 1, 1), scale)
                mode.see(g)
                losses.append(float(loss))
                self._step(self.optimizer, [mode.total])
                mode.restart(theta, path.x)
        return sum(losses) / len(losses)

    def _imitate(self, horizon: int) -> float:
        options, number = self.options, self.epochs
        rng, keys = generator(self.seed, INIT, number), (self.seed, BATCH, number)
        features, labels = demonstrate(self.learner, self.problem, horizon, rng, keys)
        if 0 < options.coords < self.problem.size:
            coords = torch.randperm(self.problem.size, generator=generator(self.seed, COORDS, number, 0))
            features, labels = features[:, coords[: options.coords]], labels[:, coords[: options.coords]]
        state, total = self.learner.init_state(labels[0]), 0.0
        for z, steps in zip(features.split(options.unroll), labels.split(options.unroll), strict=True):
            loss, state = imitation_loss(self.learner, z, steps, state, options.eta)
            self._step(self.imitator, list(torch.autograd.grad(loss, self.parameters)))
            total += float(loss.detach())
        return total

    def _scale(self) -> Tensor | None:
        bound = self.options.random_scale
        rng = generator(self.seed, TRICK, self.epochs, 1)
        return random_scale(self.problem.size, bound, rng).to(self.problem.images.device) if bound else None

    def _step(self, optimizer: torch.optim.Optimizer, found: list[Tensor]) -> None:
        for parameter, gradient in zip(self.parameters, found, strict=True):
            parameter.grad = gradient
        if self.options.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.options.clip)
        optimizer.step()

    # Evaluations: the same starts and batches every time

    def evaluation_loss(self, horizon: int) -> float:
        """Mean end loss of the present weights over `evaluation_runs` runs."""
        found = [
            end_loss(
                run(
                    self.learner,
                    self.validation,
                    horizon,
                    generator(self.seed, EVAL, INIT, number),
                    (self.seed, EVAL, BATCH, number),
                    self.options.eta,
                )[1]
            )
            for number in range(self.options.evaluation_runs)
        ]
        return sum(found) / len(found)

    def _start_evaluation(self) -> None:
        """The start counts as a candidate: training never returns worse."""
        horizon = self.curriculum.evaluation_horizon if self.curriculum else self.options.evaluation_horizon
        self.best = self.evaluation_loss(horizon)
        self.history.append(self.best)
        if self.curriculum:
            self.curriculum.baseline(self.best)

    def _evaluate(self) -> float:
        if self.curriculum is None:
            metric = self.evaluation_loss(self.options.evaluation_horizon)
            if metric < self.best:
                self._keep(metric)
        else:
            metric = self.evaluation_loss(self.curriculum.evaluation_horizon)
            advice = self.curriculum.record(metric)
            if advice == "save":
                self._keep(metric)
            elif advice == "advance":
                self.learner.load_state_dict(self.best_weights)
                self.best = self.evaluation_loss(self.curriculum.evaluation_horizon)
                self.curriculum.baseline(self.best)
        self.history.append(metric)
        return metric

    def _keep(self, metric: float) -> None:
        self.best, self.best_weights = metric, copy.deepcopy(self.learner.state_dict())

    # Snapshots

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on, as plain data."""
        return {
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "imitator": self.imitator.state_dict(),
            "best_weights": self.best_weights,
            "curriculum": self.curriculum.state_dict() if self.curriculum else {},
            **{name: getattr(self, name) for name in ("epochs", "best", "history")},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.learner.load_state_dict(state["learner"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.imitator.load_state_dict(state["imitator"])
        if self.curriculum:
            self.curriculum.load_state_dict(state["curriculum"])
        self.best_weights = state["best_weights"]
        self.epochs, self.best, self.history = state["epochs"], state["best"], list(state["history"])


def meta_train(
    learner: Any, problem: Problem, options: MetaConfig, seed: int = 0, validation: Problem | None = None
) -> list[float]:
    """Train `learner` in place and leave its best evaluated weights; returns the evaluation losses, the start's first.

    A horizon that is no multiple of unroll is refused by `MetaConfig` itself, with `ConfigError`.
    """
    training = MetaTraining(learner, problem, options, seed, validation)
    while not training.finished:
        training.epoch()
    training.keep_best()
    return training.history
