"""Lazy values over pixels: what a very sparse network in eval mode really has to compute.

Every value is max(floor, const + matrix @ rows) with a sparse matrix over the pixels computed so far, the rows. Sums,
slices, constants and activations only rewrite matrix, const and floor. Pixels are computed when a convolution, or a sum
with something else, reads rectified ones; in the end rows that nothing reads are dropped.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from backdoor_lth.traced import UnsupportedError

Matrix = Any  # scipy.sparse.csr_array, which has no types
MOST_ENTRIES = 2**25
"""of all matrices together, some 50 bytes each while a program is made; past it channels are cheaper"""


@dataclass
class Lazy:
    """max(floor, const + matrix @ rows) of one image, flat: matrix (size, rows), const and floor (size,)."""

    shape: tuple[int, ...]
    matrix: Matrix
    const: np.ndarray
    floor: np.ndarray


class Pixels:
    """The rows computed so far, in steps. Methods do one operation of the network each, on lazy values.

    They raise `UnsupportedError` once there are more than `MOST_ENTRIES`.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.inputs = self.rows = int(np.prod(shape))
        self.entries = 0
        self.steps: list[tuple[Matrix, np.ndarray]] = []
        self.input = Lazy(shape, csr(sparse.eye_array(self.rows)), np.zeros(self.rows), np.full(self.rows, -np.inf))

    def linear(self, x: Lazy, shape: tuple[int, ...], weight: Matrix, bias: np.ndarray | float = 0.0) -> Lazy:
        """weight (outputs, inputs) @ x + bias."""
        floor = np.full(weight.shape[0], -np.inf)
        entries = np.diff(weight.indptr)
        if entries.max(initial=0) <= 1 and (weight.data == 1).all():  # nothing but pixels put elsewhere
            floor[entries == 1] = x.floor[weight.indices]
        else:
            self._compute(x, np.unique(weight.indices))
        return self._lazy(shape, csr(weight @ self._wide(x)), weight @ x.const + bias, floor + bias)

    def add(self, x: Lazy, y: Lazy) -> Lazy:
        """x + y, of equal shapes."""
        for one, other in ((x, y), (y, x)):  # a floor stays only beside a constant
            self._compute(one, np.flatnonzero(np.diff(other.matrix.indptr)))
        floor = np.maximum(x.floor + y.const, y.floor + x.const)
        return self._lazy(x.shape, csr(self._wide(x) + self._wide(y)), x.const + y.const, floor)

    def cat(self, parts: list[Lazy]) -> Lazy:
        """Side by side along the channels."""
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        matrix = csr(sparse.vstack([self._wide(part) for part in parts]))
        const, floor = (np.concatenate([getattr(part, name) for part in parts]) for name in ("const", "floor"))
        return self._lazy(shape, matrix, const, floor)

    def relu(self, x: Lazy) -> Lazy:
        """max(x, 0); without a floor where that changes nothing."""
        matrix, floor = self._wide(x), np.maximum(x.floor, 0)
        signed = (matrix.data < 0) | (matrix.indices < self.inputs)  # rows are at least 0, but inputs may be anything
        pixel = np.repeat(np.arange(len(floor)), np.diff(matrix.indptr))
        above = np.bincount(pixel[signed], minlength=len(floor)) == 0  # then the least value is the constant
        constant = np.diff(matrix.indptr) == 0
        const = np.where(constant, np.maximum(x.const, floor), x.const)
        return self._lazy(x.shape, matrix.copy(), const, np.where(above & (const >= floor), -np.inf, floor))

    def _lazy(self, shape: tuple[int, ...], matrix: Matrix, const: np.ndarray, floor: np.ndarray) -> Lazy:
        self.entries += matrix.nnz
        bounded(self.entries)
        return Lazy(shape, matrix, const, floor)

    def _compute(self, x: Lazy, pixels: np.ndarray) -> None:
        """A step for those of these pixels that have a floor: max(floor, v) = floor + relu(v - floor)."""
        pixels = pixels[x.floor[pixels] > -np.inf]
        if not len(pixels):
            return
        self.steps.append((csr(self._wide(x)[pixels]), x.const[pixels] - x.floor[pixels]))
        others = np.ones(len(x.const))
        others[pixels] = 0
        places = (pixels, self.rows + np.arange(len(pixels)))
        self.rows += len(pixels)
        fresh = sparse.csr_array((np.ones(len(pixels)), places), shape=(len(others), self.rows))
        x.matrix = csr(sparse.diags_array(others) @ self._wide(x) + fresh)
        x.const = np.where(others, x.const, x.floor)
        x.floor = np.where(others, x.floor, -np.inf)

    def _wide(self, x: Lazy) -> Matrix:
        """Its matrix with a column for every row there is."""
        x.matrix.resize((len(x.const), self.rows))
        return x.matrix

    def program(self, output: Lazy) -> list[tuple[Matrix, np.ndarray]]:
        """The steps that the output needs, with the rows that it needs; the last one, not rectified, is the output."""
        self._compute(output, np.arange(len(output.const)))
        steps = [*self.steps, (self._wide(output), output.const)]
        starts = self.inputs + np.cumsum([0, *(len(const) for _, const in steps)])
        used = np.zeros(starts[-1], dtype=bool)
        used[: self.inputs] = used[starts[-2] :] = True
        for start, (matrix, const) in zip(starts[-2::-1], steps[::-1], strict=True):
            used[matrix[used[start : start + len(const)]].indices] = True
        places = np.cumsum(used) - 1
        needed = []
        for start, (matrix, const) in zip(starts, steps, strict=False):
            own = used[start : start + len(const)]
            if own.any():
                left = matrix[own].tocoo()
                size = (len(const[own]), places[start - 1] + 1)
                needed.append((csr(sparse.csr_array((left.data, (left.row, places[left.col])), size)), const[own]))
        return needed


def bounded(entries: int) -> None:
    """Raise `UnsupportedError` beyond `MOST_ENTRIES`."""
    if entries > MOST_ENTRIES:
        raise UnsupportedError(f"{entries} entries of matrices, where {MOST_ENTRIES} are the most")


def csr(matrix: Matrix) -> Matrix:
    """As csr_array without explicit zeros."""
    matrix = sparse.csr_array(matrix)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix
