"""The penalty on chosen entries of B A and its gradients, through a sparse pattern instead of the dense product."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TypeAlias

import torch
from torch import Tensor

Shape = tuple[int, int]
_BLOCK = 1 << 20  # entries of B A that a dense pass forms at a time
# Numbers of a factor that are worked on at a time: what stays in the second-level cache. At 4096 x 4096 and r = 128
# this took 8-17 % off the time (one thread, 2 MiB of cache).
_CACHED = 1 << 17


class Pattern:
    """Distinct positions in a (rows, columns) matrix: int32 compressed rows, columns ascending within a row.

    Args:
        shape: of the matrix.
        crow: (rows + 1,) int32, where each row begins in ``col``.
        col: (N,) int32 columns.
    """

    def __init__(self, shape: Shape, crow: Tensor, col: Tensor) -> None:
        self.shape = shape
        self.crow = crow
        self.col = col

    @classmethod
    def of(cls, flat: Tensor, shape: Shape) -> Pattern:
        """From ascending distinct flat positions (N,) int64, ``row * columns + column``."""
        return cls(shape, _starts(flat // shape[1], shape[0]), (flat % shape[1]).int())

    def __len__(self) -> int:
        return len(self.col)

    def flat(self) -> Tensor:
        """(N,) int64 flat positions, ascending."""
        rows = torch.arange(self.shape[0], device=self.col.device).repeat_interleave(self.crow.diff())
        return rows * self.shape[1] + self.col

    def to(self, device: torch.device) -> Pattern:
        """The pattern on ``device``."""
        return self if self.col.device == device else Pattern(self.shape, self.crow.to(device), self.col.to(device))

    @cached_property
    def _transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Compressed rows of the transpose, and for each of its entries the place among ours; all int32.

        A product with the transpose of a compressed-row matrix costs ten times as much as one with the matrix.
        """
        order = self.col.argsort(stable=True).int()
        rows = torch.arange(self.shape[0], dtype=torch.int32, device=self.col.device)
        rows = rows.repeat_interleave(self.crow.diff())
        return _starts(self.col, self.shape[1]), rows.index_select(0, order), order

    def matrix(self, values: Tensor) -> Tensor:
        """The sparse matrix with ``values`` (N,) at the positions."""
        return _csr(self.crow, self.col, values, self.shape)

    def transpose(self, values: Tensor) -> Tensor:
        """Its transpose; ``values`` (N,) in the order of :meth:`matrix`."""
        crow, col, order = self._transposed
        return _csr(crow, col, values.index_select(0, order), (self.shape[1], self.shape[0]))


def _starts(index: Tensor, count: int) -> Tensor:
    """(count + 1,) int32: where each of ``count`` rows begins, when entry ``e`` is in row ``index[e]``."""
    starts = torch.zeros(count + 1, dtype=torch.int32, device=index.device)
    starts[1:] = torch.bincount(index, minlength=count).cumsum(0)
    return starts


Positions: TypeAlias = Pattern | Tensor | Sequence[Tensor]


def _csr(crow: Tensor, col: Tensor, values: Tensor, shape: Shape) -> Tensor:
    _take_the_warning()
    return torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False)


