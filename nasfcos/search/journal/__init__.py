"""The journal of a search: every proposal and every finished trial, durable in one SQLite file.

The file is an Optuna storage with one study per stage, so ``optuna-dashboard sqlite:///search.db``
and Optuna's plots and importances work on it. The decisions of a proposal are categorical
parameters. The objective of a finished trial is its value (to be maximised), the rewards at the
rungs are intermediate values, and everything else is stored in user attributes.

The states of a trial::

    propose -> WAITING -> start -> RUNNING -> finish -> COMPLETE, PRUNED or FAIL (finished)
                  ^                   |
                  +------- FAIL <-----+   its worker died, or the search was killed: requeued

A requeued trial is a new Optuna trial, which Optuna's own callback links to the failed one. So
several Optuna trials may belong to one proposal, which is identified by its ``index``. At most one
of them is finished: a FAIL without a ``status`` is an attempt that was cut off.

Optuna is used differently from usual in two ways. Trials are written through the storage interface
and not by ``enqueue_trial``, ``ask`` and ``tell``, which write each decision in a transaction of
its own and give out trials in their order only. And stale trials are found without a heartbeat:
the process that opens a journal for writing holds the lock of OUTPUT_DIR, so a trial that is
RUNNING at that moment belongs to a process that is gone.

SQLite writes with a rollback journal in its safest mode. This is slower than a write-ahead log, but
even a crash of the machine loses nothing, and a search on a network file system can be watched from
another machine.
"""

try:
    import optuna
except ImportError as error:
    raise ImportError(
        "the architecture search keeps its journal with Optuna, which is not installed: "
        "pip install 'nasfcos[search]'"
    ) from error

from .file import JournalError, writing
from .journal import Journal
from .reading import check_settings, differences, has_trials, read_records, read_settings

# Otherwise Optuna logs a line for each study it creates.
optuna.logging.set_verbosity(optuna.logging.WARNING)

__all__ = [
    "Journal",
    "JournalError",
    "check_settings",
    "differences",
    "has_trials",
    "read_records",
    "read_settings",
    "writing",
]
