"""A GAN in training: two players, the moving averages of the generator, and how each method makes them sparse.

Most methods train in one phase. One-shot pruning adds a phase of fine-tuning, iterative pruning one a round.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common import distributed
from common.data import ImageSet, in_order
from common.masks import Masks
from common.runs import generator, seed_everything
from sparse_gan.balance import EVERY, balance_ratio, changed_masks, density_change
from sparse_gan.dynamic_sparsity import DynamicSparsity
from sparse_gan.hinge import discriminator_loss, generator_loss
from sparse_gan.images import channels_of, prepare
from sparse_gan.models import Discriminator, Generator, build_discriminator, build_generator
from sparse_gan.players import Player
from sparse_gan.pruning import convolution_weights, gradual_density, magnitude_masks, snip_masks, sparse_masks
from sparse_gan.settings import Config
from sparse_gan.sparse_ema import SparseEMA

KEPT_A_ROUND = 0.8  # iterative magnitude pruning


def phase_lengths(config: Config) -> list[int]:
    """Generator steps of each phase."""
    sparsity, steps = config.sparsity, config.train.steps
    if sparsity.method == "oneshot":
        return [steps, sparsity.tune_steps]
    return [steps] * (sparsity.rounds + 1 if sparsity.method == "imp" else 1)


def rounds_to(density: float) -> int:
    """Rounds of iterative pruning, at least one, that end at `density`; the last may prune less than the others."""
    return max(math.ceil(math.log(density) / math.log(KEPT_A_ROUND) - 1e-9), 1)


def build_networks(config: Config, channels: int, classes: int) -> tuple[Generator, Discriminator]:
    """Both networks of the configuration, drawn from its seed."""
    model = config.model
    seed_everything(config.seed)
    g = build_generator(model.name, model.width_g, model.size, channels, classes, model.z_dim)
    return g, build_discriminator(model.name, model.width_d, channels, classes)


def draw_noise(count: int, z_dim: int, classes: int, *keys: int) -> tuple[Tensor, Tensor]:
    """What images are generated from: z (count, z_dim) and classes (count,), drawn on the CPU from `keys`."""
    draws = generator(*keys)
    return torch.randn(count, z_dim, generator=draws), torch.randint(classes, (count,), generator=draws)


class Game:
    """Players `g` and `d`, `average` and, where the generator's topology moves, the plain `masked_average`."""

    def __init__(self, config: Config, data: ImageSet, device: torch.device) -> None:
        self.config, self.phase = config, 0
        self._turns = 0  # generator steps
        self._ratios: list[float] = []  # of balance, since the discriminator's density was last looked at
        self._device = device
        g, d = build_networks(config, channels_of(data), data.classes)
        if distributed.world_size() > 1 and device.type == "cuda":
            g = torch.nn.SyncBatchNorm.convert_sync_batchnorm(g)
        self._rewind: dict[str, Any] | None = None
        self._networks = g.to(device), d.to(device)
        self._start(*self._first_masks(data))

    def discriminate(
        self,
        real: Tensor,
        labels: Tensor,
        z: Tensor,
        fake_labels: Tensor,
        lr_factor: float,
        check: Callable[[float], None] = lambda loss: None,
    ) -> float:
        """One discriminator step; returns its loss, which `check` may refuse before anything moves.

        Real and generated images go through in one batch.
        """
        with torch.no_grad():
            fake = self.g.module(z, fake_labels)
        scores = self.d.module(torch.cat([real, fake]), torch.cat([labels, fake_labels]))
        loss = discriminator_loss(*scores.chunk(2))
        check(loss.item())
        self.d.descend(loss, lr_factor)
        self._real = real, labels
        return loss.item()

    def generate(
        self, z: Tensor, labels: Tensor, lr_factor: float, check: Callable[[float], None] = lambda loss: None
    ) -> float:
        """One generator step and what follows it; returns its loss, which `check` may refuse before anything moves.

        The discriminator's weights need no gradient.
        """
        self.d.module.requires_grad_(False)
        loss = generator_loss(self.d.module(self.g.module(z, labels), labels))
        check(loss.item())
        self.g.descend(loss, lr_factor)
        if self.config.sparsity.balance:
            self._balance(z, labels, -loss.item())
        self.d.module.requires_grad_(True)
        return loss.item()

    @torch.no_grad()
    def _balance(self, z: Tensor, labels: Tensor, before: float) -> None:
        """Measure the balance ratio every few steps; change the discriminator's density where it is due.

        Measuring leaves no trace: running statistics and singular vectors are put back.
        """
        sparsity, d = self.config.sparsity, self.d.module
        self._turns += 1
        if self._turns % EVERY == 0:
            buffers = [buffer for network in self._networks for buffer in network.buffers()]
            kept = [buffer.clone() for buffer in buffers]
            after, real = d(self.g.module(z, labels), labels).mean(), d(*self._real).mean()
            for buffer, value in zip(buffers, kept, strict=True):
                buffer.copy_(value)
            means = (distributed.mean(score) for score in (real.item(), before, after.item()))
            self._ratios.append(balance_ratio(*means))
        if self._turns % sparsity.balance_every == 0:
            change = density_change(self._ratios, sparsity.balance)
            self._ratios = []
            if change:
                weights = {name: d.get_parameter(name) for name in self.d.masks}
                gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
                self.d.go_on_under(changed_masks(weights, gradients, self.d.masks, change))

    def follow(self, step: int) -> None:
        """After generator step `step` (from 1) of the phase: gradual pruning, moving averages, weights to rewind to."""
        sparsity = self.config.sparsity
        if sparsity.method == "gmp" and step % sparsity.update_every == 0:
            density = gradual_density(step, self.config.train.steps, sparsity.density_g)
            self.g.go_on_under(magnitude_masks(self.g.module, density, "global", self.g.masks))
        for average in self.averages.values():
            average.update()
        if sparsity.method == "imp" and self.phase == 0 and step == sparsity.rewind_step:
            self._keep_for_rewinding()

    def enter(self, phase: int) -> None:
        """Begin phase 1, 2, ... of one-shot or iterative pruning from the weights at the end of the one before."""
        sparsity = self.config.sparsity
        g, d = self._networks
        both = sparsity.prune == "both"
        self.phase = phase
        if sparsity.method == "oneshot":
            masks_g = magnitude_masks(g, sparsity.density_g, sparsity.scope)
            masks_d = magnitude_masks(d, sparsity.density_d, sparsity.scope) if both else Masks()
        else:
            density_g, density_d = (max(KEPT_A_ROUND**phase, end) for end in (sparsity.density_g, sparsity.density_d))
            masks_g = magnitude_masks(g, density_g, "global", self.g.masks or None)
            masks_d = magnitude_masks(d, density_d, "global", self.d.masks or None) if both else Masks()
            assert self._rewind is not None
            g.load_state_dict(self._rewind["g"])
            d.load_state_dict(self._rewind["d"])
        self._start(masks_g, masks_d)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        averages = {name: average.state_dict() for name, average in self.averages.items()}
        players = {"g": self.g.state_dict(), "d": self.d.state_dict()}
        balance = {"turns": self._turns, "ratios": list(self._ratios)}
        return {"phase": self.phase, "rewind": self._rewind, "balance": balance, "averages": averages, **players}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set back to a `state_dict` of a game of the same configuration."""
        self.phase, self._rewind = state["phase"], state["rewind"]
        self._turns, self._ratios = state["balance"]["turns"], list(state["balance"]["ratios"])
        if self.phase:
            masks = ({n: mask.to(self._device) for n, mask in state[name]["masks"].items()} for name in ("g", "d"))
            self._start(*map(Masks, masks))
        self.g.load_state_dict(state["g"])
        self.d.load_state_dict(state["d"])
        for name, average in self.averages.items():
            average.load_state_dict(state["averages"][name])

    def _start(self, masks_g: Masks, masks_d: Masks) -> None:
        """Fresh players and averages under these masks."""
        sparsity, options = self.config.sparsity, self.config.train
        betas = (options.beta1, options.beta2)
        dense_moments = sparsity.moments == "dense"
        players = []
        for name, module, masks, growth, turns, lr in (
            ("g", self._networks[0], masks_g, sparsity.growth_g, 1, options.lr_g),
            ("d", self._networks[1], masks_d, sparsity.growth_d, options.n_dis, options.lr_d),
        ):
            explores = sparsity.method == "dynamic" and sparsity.explore in (name, "both")
            total = options.steps * turns
            dynamic = partial(
                DynamicSparsity,
                update_every=sparsity.update_every * turns if explores else total,
                total_steps=total,
                drop_fraction=sparsity.drop_fraction,
                drop_end=sparsity.drop_end,
                growth=growth,
                regrown=sparsity.regrown,
                moments=sparsity.moments,
                seed=self.config.seed,
            )
            needed = explores or dense_moments
            player = Player(module, masks, lr, betas, dynamic if needed else None, dense_moments, self.phase > 0)
            player.require_equal_masks()
            players.append(player)
        self.g, self.d = players
        kinds = {"average": "sparse"}
        if sparsity.method == "dynamic" and sparsity.explore != "d":
            kinds["masked_average"] = "masked"
        self.averages = {
            name: SparseEMA(self.g.module, self.g.masks, options.ema, options.ema_start, kind)  # type: ignore[arg-type]
            for name, kind in kinds.items()
        }
        if sparsity.method == "imp" and self.phase == 0 and sparsity.rewind_step == 0:
            self._keep_for_rewinding()

    def _first_masks(self, data: ImageSet) -> tuple[Masks, Masks]:
        sparsity, seed = self.config.sparsity, self.config.seed
        g, d = self._networks
        if sparsity.method in ("static", "dynamic"):
            masks_g = sparse_masks(g, sparsity.density_g, sparsity.distribution, generator(seed, 3))
            return masks_g, sparse_masks(d, sparsity.density_d, sparsity.distribution, generator(seed, 4))
        if sparsity.method == "snip":
            return self._snip(data)
        if sparsity.method == "gmp":
            return Masks.ones_like(convolution_weights(g)), Masks()
        return Masks(), Masks()

    def _snip(self, data: ImageSet) -> tuple[Masks, Masks]:
        """By saliency of each network for its own loss on one batch, the same on every rank."""
        options, seed = self.config.train, self.config.seed
        g, d = self._networks
        rows = torch.randperm(len(data), generator=generator(seed, 5))[: options.batch_size]
        raw, labels = next(in_order(data.subset(rows), len(rows)))
        real, labels = prepare(raw, self.config.model.size).to(self._device), labels.to(self._device)
        noise = draw_noise(len(rows), self.config.model.z_dim, data.classes, seed, 6)
        z, fake_labels = (part.to(self._device) for part in noise)

        def loss_d() -> Tensor:
            scores = d(torch.cat([real, g(z, fake_labels)]), torch.cat([labels, fake_labels]))
            return discriminator_loss(*scores.chunk(2))

        masks_g = snip_masks(
            g, self.config.sparsity.density_g, lambda: generator_loss(d(g(z, fake_labels), fake_labels))
        )
        return masks_g, snip_masks(d, self.config.sparsity.density_d, loss_d)

    def _keep_for_rewinding(self) -> None:
        g, d = ({name: t.clone() for name, t in net.state_dict().items()} for net in self._networks)
        self._rewind = {"g": g, "d": d}
