"""What torch says of its own failures is kept from the user, who gets one error of ours for it."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Hold back torch's log lines, and what is written to stderr (a failed torch.export prints its whole graph there).

    Text that the model's own code wrote is passed on. Logs that ``TORCH_LOGS`` asks for have loggers with levels of
    their own and still appear.
    """
    logger, held = logging.getLogger("torch"), io.StringIO()
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    graph = ""
    try:
        with contextlib.redirect_stderr(held):
            yield
    except Exception as err:
        graph = str(getattr(err.__cause__ or err, "partial_fx_graph", ""))
        raise
    finally:
        logger.setLevel(level)
        said = held.getvalue()
        print(said.replace(f"{graph}\n", "") if graph else said, end="", file=sys.stderr)
