"""The ledger: a worker's parts and its heartbeat, where finished rows go."""

from __future__ import annotations

import errno
import json
import os
import threading
from typing import Any

import numpy as np

from lsweep.errors import LsweepError, SickDevice
from lsweep.evaluating.evaluate import Evaluator
from lsweep.outcomes.frozen import as_header
from lsweep.plans.plan import Plan
from lsweep.storage.files import writing
from lsweep.storage.folder import RunFolder
from lsweep.storage.insist import insist, make_folder
from lsweep.storage.parts import CAPACITIES, PartWriter
from lsweep.storage.rows import Rows, device_code, row_type
from lsweep.storage.workers import Heartbeat, State
from lsweep.working.role import Role


class Ledger:
    """A worker's parts and its heartbeat: where finished rows go."""

    def __init__(
        self,
        folder: RunFolder,
        plan: Plan,
        name: str,
        known: dict[str, Any],
        role: Role,
        ev: Evaluator,
    ) -> None:
        self._folder, self._plan, self.name = folder, plan, name
        self._class, self._evaluator = known["class"], ev
        self._opaque = " ".join(known["opaque"])
        self._anchor = json.dumps(known.get("anchor", {}), sort_keys=True)
        self._chosen = as_header(known)
        self._code = device_code(self._class)
        self._part: PartWriter | None = None
        self._count = 0
        # Whoever wants both takes them in this order.
        self._syncing, self._lock = threading.Lock(), threading.Lock()
        self._type = row_type(len(plan.variables))
        self.points = 0
        for path in (folder.parts, folder.workers):
            with writing(path):
                make_folder(path)
        self.heart = Heartbeat(
            folder, name, role.beat, self._sync, device=self._class, job=role.job
        )

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: Any
    ) -> None:
        late = None
        try:
            self.new_part()  # rows are committed when they are synced
        except LsweepError as e:
            late = e
        end = error or late
        if end is None:
            state = State.DONE
        elif isinstance(end, SickDevice):
            state = State.SICK
        else:
            state = State.FAILED if isinstance(end, Exception) else State.STOPPED
        self.heart.end(state, "" if end is None else str(end) or type(end).__name__)
        if error is None and late is not None:
            raise late

    def _sync(self) -> None:
        """Sync aside, while the worker appends: on a shared file system it may take long."""
        with self._syncing:
            with self._lock:
                part = self._part
                if part is None or not part.dirty:
                    return
                fd = part.duplicate()
            try:
                os.fdatasync(fd)
            except OSError as e:
                with self._lock:
                    part.close()
                    self.heart.disk_error = e
                raise
            finally:
                os.close(fd)

    def _header(self) -> dict[str, str]:
        sizes = self._evaluator.batch_sizes
        return {
            "worker": self.name,
            "device_class": self._class,
            "opaque": self._opaque,
            "anchor": self._anchor,
            "chosen": self._chosen,
            "batch_sizes": " ".join(f"{s}={n}" for s, n in sorted(sizes.items())),
        }

    def new_part(self) -> None:
        """End the present part: the next rows begin another.

        Raises:
            LsweepError: the disk refused, now or when the heartbeat synced.
        """
        with writing(self._folder.parts), self._syncing, self._lock:
            self._end_part()

    def _end_part(self) -> None:
        if self.heart.disk_error is not None:
            raise self.heart.disk_error
        if self._part is not None:
            self._part.sync()
            self._part.close()
            self._part = None

    def commit(self, rows: Rows, reasons: dict[int, str] | None = None) -> None:
        """Write rows, all of them or an error.

        Raises:
            LsweepError: the disk refused; what was committed before stays.
        """
        rows["device"] = self._code
        with writing(self._folder.parts):
            if self._part is None or self._part.free < len(rows):
                with self._syncing, self._lock:
                    self._open_part(len(rows))
            with self._lock:
                if self.heart.disk_error is not None:
                    raise self.heart.disk_error
                assert self._part is not None
                for i, reason in (reasons or {}).items():
                    rows[i]["text"] = self._part.note(reason)
                self._part.append(rows)

    def _open_part(self, rows: int) -> None:
        self._end_part()
        capacity = CAPACITIES[min(self._count, len(CAPACITIES) - 1)]
        # A part that was not made holds nothing yet, so making it may be tried again.
        self._part = insist(
            lambda: PartWriter(
                self._folder.part(self.name, self._count),
                plan=self._plan.digest,
                variables=len(self._plan.variables),
                capacity=max(capacity, rows),
                header=self._header(),
            ),
            also=(errno.EEXIST, errno.EBADF),  # glibc's posix_fallocate calls a stale file so
        )
        self._count += 1

    def empty(self, rows: int) -> Rows:
        """Return zeroed rows to fill."""
        return np.zeros(rows, self._type)
