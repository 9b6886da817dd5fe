"""Journal: every finished trial of a validation, in one SQLite file beside the report.

    with Journal.open(folder / "journal.sqlite", identity, resume=True) as journal:
        run_campaign(pool, job, log=journal.campaign(job.model.name, {"where": ["weights"]}))

Write-ahead logging makes a commit survive the death of the process (`kill -9`); after a power cut the
last moments may be missing, and are run again. A journal knows what it belongs to and refuses to go on
with anything else.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from resq_deploy.errors import CampaignError
from resq_deploy.runtime.closing import Closing
from resq_deploy.runtime.trials import Job, Row, TrialEngine, run_trial

VERSION = 2  # 1 did not keep which images a fault changed
_COLUMNS = tuple(field.name for field in fields(Row))
_values = attrgetter(*_COLUMNS)
_TYPES = {"int": "INTEGER NOT NULL", "str": "TEXT NOT NULL", "Status": "TEXT NOT NULL"}
_TYPES |= {"str | None": "TEXT", "int | None": "INTEGER", "float": "REAL NOT NULL"}
_TYPES |= {"bytes": "BLOB NOT NULL"}
_SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE campaign (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, identity TEXT NOT NULL);
CREATE TABLE trial (campaign INTEGER NOT NULL REFERENCES campaign,
  {", ".join(f"{f.name} {_TYPES[str(f.type)]}" for f in fields(Row))},
  PRIMARY KEY (campaign, trial)) WITHOUT ROWID;
"""
_INSERT = f"INSERT OR IGNORE INTO trial VALUES ({', '.join('?' * (len(_COLUMNS) + 1))})"
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM trial WHERE campaign = ?"
_SIDE_FILES = ("", "-wal", "-shm", "-journal")


