"""Send what transformers, peft and DeepSpeed print while they load a model to one logger instead of the terminal."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger("clkit.models.libraries")


class _Forward(logging.Handler):
    """Re-emits a library's record as INFO of our logger; as a filter it also keeps it from the library's handlers."""

    def emit(self, record: logging.LogRecord) -> None:
        logger.info("%s: %s", record.name, record.getMessage())

    def filter(self, record: logging.LogRecord) -> bool:
        self.emit(record)
        return False


@contextmanager
def routed() -> Iterator[None]:
    """Within, messages and warnings of the libraries go to the logger ``clkit.models.libraries`` (level INFO).

    Nothing is lost: ``--debug`` or a logging configuration shows them. What a user must know about a load (missing
    weights, an unreadable file) is checked by our own code and raised.
    """
    # transformers configures its logger when its logging module is imported; handlers set before would be joined.
    from transformers.utils import logging as utilities

    bars: Any = utilities
    bars.get_logger()
    library, deepspeed = logging.getLogger("transformers"), logging.getLogger("DeepSpeed")
    handlers, forward, gate = library.handlers, _Forward(), _Forward()
    hide = bars.is_progress_bar_enabled() and not sys.stderr.isatty()
    library.handlers = [forward]
    deepspeed.addFilter(gate.filter)
    if hide:
        bars.disable_progress_bar()
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for warning in caught:
            logger.info("%s: %s", warning.category.__name__, warning.message)
        library.handlers = handlers
        deepspeed.removeFilter(gate.filter)
        if hide:
            bars.enable_progress_bar()
