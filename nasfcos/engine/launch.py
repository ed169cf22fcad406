"""From the command line to a job: arguments, config, processes, log and exit code.

Exit codes: 0 success; 1 training diverged, or an error of this program; 2 the command line, the
config or a file is not usable; 130 and 143 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from yacs.config import CfgNode

from ..config import ConfigError, load_config
from ..data import DataError
from ..download import DownloadError
from ..evaluation import EvaluationError
from ..models.weights import WeightsError
from ..signals import Interrupted
from . import distributed
from .checkpoint import CheckpointError
from .logging import log_environment, log_to_console, log_to_file
from .monitor import NonFiniteLossError

logger = logging.getLogger(__name__)

# Errors in the user's files or settings; their messages say all that the user needs.
USER_ERRORS = (
    ConfigError,
    DataError,
    WeightsError,
    DownloadError,
    EvaluationError,
    CheckpointError,
    OSError,
)


class HelpFormatter(argparse.HelpFormatter):
    """Keeps the lines of a description or epilog that has several, as a tool's docstring does."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text.strip() if "\n" in text else super()._fill_text(text, width, indent)


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments that the tools share; use its `parse_intermixed_args`.

    Args:
        description: what the tool does, for --help; a tool's docstring, with examples.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--config-file", metavar="FILE", required=True, help="YAML file, such as those in configs/"
    )
    # Launchers pass the local rank in this way, in the environment, or both.
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY VALUE",
        help="config keys to override, in pairs; nasfcos/config/defaults.py describes all keys",
    )  # fmt: skip
    return parser


def launch(args: argparse.Namespace, job: Callable[[CfgNode, torch.device], Any]) -> int:
    """Run a job in the session that the launcher describes, with a log in OUTPUT_DIR.

    Args:
        args: parsed by an `argument_parser`.
        job: called with the config and this process's device.

    Returns:
        The exit code.
    """
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))

    def start() -> None:
        cfg = load_config(args.config_file, args.overrides)
        with distributed.session(cfg.MODEL.DEVICE) as device:
            try:
                log_to_file(cfg.OUTPUT_DIR)
            except OSError as error:
                raise ConfigError(
                    f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be written to ({error}); name another "
                    "folder"
                ) from error
            logger.info("command: %s", " ".join(sys.argv))
            log_environment(device)
            logger.debug("config:\n%s", cfg.dump())
            job(cfg, device)

    return run(start)


def run(job: Callable[[], None]) -> int:
    """Run a job with a log on the console, and report how it ended.

    Returns:
        The exit code.
    """
    log_to_console()
    try:
        job()
    except USER_ERRORS as error:
        # For log.txt only: an OSError may as well come from a mistake in the program.
        logger.debug("the error below was raised here:", exc_info=True)
        logger.error("%s", _message(error))
        return 2
    except NonFiniteLossError as error:
        logger.error("%s", error)
        return 1
    except Interrupted as stop:
        logger.error("%s", stop)
        return 128 + stop.signum
    except KeyboardInterrupt:
        logger.error("interrupted")
        return 130
    except torch.OutOfMemoryError as error:
        logger.error(
            "the GPU is out of memory. In training, a larger SOLVER.ACCUMULATE, a smaller "
            "SOLVER.IMS_PER_BATCH or SOLVER.AMP bf16 needs less; in testing, a smaller "
            "TEST.IMS_PER_BATCH or INPUT.MIN_SIZE_TEST or TEST.DTYPE bfloat16. %s", error,
        )  # fmt: skip
        return 1
    except Exception as error:
        if distributed.is_lost_peer(error):
            logger.error("another process of the job is gone; its own message says why")
        else:
            logger.exception("stopped by an error of the program")
        return 1
    return 0


def _message(error: Exception) -> str:
    """The error's text, without the traceback that a loader's worker prepends, and with a remedy
    if the disk is full."""
    text = str(error)
    marker = f"{type(error).__name__}: "
    if text.startswith("Caught ") and marker in text:
        text = text.rsplit(marker, 1)[1].strip()
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        text += (
            ". The disk is full: make room on it, or name an OUTPUT_DIR on another one, and start "
            "the job again; training and searches go on with --resume"
        )
    return text
