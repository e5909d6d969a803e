"""One byte budget for a model and its exemplars, so that methods that spend on either can be compared.

The counting of the class-incremental literature ("paper"): 4 bytes for every parameter of the backbone, and the raw
bytes of every exemplar. The "strict" counting adds what that leaves out: heads, batch-norm statistics, cached features,
and the position under which an exemplar is remembered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

from clkit.errors import ConfigError
from clkit.tasks.base import EditExamples, Examples, LabelledExamples, TextExamples

PARAMETER_BYTES = 4
INDEX_BYTES = 8

Counting = Literal["paper", "strict"]


def exemplar_equivalent(parameters: int, bytes_per_exemplar: int) -> int:
    """How many exemplars occupy the memory of ``parameters`` float32 numbers.

    >>> exemplar_equivalent(463504, 3072)
    603
    """
    if parameters < 0 or bytes_per_exemplar < 1:
        raise ConfigError(
            f"parameters must be at least 0 and bytes_per_exemplar at least 1, got {parameters} and "
            f"{bytes_per_exemplar}"
        )
    return PARAMETER_BYTES * parameters // bytes_per_exemplar


@dataclass(frozen=True)
class Footprint:
    """What a model occupies.

    Attributes:
        parameters: of the backbone; all that the paper's counting looks at.
        heads: bytes of classifiers and auxiliary heads.
        statistics: bytes of buffers, such as the running statistics of batch norm.
        cached: bytes of features that are kept beside the model.
    """

    parameters: int
    heads: int = 0
    statistics: int = 0
    cached: int = 0

    @classmethod
    def of(cls, backbone: nn.Module, heads: Iterable[nn.Module] = (), cached: int = 0) -> Footprint:
        """Count the tensors of a backbone and of the heads on it."""
        inside = [t for head in heads for t in (*head.parameters(), *head.buffers())]
        return cls(
            parameters=sum(p.numel() for p in backbone.parameters()),
            heads=sum(map(_bytes, inside)),
            statistics=sum(map(_bytes, backbone.buffers())),
            cached=cached,
        )

    def bytes(self, counting: Counting = "paper") -> int:
        """The model's part of a budget."""
        paper = PARAMETER_BYTES * self.parameters
        return paper if counting == "paper" else paper + self.heads + self.statistics + self.cached


@dataclass(frozen=True)
class Budget:
    """Bytes that a model and its exemplars share.

    Example:
        >>> reference = Budget.spent(4635040, exemplars=2000, bytes_per_exemplar=3072)  # ten ResNet-32 and 2,000 images
        >>> reference.exemplars(463504, 3072)  # one ResNet-32
        7431

    Attributes:
        bytes: all of it.
        counting: ``paper`` or ``strict``.
    """

    bytes: int
    counting: Counting = "paper"

    def __post_init__(self) -> None:
        if self.bytes < 1:
            raise ConfigError(f"a budget must be at least 1 byte, got {self.bytes}")
        if self.counting not in ("paper", "strict"):
            raise ConfigError(f"counting must be paper or strict, got '{self.counting}'")

    @classmethod
    def spent(
        cls, model: int | Footprint, exemplars: int, bytes_per_exemplar: int, counting: Counting = "paper"
    ) -> Budget:
        """The budget that a model with so many exemplars uses up."""
        return cls(_model_bytes(model, counting) + exemplars * _each(bytes_per_exemplar, counting), counting)

    def exemplars(self, model: int | Footprint, bytes_per_exemplar: int) -> int:
        """How many exemplars fit beside the model (a Footprint, or the number of its parameters).

        Raises:
            ConfigError: the model alone is larger than the budget.
        """
        left = self.bytes - _model_bytes(model, self.counting)
        if left < 0:
            raise ConfigError(
                f"the budget of {self.bytes:,} bytes is smaller than the model, which takes "
                f"{self.bytes - left:,} ({self.counting} counting); give it at least that, or take a smaller model"
            )
        return left // _each(bytes_per_exemplar, self.counting)


def bytes_per_exemplar(examples: Iterable[Examples]) -> int:
    """Raw bytes of one labelled example: a tensor's as it is stored, a text's in UTF-8 (the mean, rounded up).

    Raises:
        ConfigError: the examples have no inputs to measure.
    """
    total = count = 0
    for part in examples:
        if not isinstance(part, LabelledExamples) or not len(part):
            continue
        if isinstance(part.inputs, tuple):
            total += sum(len(text.encode()) for text in part.inputs)
            count += len(part)
            continue
        index = part.labels.new_zeros(1)
        row = part.inputs[index]
        return max(1, _bytes(row))
    if not count:
        raise ConfigError("a memory budget needs labelled examples to count")
    return max(1, -(-total // count))


def held_bytes(examples: Examples, indices: Sequence[int]) -> int:
    """Raw bytes of some examples: tensors as they are stored, texts in UTF-8."""
    part = examples.subset(indices)
    if isinstance(part, LabelledExamples):
        return len(part) * bytes_per_exemplar([part]) if len(part) else 0
    if isinstance(part, TextExamples):
        return sum(len("".join([r.prompt, r.answer, *(r.options or ())]).encode()) for r in part.records)
    return sum(len(f"{r.prompt}{r.target_new}".encode()) for r in cast(EditExamples, part).records)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _each(bytes_per_exemplar: int, counting: Counting) -> int:
    if bytes_per_exemplar < 1:
        raise ConfigError(f"bytes_per_exemplar must be at least 1, got {bytes_per_exemplar}")
    return bytes_per_exemplar + (INDEX_BYTES if counting == "strict" else 0)


def _model_bytes(model: int | Footprint, counting: Counting) -> int:
    return (Footprint(model) if isinstance(model, int) else model).bytes(counting)
