"""The file of a journal: opening it, and errors that say why it cannot be read or written."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.exc import SQLAlchemyError

from ...config import ConfigError

LOCK_TIMEOUT = 60.0
"""Seconds to wait while another process (the dashboard, a reader) locks the file."""

# A placeholder: some characters of a path would have a meaning in a URL, so `_engine` opens it.
_URL = "sqlite:///journal"


class JournalError(ConfigError):
    """A journal cannot be opened, or belongs to a different search."""


def open_storage(path: Path, mode: str, tables: bool = True) -> RDBStorage:
    """Open a file as a storage.

    Args:
        path: path of the file.
        mode: mode of SQLite's URIs. Even a reader needs "rw": after a kill in the middle of a
            transaction, the next process that opens the file rolls it back.
        tables: whether to create missing tables.
    """
    return RDBStorage(_URL, _engine(path, mode), skip_table_creation=not tables)


@contextmanager
def open_study(path: Path, stage: str) -> Iterator[tuple[RDBStorage | None, int | None]]:
    """Open a journal for reading, while another process may write it.

    Yields:
        The storage and the id of the stage's study. The id is None if the stage has not begun;
        both are None if the file is still being created.

    Raises:
        JournalError: the file does not exist or is no journal.
    """
    if not path.exists():
        raise JournalError(f"there is no search in {path.parent}: {path.name} is missing")
    with readable(path):
        if not _is_initialised(path):
            yield None, None
            return
        storage = open_storage(path, "rw", tables=False)
        try:
            study_id = storage.get_study_id_from_name(stage)
        except KeyError:
            study_id = None
        try:
            yield storage, study_id
        finally:
            storage.engine.dispose()


def _is_initialised(path: Path) -> bool:
    """Whether Optuna has created all its tables: it writes their version last."""
    with closing(_engine(path, "rw")["creator"]()) as connection:
        table = "SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'"
        return all(
            connection.execute(query).fetchone()
            for query in (table, "SELECT 1 FROM alembic_version")
        )


def _engine(path: Path, mode: str) -> dict[str, Any]:
    """SQLAlchemy options that open a file in a mode of SQLite's URIs."""

    def connect() -> sqlite3.Connection:
        uri = f"file:{quote(str(path.resolve()))}?mode={mode}"
        return sqlite3.connect(uri, uri=True, timeout=LOCK_TIMEOUT, check_same_thread=False)

    return {"creator": connect}


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the exceptions of reading a file that is no journal into `JournalError`."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError, sqlite3.Error, RuntimeError) as error:
        raise JournalError(f"{path} cannot be read as a journal: {_cause(error)}") from error


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn the exceptions of a failed write into `JournalError`."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        raise JournalError(
            f"{path} cannot be written: {_cause(error)}. No finished trial is lost: make room on "
            "its disk, or end what keeps the file locked, and go on with --resume"
        ) from error


def _cause(error: Exception) -> str:
    """The message of SQLite, without what SQLAlchemy and Optuna wrapped around it."""
    inner = error.__cause__ or error
    return str(getattr(inner, "orig", None) or inner).splitlines()[0]
