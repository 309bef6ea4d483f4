"""Learning rate of stage 1: the authors' linear warm-up and cosine."""

import math


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Factor on the learning rate before update number `step`.

    Args:
        step: from 0.
        warmup: updates over which it rises from 0 to 1.
        total: updates until the cosine has come down to 0; past them it rises again, as the authors' does.
    """
    if step < warmup:
        return step / max(warmup, 1)
    return (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))) / 2
