"""Two doctors on two nodes: they find each other by files, and tell when each sees the other's.

Who comes first takes the host's seat of a meeting, who comes second the guest's; seats are
published by link, so that the server decides, and a host that has waited long enough takes both.
Each node acts at an agreed moment of the server's clock, and watches for what the other did.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lsweep.errors import LsweepError
from lsweep.hosts.machine import host_identity
from lsweep.runs.doctor import Finding, Level, clock_offset, remove
from lsweep.storage.files import publish, read_json, replace, sealed
from lsweep.storage.insist import VISIBLE, appears, discard, insist, make_folder, names, read, there

RACES = 200
PATIENCE = VISIBLE + 15.0  # seconds for one answer of the other node
LONGEST_DELAY = 60.0
POLL = 0.01
LOOK = 0.5  # seconds before a common moment, to look at what is to change
LONGEST_RACE = 20.0
RECORD = 4096  # bytes of the file that grows


class Gone(LsweepError):
    """The other node no longer answers."""


class Twice(LsweepError):
    """Two nodes hold one name."""


def meet(folder: Path, wait: float, say: Callable[[str], None]) -> list[Finding]:
    """Wait for a second doctor on ``folder``, and probe together what each sees of the other.

    Args:
        folder: shared by both nodes.
        wait: seconds to wait for the other.
        say: told what is waited for.
    """
    root = folder / ".lsweep-doctor"
    make_folder(root)
    try:
        seat = _Seat.take(root, wait, say)
        if seat is None:
            return [Finding("second node", Level.NOTE, "none came: what another node sees was not "
                            "probed. Start the same command on two nodes at once")]  # fmt: skip
        return _Pair(seat).findings()
    except Twice as e:
        return [Finding("second node", Level.UNSAFE, str(e))]
    except Gone as e:
        return [Finding("second node", Level.NOTE, f"{e}: run it again on both nodes")]
    finally:
        with contextlib.suppress(OSError):
            root.rmdir()  # unless others meet


class _Seat:
    """One of the two places of a meeting."""

    def __init__(self, root: Path, number: int, side: str, host: dict[str, Any]) -> None:
        self.root, self.number, self.side = root, number, side
        self.other = "guest" if side == "host" else "host"
        self.board = root / f"{number}.{host['token']}"

    @classmethod
    def take(cls, root: Path, wait: float, say: Callable[[str], None]) -> _Seat | None:
        me = {"token": uuid.uuid4().hex[:12], "wait": wait}
        number = 0
        while True:
            hosts, guests = root / f"{number}.host", root / f"{number}.guest"
            if publish(hosts, sealed(me), sync=False):
                seat = cls(root, number, "host", me)
                try:
                    say(f"waiting {wait:g} s for the same command on another node")
                    alone = {**me, "of": me["token"]}
                    came = seat._joined(guests, wait)
                    came = came or not publish(guests, sealed(alone), sync=False)
                    seat._require_mine(hosts, guests, me["token"])
                    if came:
                        return seat
                except BaseException:
                    seat.leave()
                    raise
                seat.leave()
                return None
            with contextlib.suppress(LsweepError, OSError):
                appears(hosts, VISIBLE)
                host = read_json(hosts)
                age = time.time() + clock_offset(root) - hosts.stat().st_mtime
                seat = cls(root, number, "guest", host)
                if age > host["wait"] + 2 * PATIENCE:
                    seat.leave()  # its doctor was killed
                elif publish(guests, sealed({**me, "of": host["token"]}), sync=False):
                    return seat
            number += 1

    def _joined(self, guests: Path, wait: float) -> bool:
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline:
            if guests.name in names(self.root):
                return True
            time.sleep(POLL)
        return False

    def _require_mine(self, hosts: Path, guests: Path, token: object) -> None:
        """What was published by link must stand there still."""
        appears(guests, VISIBLE)
        if read_json(hosts)["token"] != token or read_json(guests)["of"] != token:
            raise Twice("two nodes published one name: two workers would hold one lease, or "
                        "publish one round twice")  # fmt: skip

    def leave(self) -> None:
        """Remove the meeting."""
        remove(self.board)
        for side in ("guest", "host"):
            seat = self.root / f"{self.number}.{side}"
            for claim in self.root.glob(f".{seat.name}.*"):
                discard(claim)  # where links are missing
            discard(seat)


class _Pair:
    """Both nodes at their seats; each runs the same steps."""

    def __init__(self, seat: _Seat) -> None:
        self._seat, self._board = seat, seat.board
        self._delay, self._one_host = 0.0, False
        make_folder(self._board)
        self._offset = clock_offset(self._board)

    def findings(self) -> list[Finding]:
        """Probe together, and clear up together."""
        try:
            out = [*self._late(), self._race()]
            self._post("done")
            if self._seat.side == "host":
                self._hear("done")  # the guest still reads
                self._seat.leave()
            return out
        except BaseException:
            self._seat.leave()
            raise

    # -- talking ---------------------------------------------------------------------------------

    def _now(self) -> float:
        return time.time() + self._offset

    def _path(self, side: str, what: str) -> Path:
        return self._board / f"{side}-{what}"

    def _post(self, what: str, **facts: Any) -> None:
        facts["at"] = self._now()
        publish(self._path(self._seat.side, what), sealed(facts), sync=False)

    def _hear(self, what: str) -> dict[str, Any]:
        path = self._path(self._seat.other, what)
        deadline = time.monotonic() + PATIENCE
        while path.name not in names(self._board):
            if time.monotonic() > deadline:
                raise Gone(f"the other node has not answered for {PATIENCE:.0f} s")
            time.sleep(POLL)
        if not appears(path, PATIENCE):
            raise Gone(f"{path.name} is listed but cannot be opened")
        return read_json(path)

    def _together(self, what: str, look: Callable[[], object]) -> None:
        """Agree on a moment that both will know of in time, and wait for it.

        Just before, ``look`` at what the other node is about to change: this one may remember it.
        """
        self._post(what, delay=self._delay, mine=self._now())
        theirs = self._hear(what)
        mine = read_json(self._path(self._seat.side, what))
        slowest = min(LONGEST_DELAY, max(mine["delay"], theirs["delay"]))
        start = max(mine["mine"], theirs["mine"]) + 1.5 * slowest + 2 * LOOK
        time.sleep(max(0.0, start - LOOK - self._now()))
        look()
        time.sleep(max(0.0, start - self._now()))

    # -- what the other node did, and when this one saw it ----------------------------------------

    def _late(self) -> list[Finding]:
        # A folder for each look: a listing freshens what a node remembers of the names in it, and
        # so does a change of its own.
        kinds = ("listed", "looked", "rows", "beat")
        mine = {kind: self._path(self._seat.side, f"the-{kind}") / kind for kind in kinds}
        path = {kind: self._path(self._seat.other, f"the-{kind}") / kind for kind in kinds}
        for own in mine.values():
            make_folder(own.parent)
        replace(mine["rows"], bytes(RECORD))
        replace(mine["beat"], sealed({"beat": 0}))
        self._post("hello", identity=host_identity())
        theirs = self._hear("hello")
        self._delay = max(0.0, self._now() - theirs["at"])
        self._one_host = theirs["identity"] == host_identity()
        looks: dict[str, Callable[[], bool]] = {
            "names in a listing": lambda: "listed" in names(path["listed"].parent),
            "names looked for": lambda: there(path["looked"]),
            "rows": lambda: read(path["rows"])[0] > 0,
            "sizes": lambda: insist(path["rows"].stat).st_size > RECORD,
            "heartbeats": lambda: int(read_json(path["beat"])["beat"]) == 1,
        }
        self._together("ready", lambda: [_quietly(look) for look in looks.values()])
        acted = self._now()
        publish(mine["listed"], sealed({"here": True}), sync=False)
        publish(mine["looked"], sealed({"here": True}), sync=False)
        _append(mine["rows"])
        replace(mine["beat"], sealed({"beat": 1}))
        seen = self._watched(looks)
        self._post("seen", acted=acted)
        began = self._hear("seen")["acted"]
        delays = {what: max(0.0, at - began) for what, at in seen.items()}
        self._delay = max(delays.values())
        return [self._told(what, delay) for what, delay in delays.items()]

    def _told(self, what: str, delay: float) -> Finding:
        name = f"other node's {what}"
        if delay < float("inf"):
            text = f"seen after {delay:.2g} s: {_CONSEQUENCES[what]}"
            return Finding(name, Level.OK, text, {"seconds": delay})
        level = Level.UNSAFE if what == "rows" else Level.STATIC
        if what in ("names looked for", "sizes"):
            level = Level.NOTE  # runs list folders and read whole parts
        return Finding(name, level, f"{name} are not seen within {VISIBLE:.0f} s")

    def _watched(self, looks: dict[str, Callable[[], bool]]) -> dict[str, float]:
        """Return when each look first said yes, on the server's clock; infinity if it never did."""
        seen = dict.fromkeys(looks, float("inf"))
        deadline = time.monotonic() + VISIBLE
        while time.monotonic() < deadline and float("inf") in seen.values():
            for what, look in looks.items():
                if seen[what] == float("inf") and _quietly(look):
                    seen[what] = self._now()
            time.sleep(POLL)
        return seen

    # -- who comes first --------------------------------------------------------------------------

    def _race(self) -> Finding:
        place = self._path("both", "leases")
        make_folder(place)
        leases = [place / f"{n:06d}.g0" for n in range(RACES)]
        # Workers look first; a node that believes what it remembers would claim it anyway.
        self._together("race", lambda: [there(lease) for lease in leases])
        won, tried, deadline = [], 0, time.monotonic() + LONGEST_RACE
        for lease in leases:
            if time.monotonic() > deadline:
                break
            if publish(lease, sealed({"side": self._seat.side}), sync=False):
                won.append(tried)
            tried += 1
        self._post("won", won=won, tried=tried)
        answer = self._hear("won")
        theirs, tried = answer["won"], max(tried, answer["tried"])
        both, nobody = set(won) & set(theirs), tried - len({*won, *theirs})
        name = "claims raced by two nodes"
        figures = {"won": float(len(won)), "both": float(len(both)), "nobody": float(nobody)}
        if both:
            text = f"both nodes won {len(both)} of {tried} claims: a round might be published twice"
            return Finding(name, Level.UNSAFE, text, figures)
        if nobody:
            text = f"nobody won {nobody} of {tried} claims: leases would stay free"
            return Finding(name, Level.STATIC, text, figures)
        text = f"{tried} leases, one winner each ({len(won)} here, {len(theirs)} there)"
        if self._one_host:
            text += "; both doctors ran on one host, so its network was not in between"
        return Finding(name, Level.OK, text, figures)


_CONSEQUENCES = {
    "names in a listing": "new parts and rounds; what is older is never computed twice",
    "names looked for": "new leases; a claim that comes later only loses",
    "rows": "what a merge or a takeover misses is at most this young",
    "sizes": "not used: parts have their size from the start",
    "heartbeats": "a worker counts as dead after 180 s",
}


def _quietly(look: Callable[[], bool]) -> bool:
    with contextlib.suppress(LsweepError, OSError):
        return look()
    return False


def _append(path: Path) -> None:
    fd = insist(lambda: os.open(path, os.O_WRONLY))
    try:
        os.pwrite(fd, b"row", 0)
        os.pwrite(fd, b"more", RECORD)
        os.fsync(fd)
    finally:
        os.close(fd)