class Journal(Closing):
    """An open journal. `identity` (JSON types) is what it belongs to: bundle, backend, images, seed, ..."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._db = connection

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        identity: Mapping[str, Any],
        *,
        resume: bool = False,
        context: Mapping[str, Any] | None = None,
    ) -> Journal:
        """Make a journal, or go on with one.

        `context`: what a replay needs to know and what need not be the same (a path). Raises CampaignError
        where the file exists and `resume` is not asked for, belongs to something else, or is no journal.
        """
        place = Path(path)
        exists = place.exists() and place.stat().st_size > 0
        if exists and not resume:
            raise CampaignError(
                f"{place} holds trials of an earlier run", "go on with --resume, or use another -o"
            )
        with _readable(place):
            journal = cls(place, _connect(place))
            try:
                if not journal._has_schema():
                    journal._create(identity, context or {})
                journal._check_version()
                _same(place, journal.identity, identity)
            except BaseException:
                journal.close()
                raise
        return journal

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Journal:
        """Open a journal to look into it. Raises CampaignError where there is none."""
        place = Path(path)
        if not place.is_file():
            raise CampaignError(f"there is no journal {place}")
        with _readable(place):
            journal = cls(place, _connect(place))
            try:
                journal._check_version()
            except BaseException:
                journal.close()
                raise
        return journal

    @staticmethod
    def remove(path: str | os.PathLike[str]) -> None:
        """Delete a journal with its side files, if it is there."""
        for suffix in _SIDE_FILES:
            Path(f"{os.fspath(path)}{suffix}").unlink(missing_ok=True)

    @property
    def identity(self) -> dict[str, Any]:
        """What it belongs to."""
        return dict(self._meta("identity"))

    @property
    def context(self) -> dict[str, Any]:
        """What was told at its making."""
        return dict(self._meta("context"))

    def campaign(self, name: str, identity: Mapping[str, Any] | None = None) -> CampaignLog:
        """The log of one campaign, made where there is none.

        Raises CampaignError where one of this name was run with another `identity` (filters, golden logits).
        """
        wanted = json.dumps(identity or {}, sort_keys=True)
        query = "SELECT id, identity FROM campaign WHERE name = ?"
        found = self._db.execute(query, (name,)).fetchone()
        if found is None:
            with self._writing():
                insert = "INSERT OR IGNORE INTO campaign (name, identity) VALUES (?, ?)"
                self._db.execute(insert, (name, wanted))
            found = self._db.execute(query, (name,)).fetchone()
        _same(self.path, json.loads(found[1]), json.loads(wanted))
        return CampaignLog(self, int(found[0]), name)

    def campaigns(self) -> dict[str, dict[str, Any]]:
        """Name and identity of every campaign in it."""
        rows = self._db.execute("SELECT name, identity FROM campaign ORDER BY id")
        return {name: json.loads(identity) for name, identity in rows}

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction; a disk that is full becomes a CampaignError, and what was committed stays."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise CampaignError(
                f"the journal {self.path} cannot be written: {error}",
                "mend that (free some space?) and go on with --resume: nothing finished is lost",
            ) from error

    def _has_schema(self) -> bool:
        found = self._db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'meta'")
        return bool(found.fetchone()[0])

    def _create(self, identity: Mapping[str, Any], context: Mapping[str, Any]) -> None:
        texts = {"version": VERSION, "identity": dict(identity), "context": dict(context)}
        with self._writing():
            for statement in filter(str.strip, _SCHEMA.split(";")):
                self._db.execute(statement)
            self._db.executemany(
                "INSERT INTO meta VALUES (?, ?)", [(k, json.dumps(v)) for k, v in texts.items()]
            )

    def _check_version(self) -> None:
        found = self._meta("version")
        if found != VERSION:
            raise CampaignError(
                f"{self.path} is a journal of version {found!r}, this program reads {VERSION}",
                "go on with the resq-deploy that wrote it, or begin anew with --force",
            )

    def _meta(self, key: str) -> Any:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise CampaignError(f"{self.path} is not a journal of fault trials")
        return json.loads(row[0])


class CampaignLog:
    """The trials of one campaign in a journal: what run_campaign asks of a log."""

    def __init__(self, journal: Journal, key: int, name: str) -> None:
        self.name = name
        self._journal = journal
        self._key = key

    def ranges(self) -> list[range]:
        """Numbers of the trials in it, as ascending blocks."""
        # successive numbers in one block: number minus rank stays the same
        blocks = self._journal._db.execute(
            "SELECT min(trial), max(trial) FROM (SELECT trial, trial - row_number() OVER (ORDER BY trial) AS block"
            " FROM trial WHERE campaign = ?) GROUP BY block ORDER BY 1",
            (self._key,),
        )
        return [range(first, last + 1) for first, last in blocks]

    def rows(self) -> Iterator[Row]:
        """All trials in it when asked, ascending."""
        with closing(_connect(self._journal.path)) as db:
            for values in db.execute(_SELECT + " ORDER BY trial", (self._key,)):
                yield Row(*values)

    def row(self, trial: int) -> Row:
        """One trial. Raises CampaignError where it is not in it."""
        values = self._journal._db.execute(
            _SELECT + " AND trial = ?", (self._key, trial)
        ).fetchone()
        if values is None:
            raise CampaignError(f"{self._journal.path} has no trial {trial} of {self.name}")
        return Row(*values)

    def append(self, rows: Iterable[Row]) -> None:
        """Keep these, all or none. Raises CampaignError where the disk is full."""
        with self._journal._writing():
            self._journal._db.executemany(_INSERT, [(self._key, *_values(row)) for row in rows])


@dataclass(frozen=True, slots=True)
class Replay:
    """One trial run again. `same`: the same bits were flipped and the logits are bit-identical."""

    before: Row
    now: Row
    faults: tuple[str, ...]

    @property
    def same(self) -> bool:
        return (self.before.flips_sha, self.before.logits_sha) == (
            self.now.flips_sha,
            self.now.logits_sha,
        )


def replay(log: CampaignLog, engine: TrialEngine, job: Job, trial: int, show: int = 20) -> Replay:
    """Run one trial of a journal again, and say which bits it flips (the first `show` of them)."""
    before = log.row(trial)
    now = run_trial(engine, engine.golden(), job, trial)
    drawn = job.model.trial(job.space, job.seed, trial).flips
    faults = [
        f"{f.tensor}[{f.element}] bit {f.bit}"
        for f, _ in zip(drawn.faults(), range(show), strict=False)
    ]
    return Replay(before, now, tuple(faults))


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=60.0, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    return db


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise CampaignError(f"the journal {path} cannot be opened: {error}") from error
    except sqlite3.DatabaseError as error:
        raise CampaignError(
            f"{path} is not a journal of fault trials", "choose another -o"
        ) from error


def _same(path: Path, kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    wanted = json.loads(json.dumps(dict(wanted)))
    differing = [k for k in {**kept, **wanted} if kept.get(k) != wanted.get(k)]
    if differing:
        key = min(
            differing, key=lambda name: (name == "golden", name)
        )  # golden logits follow from the rest
        raise CampaignError(
            f"{path} belongs to another validation: {key} was {_short(kept.get(key))} and is now "
            f"{_short(wanted.get(key))}",
            "give the settings it was made with, or use another -o",
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
