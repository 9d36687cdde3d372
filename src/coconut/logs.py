"""Log sinks and progress."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from loguru import logger

from coconut.layout import LOG_DIR

_LINE = "{time:HH:mm:ss} | {level: <7} | {message}"
_DATED_LINE = "{time:YYYY-MM-DD HH:mm:ss} | {level: <7} | {message}"


@contextmanager
def log_sinks(name: str) -> Iterator[None]:
    """Log to the terminal, beside any progress bar, and to `outputs/logs/<name>.log`."""
    # Imported here: tqdm is needed by processes that show progress, and they all log.
    from tqdm import tqdm

    logger.remove()
    logger.add(lambda line: tqdm.write(line, file=sys.stderr, end=""), format=_LINE, level="INFO", colorize=False)
    try:
        LOG_DIR.mkdir(parents=True, exist_ok=True)
        log_path = LOG_DIR / f"{name.replace('@', '-')}.log"
        # diagnose=False: values of variables may hold data, and do not belong into a log.
        logger.add(log_path, format=_DATED_LINE, level="DEBUG", diagnose=False)
    except OSError as error:
        logger.warning("{}: no log file: {}", LOG_DIR, error)
    yield
    logger.complete()


def shows_progress() -> bool:
    """Whether somebody watches: a terminal gets a bar, anything else one log line per interval."""
    return sys.stderr.isatty()
