"""The contract of a task source: options in, a sequence of tasks out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from clkit.errors import Problem
from clkit.tasks.base import TaskSequence


class TaskSource(ABC):
    """Where tasks come from. Register one with an entry point in the group ``clkit.tasks``.

    Attributes:
        config_class: a dataclass whose fields are made with :func:`clkit.config.opt`; only types that OmegaConf's
            structured configs know.
    """

    config_class: ClassVar[type]

    @classmethod
    @abstractmethod
    def check(cls, config: Any) -> list[Problem]:
        """All problems that can be seen before data are loaded: missing files, options that exclude each other.

        A problem's ``where`` is the key in the run's configuration, for example ``tasks.root``. Ranges of single
        options stand in the fields and are checked by the caller.
        """

    @classmethod
    @abstractmethod
    def build(cls, config: Any, seed: int) -> TaskSequence:
        """Read all data and return the sequence.

        Raises:
            DataError: with every problem found in all files; nothing is returned from partly read data.
        """
