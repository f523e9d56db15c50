"""The database of files and batches: its tables, and how one of an earlier version becomes one of
today. Knows nothing of what is asked of it."""

from __future__ import annotations

import sqlite3
from pathlib import Path

BUSY_S = 30.0
"""Longest wait for another process' write."""
VERSION = 2
"""The second knows files that expire."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER
);
CREATE INDEX IF NOT EXISTS files_of_tenant ON files (tenant, number);
CREATE TABLE IF NOT EXISTS batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    input_file_id TEXT NOT NULL,
    status TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    in_progress_at INTEGER,
    finalizing_at INTEGER,
    completed_at INTEGER,
    failed_at INTEGER,
    cancelling_at INTEGER,
    cancelled_at INTEGER,
    expired_at INTEGER,
    output_file_id TEXT,
    error_file_id TEXT,
    problem TEXT,
    total INTEGER NOT NULL DEFAULT 0,
    done INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    metadata TEXT
);
CREATE INDEX IF NOT EXISTS batches_of_tenant ON batches (tenant, number);
CREATE INDEX IF NOT EXISTS batches_by_status ON batches (status, number);
"""

SECOND = f"""
BEGIN;
ALTER TABLE files ADD COLUMN expires_at INTEGER;
PRAGMA user_version = {VERSION};
COMMIT;
"""
"""From the first version to the second."""


def open_database(path: Path) -> sqlite3.Connection:
    """A connection to the database at `path`, made or brought up to date first.

    Raises:
        sqlite3.DatabaseError: damaged, or of a later version than this.
    """
    database = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        database.row_factory = sqlite3.Row
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise sqlite3.DatabaseError(f"{path} was made by a newer version of this program")
        database.executescript(SCHEMA if version != 1 else SECOND)
        database.execute(f"PRAGMA user_version = {VERSION}")
    except BaseException:
        database.close()
        raise
    return database
