"""The efficient forms of sparse GAN training against the plain ones; where sparse inference wins on this processor.

Fails where masking in place is less than 5 times as fast as through a copy of the state dict, where moving the topology
takes more than 0.5 % of training at Delta T 500, or where the moments of MaskedAdam take more than 2 times the density.

python sparse_gan/benchmarks/sparse_step.py
"""

import copy
import sys
import warnings

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from common.bench import Ratio, conclude, interleaved, ratio
from common.masks import Masks
from sparse_gan.dynamic_sparsity import DynamicSparsity
from sparse_gan.hinge import discriminator_loss, generator_loss
from sparse_gan.masked_adam import MaskedAdam
from sparse_gan.models import build_discriminator, build_generator
from sparse_gan.pruning import sparse_masks
from sparse_gan.sparse_inference import compact, with_csr_kernels

THREADS = 1
REPEATS = 7
WIDTH, SIZE, BATCH, UPDATE_EVERY = 64, 32, 8, 500  # small batches make the share of moving look larger, not smaller
DENSITY_G = 0.05
LEAST_MASKING, MOST_MOVING, MOST_MEMORY = 5.0, 0.005, 2.0


def mask_through_a_copy(model: nn.Module, masks: Masks) -> None:
    """The plain form: copy the state dict, multiply, load it back."""
    state = copy.deepcopy(model.state_dict())
    for name, mask in masks.items():
        state[name] = state[name] * mask
    model.load_state_dict(state)


def training() -> list[Ratio]:
    """Of a training step."""
    torch.manual_seed(0)
    g, d = build_generator("sngan", WIDTH, SIZE), build_discriminator("sngan", WIDTH)
    masks_g = sparse_masks(g, DENSITY_G, "erk", torch.Generator().manual_seed(0))
    adam = torch.optim.Adam(g.parameters(), 1e-12, fused=True)
    masked_adam = MaskedAdam(g, masks_g, 1e-12)
    dynamics = {
        every: DynamicSparsity(g, adam, copy.deepcopy(masks_g), update_every=every, total_steps=10**9)
        for every in (1, 10**8)
    }
    z, real = torch.randn(BATCH, 128), torch.rand(BATCH, 3, SIZE, SIZE)

    def one_pass() -> None:
        discriminator_loss(*d(torch.cat([real, g(z).detach()])).chunk(2)).backward()

    def two_passes() -> None:
        discriminator_loss(d(real), d(g(z).detach())).backward()

    def whole_step() -> None:
        d.zero_grad()
        g.zero_grad()
        one_pass()
        d.requires_grad_(False)
        generator_loss(d(g(z))).backward()
        d.requires_grad_(True)

    whole_step()
    adam.step()
    masked_adam.step()
    spent = interleaved(
        {
            "whole step": whole_step,
            "two passes": two_passes,
            "one pass": one_pass,
            "mask through a copy": lambda: mask_through_a_copy(g, masks_g),
            "mask in place": dynamics[10**8].step,
            "mask in place and move": dynamics[1].step,
            "Adam": adam.step,
            "MaskedAdam": masked_adam.step,
        },
        REPEATS,
    )
    masking = ratio(spent, "mask through a copy", "mask in place")
    moving = ratio(spent, "mask in place and move", "whole step") / UPDATE_EVERY
    dense_bytes = sum(t.nbytes for s in adam.state.values() for k, t in s.items() if k != "step")
    dense_bytes -= sum(2 * p.nbytes for n, p in g.named_parameters() if n not in masks_g)
    sparse_bytes = masked_adam.state_bytes() - sum(2 * p.nbytes for n, p in g.named_parameters() if n not in masks_g)
    memory = sparse_bytes / dense_bytes / masks_g.density
    spent["Adam and mask"] = [a + b for a, b in zip(spent["Adam"], spent["mask in place"], strict=True)]
    return [
        Ratio("masking: through a copy of the state dict / weights and moments in place", masking, LEAST_MASKING),
        Ratio(f"moving the topology every {UPDATE_EVERY} steps / training", moving, most=MOST_MOVING),
        Ratio("optimiser step and masking: Adam / MaskedAdam", ratio(spent, "Adam and mask", "MaskedAdam")),
        Ratio("moments of the convolutions: MaskedAdam / Adam, over the density", memory, most=MOST_MEMORY),
        Ratio("discriminator: two passes / one", ratio(spent, "two passes", "one pass")),
    ]


def inference() -> None:
    """Time of a sparse generator's inference in two forms over that of dense convolutions, by density and batch."""
    table = Table(
        "density", "images", "compacted", "channels cut", "sparse matrices", title="inference, time over dense"
    )
    for density in (0.1, 0.05, 0.02, 0.01):
        torch.manual_seed(0)
        g = build_generator("sngan", WIDTH, SIZE).eval().requires_grad_(False)
        sparse_masks(g, density, "erk", torch.Generator().manual_seed(0)).apply_(g)
        small = compact(g)
        cut = sum(WIDTH - block.conv1.out_channels for block in small.blocks)  # type: ignore[union-attr, operator]
        forms: dict[str, nn.Module] = {"dense": g, "compacted": small, "csr": with_csr_kernels(g)}
        for images in (1, 16):
            z = torch.randn(images, 128)
            assert all(_close(net(z), g(z)) for net in forms.values())
            spent = interleaved({name: lambda net=net, z=z: net(z) for name, net in forms.items()}, REPEATS)  # type: ignore[misc]
            ratios = [f"{ratio(spent, name, 'dense'):.2f}" for name in ("compacted", "csr")]
            table.add_row(str(density), str(images), ratios[0], f"{cut} of {WIDTH * len(g.blocks)}", ratios[1])
    Console().print(table)


def _close(one: Tensor, two: Tensor) -> bool:
    return torch.allclose(one, two, atol=1e-4)


def main() -> int:
    """Print the tables; 1 where a ratio is not as it should be."""
    torch.set_num_threads(THREADS)
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    ratios = training()
    inference()
    return conclude(ratios)


if __name__ == "__main__":
    sys.exit(main())
