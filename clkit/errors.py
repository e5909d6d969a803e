"""The errors a user can cause, each with what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with some input.

    Attributes:
        where: ``file:key`` or ``file:line``, or the argument's name.
        what: what is wrong, in words, with what was got and what was expected.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


class Unsupported(Problem):
    """Something that is right in itself, and that what was chosen can't do: a :class:`CapabilityError`."""


class ClkitError(Exception):
    """Base of every error that a user can cause and mend; the command line exits with ``exit_code``."""

    exit_code = 2

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)

    @classmethod
    def collect(cls, title: str, problems: Iterable[Problem]) -> ClkitError:
        """Build one error out of many problems: the first 20 in full and the count of the rest."""
        found = list(problems)
        lines = [title, *(f"  {p}" for p in found[:MAX_SHOWN])]
        if len(found) > MAX_SHOWN:
            lines.append(f"  ... and {len(found) - MAX_SHOWN} more")
        return cls("\n".join(lines), found)


class ConfigError(ClkitError):
    """A configuration or an argument is wrong; nothing was loaded."""


class DataError(ClkitError):
    """A data file or a record is wrong; nothing was trained."""


class ModelError(ClkitError):
    """A model can't be found, fetched, converted or loaded."""


class CheckpointError(ClkitError):
    """A run directory or a checkpoint can't be written, read or resumed."""


class BusyError(CheckpointError):
    """Another process works in the run directory; nothing was changed."""


class CapabilityError(ClkitError):
    """A strategy was asked for something it does not support."""


class RequestError(ClkitError):
    """An edit or unlearning request is malformed."""


class VerificationError(ClkitError):
    """A model, or a certificate, did not pass a check that it must pass."""

    exit_code = 3


class RunsFailed(ClkitError):
    """Some runs of a sweep failed; the others are finished."""

    exit_code = 3


class NumericalError(ClkitError):
    """A loss or a gradient became NaN or infinite; the last good checkpoint stays."""


class ProcessError(ClkitError):
    """A process of a run on several ended early; the same command resumes."""

    exit_code = 1


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
