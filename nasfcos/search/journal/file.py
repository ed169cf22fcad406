"""The file of a journal: how it is opened, and what is said where it cannot be."""

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

JOURNAL = "search.db"
"""The file of a search's journals, in its OUTPUT_DIR."""

# Seconds that a process waits while another one (the dashboard, a reader) holds the file.
LOCK_TIMEOUT = 60.0

# `_engine` says which file is opened: in a URL some characters of its path would have a meaning.
_URL = "sqlite:///journal"


class JournalError(ConfigError):
    """A journal that cannot be opened, or that belongs to a different search."""


def open_storage(path: Path, mode: str, tables: bool = True) -> RDBStorage:
    """The storage in a file, in a mode of SQLite's URIs; `tables`: made where they are missing.

    A reader needs "rw", too: after a kill in the middle of a transaction it is the next one to
    open the file that takes back the half of it.
    """
    return RDBStorage(_URL, _engine(path, mode), skip_table_creation=not tables)


@contextmanager
def open_study(path: Path, stage: str) -> Iterator[tuple[RDBStorage | None, int | None]]:
    """A journal that may be written at the same time, and the number of a stage's study in it; None
    where the stage has not begun.

    Raises:
        JournalError: there is no such file, or it is no journal.
    """
    if not path.exists():
        raise JournalError(f"there is no search in {path.parent}: {path.name} is missing")
    with readable(path):
        if not _is_made(path):
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


def _is_made(path: Path) -> bool:
    """Whether Optuna has made all its tables: which version they are of is the last it writes."""
    with closing(_engine(path, "rw")["creator"]()) as connection:
        table = "SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'"
        return all(
            connection.execute(query).fetchone()
            for query in (table, "SELECT 1 FROM alembic_version")
        )


def _engine(path: Path, mode: str) -> dict[str, Any]:
    """How SQLAlchemy is to open a file, in a mode of SQLite's URIs."""

    def connect() -> sqlite3.Connection:
        uri = f"file:{quote(str(path.resolve()))}?mode={mode}"
        return sqlite3.connect(uri, uri=True, timeout=LOCK_TIMEOUT, check_same_thread=False)

    return {"creator": connect}


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what is raised at a file that is no journal into `JournalError`."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError, sqlite3.Error, RuntimeError) as error:
        raise JournalError(f"{path} cannot be read as a journal: {_cause(error)}") from error


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns what is raised where a journal cannot be written into `JournalError`."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        raise JournalError(
            f"{path} cannot be written: {_cause(error)}. No finished trial is lost: make room on "
            "its disk, or end what keeps the file locked, and go on with --resume"
        ) from error


def _cause(error: Exception) -> str:
    """What SQLite said, below what SQLAlchemy and Optuna made of it."""
    inner = error.__cause__ or error
    return str(getattr(inner, "orig", None) or inner).splitlines()[0]