@cache
def _take_the_warning() -> None:
    """Torch says once per process that sparse CSR is in beta; to a user of a strategy that means nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


@dataclass(frozen=True)
class Mask:
    """The protected entries of one matrix.

    Attributes:
        pattern: where they are.
        multiplicity: (N,) how often each counts, in the pattern's order; None = once.
        total: the sum of the multiplicities.
    """

    pattern: Pattern
    multiplicity: Tensor | None
    total: float

    @classmethod
    def of(cls, positions: Positions, shape: Shape, multiplicity: Tensor | None = None) -> Mask:
        """From positions in any form that :func:`masked_l1` takes; repeated ones add up.

        Raises:
            ValueError: a position lies outside ``shape``, or the sizes do not fit.
        """
        if not isinstance(positions, Pattern):
            flat = _flat(positions, shape)
            if multiplicity is not None and len(multiplicity) != len(flat):
                raise ValueError(f"{len(multiplicity)} multiplicities for {len(flat)} positions")
            distinct, inverse = torch.unique(flat, return_inverse=True)
            if multiplicity is not None or len(distinct) < len(flat):
                weights = torch.ones_like(flat) if multiplicity is None else multiplicity.to(flat.device)
                empty = torch.zeros(len(distinct), dtype=weights.dtype, device=flat.device)
                multiplicity = empty.index_add_(0, inverse, weights)
            positions = Pattern.of(distinct, shape)
        if positions.shape != shape or (multiplicity is not None and len(multiplicity) != len(positions)):
            raise ValueError(f"pattern {positions.shape} with {len(positions)} positions does not fit {shape}")
        total = float(len(positions)) if multiplicity is None else float(multiplicity.sum())
        return cls(positions, multiplicity, total)


def _flat(positions: Tensor | Sequence[Tensor], shape: Shape) -> Tensor:
    """Flat positions (N,) int64 of index pairs or of a sparse matrix."""
    if isinstance(positions, Tensor) and positions.layout != torch.strided:
        coordinates: Tensor = positions.to_sparse(layout=torch.sparse_coo).coalesce()
        rows, cols = coordinates.indices()
    elif isinstance(positions, Tensor):
        rows, cols = positions.long().unbind(1)
    else:
        rows, cols = (part.long() for part in positions)
    if len(rows) and not (rows.min() >= 0 and rows.max() < shape[0] and cols.min() >= 0 and cols.max() < shape[1]):
        raise ValueError(f"a position lies outside the {shape[0]} x {shape[1]} matrix")
    flat: Tensor = rows * shape[1] + cols
    return flat


def masked_l1(
    B: Tensor, A: Tensor, pattern: Positions, multiplicity: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted mean of |B A| over ``pattern``, and its gradients, without the dense product.

    With S = B A, weights w and Z = sum of w, ``loss = sum_e w_e |S_e| / Z``. With the sparse matrix G of the entries
    ``w_e sign(S_e) / Z``, ``dB = G A^T`` and ``dA = B^T G``. Equals autograd of ``(B @ A)[rows, cols].abs().mean()``
    over a list in which a position stands w times, except that an empty list gives 0.

    Args:
        B: (m, r).
        A: (r, n).
        pattern: a :class:`Pattern` (best when the call is repeated), row and column indices (N,) each, pairs (N, 2),
            or a sparse (m, n) matrix whose values are not read.
        multiplicity: (N,) w in the order of the pattern; None = 1.

    Returns:
        The loss () and the gradients (m, r) and (r, n). Half precision is computed in float32.

    Example:
        >>> B, A = torch.tensor([[1.0], [-2.0]]), torch.tensor([[3.0, 5.0]])
        >>> loss, dB, dA = masked_l1(B, A, (torch.tensor([0, 1]), torch.tensor([0, 0])))
        >>> loss.item(), dB.tolist(), dA.tolist()
        (4.5, [[1.5], [-1.5]], [[1.5, 0.0]])
    """
    return penalty(B, A, Mask.of(pattern, (B.shape[0], A.shape[1]), multiplicity))


@torch.no_grad()
def penalty(
    B: Tensor, A: Tensor, mask: Mask, norm: str = "l1", reduction: str = "mean"
) -> tuple[Tensor, Tensor, Tensor]:
    """Like :func:`masked_l1`, also with squares (``norm="l2"``) and as a sum (``reduction="sum"``)."""
    b, a = _computable(B), _computable(A)
    if not len(mask.pattern):
        return b.new_zeros(()), torch.zeros_like(B), torch.zeros_like(A)
    width = max(16, _CACHED // max(len(b), a.shape[1]))
    # Columns of A side by side in memory: they are what the products read, in no order.
    parts = [(b[:, i : i + width].contiguous(), a[i : i + width].T.contiguous()) for i in range(0, len(a), width)]
    sampled = mask.pattern.matrix(b.new_zeros(len(mask.pattern)))
    for part_b, part_a in parts:
        torch.sparse.sampled_addmm(sampled, part_b, part_a.T, out=sampled)
    product = sampled.values()
    slope = product.sign() if norm == "l1" else product.clone()
    if mask.multiplicity is not None:
        slope *= mask.multiplicity
    if reduction == "mean":
        slope /= mask.total
    loss = torch.dot(product, slope)
    if norm == "l2":
        slope *= 2
    here, across = mask.pattern.matrix(slope), mask.pattern.transpose(slope)
    d_b = _joined([here @ part_a for _, part_a in parts], dim=1)
    d_a = _joined([(across @ part_b).T for part_b, _ in parts], dim=0)
    return loss, d_b.to(B.dtype), d_a.to(A.dtype)


@torch.no_grad()
def dense_penalty(B: Tensor, A: Tensor, norm: str = "l1", reduction: str = "mean") -> tuple[Tensor, Tensor, Tensor]:
    """The penalty on every entry of B A, a block of rows at a time."""
    b, a = _computable(B), _computable(A)
    d_b, d_a = torch.empty_like(b), torch.zeros_like(a)
    loss = b.new_zeros(())
    for start in range(0, len(b), rows := max(1, _BLOCK // a.shape[1])):
        part = b[start : start + rows]
        product = part @ a
        slope = product.sign() if norm == "l1" else product
        loss += (product * slope).sum()
        d_b[start : start + rows] = slope @ a.T
        d_a += part.T @ slope
    share = 1.0 / (len(b) * a.shape[1]) if reduction == "mean" else 1.0
    factor = share if norm == "l1" else 2.0 * share
    return loss * share, (d_b * factor).to(B.dtype), (d_a * factor).to(A.dtype)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _computable(x: Tensor) -> Tensor:
    """Sparse products exist for float32 and float64 only."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
