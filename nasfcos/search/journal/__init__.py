"""The journal of a search: every proposal and every finished trial, durable in one SQLite file.

The file is an Optuna storage with a study per stage, so ``optuna-dashboard sqlite:///search.db``
and Optuna's plots and importances work on it. Of a proposal it keeps the decisions as categorical
parameters, of a finished trial the objective as its value (to be maximised), the rewards at the
rungs as intermediate values, and the rest as user attributes.

What can happen to a trial::

    propose -> WAITING -> start -> RUNNING -> finish -> COMPLETE, PRUNED or FAIL (finished)
                  ^                   |
                  +------- FAIL <-----+   its worker died, or the search was killed: tried again

A trial that is tried again becomes a new trial of Optuna's, linked to the failed one by Optuna's
own callback for that. So a proposal, known by its ``index``, may stand in several of them, of
which at most one is finished: a FAIL that carries no ``status`` is none.

Two things differ from how a study of Optuna's is mostly used. Trials are written through the
storage's own interface, not by ``enqueue_trial``, ``ask`` and ``tell``: these write each of the
decisions in a transaction of its own, and give out trials in their order only. And stale trials
are found without a heartbeat: whoever opens a journal for writing holds the lock of OUTPUT_DIR, so
a trial that is RUNNING at that moment belongs to a process that is gone.

Writes go through SQLite's rollback journal in its safest mode. It is slower than a write-ahead log,
but a crash of the machine loses nothing either, and a search on a network file system can be
watched from another machine.
"""

try:
    import optuna
except ImportError as error:
    raise ImportError(
        "the architecture search keeps its journal with Optuna, which is not installed: "
        "pip install 'nasfcos[search]'"
    ) from error

from .file import JOURNAL, JournalError, writing
from .journal import Journal
from .reading import check_settings, read_records, read_settings

# Otherwise there would be a line for each study that is made.
optuna.logging.set_verbosity(optuna.logging.WARNING)

__all__ = [
    "JOURNAL",
    "Journal",
    "JournalError",
    "check_settings",
    "read_records",
    "read_settings",
    "writing",
]
