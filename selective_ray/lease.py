"""The lease of a run: one writer at a time, and a dead one's place is taken at once."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from selective_ray.errors import UserError
from selective_ray.store import Run

FILE = "lease.json"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
# What stands for a lease that cannot be read: nobody's, since long.
_DAMAGED = {"token": "", "host": "", "pid": 0, "boot_id": "", "started": "", "heartbeat": 0.0}


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def _started(pid: int) -> str | None:
    """Return when a process of this machine began, in clock ticks; None if there is no such process.

    A pid is given again to other processes; the pair of pid and start is not.
    """
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
        # A zombie has ended; only its parent has not asked yet.
        return None if state[0] in "ZX" else state[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"


class Lease:
    """Holds a run for this process while in a `with` block; raises UserError if another process lives.

    A holder on this host whose process is gone is replaced at once, as is one whose heartbeat is older than
    60 seconds, wherever it ran. A fresher one from elsewhere is watched, with a message through `say`: if
    its heart beats again it lives, else its place is taken when it is stale.
    """

    def __init__(self, run: Run, say: Callable[[str], None] = lambda message: None) -> None:
        self.run, self.say = run, say
        self.token = secrets.token_hex(8)
        self.stop = threading.Event()

    def __enter__(self) -> Lease:
        while True:
            holder = self._read()
            if holder is not None:
                self._wait_until_gone(holder)
            if self._take_from(holder):
                break
        self.thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop.set()
        self.thread.join()
        # A lease that cannot be removed is taken over at once, as that of a process that ended.
        with suppress(OSError), self._alone():
            if (holder := self._read()) and holder["token"] == self.token:
                self.run.delete(FILE)

    def check(self) -> None:
        """Raise UserError if another process has taken the run over, as it may after 60 silent seconds."""
        holder = self._read()
        if not holder or holder["token"] != self.token:
            raise UserError(f"{self.run.uri} was taken over by another process; this one stops")

    def _read(self) -> dict | None:
        try:
            found = json.loads(self.run.read_bytes(FILE))
        except FileNotFoundError:
            return None
        except ValueError:
            return _DAMAGED
        sound = isinstance(found, dict) and all(
            isinstance(found.get(key), type(value)) for key, value in _DAMAGED.items()
        )
        return found if sound else _DAMAGED

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from the lease meanwhile, where the file system has locks."""
        if not self.run.is_local:
            yield
            return
        folder = os.open(self.run.root, os.O_RDONLY)
        try:
            with suppress(OSError):
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _content(self) -> bytes:
        pid = os.getpid()
        return json.dumps(
            {
                "token": self.token,
                "host": socket.gethostname(),
                "pid": pid,
                "boot_id": _boot_id(),
                "started": _started(pid),
                "heartbeat": time.time(),
            }
        ).encode()

    def _wait_until_gone(self, holder: dict) -> None:
        if holder["host"] == socket.gethostname():
            alive = holder["boot_id"] == _boot_id() and _started(holder["pid"]) == holder["started"]
            if alive:
                raise UserError(
                    f"{self.run.uri} is in use by process {holder['pid']} on this machine; "
                    "wait for it to end, or stop it, and run the same command again"
                )
            return
        # Only the age at first sight is taken from the clocks, which may differ between machines.
        age = min(max(time.time() - holder["heartbeat"], 0.0), STALE_SECONDS)
        stale = time.monotonic() + STALE_SECONDS - age
        while (left := stale - time.monotonic()) > 0:
            self.say(
                f"{self.run.uri} was in use on {holder['host']} {STALE_SECONDS - left:.0f} s ago; "
                f"waiting up to {left:.0f} s to see whether that process lives"
            )
            time.sleep(min(left, HEARTBEAT_SECONDS / 2))
            now = self._read()
            if now is None:
                return
            if now != holder:
                raise UserError(
                    f"{self.run.uri} is in use by process {now['pid']} on {now['host']}; "
                    "wait for it to end, or stop it, and run the same command again"
                )

    def _take_from(self, gone: dict | None) -> bool:
        """Replace the lease that was found; False where it is another by now.

        Of several processes that try at once, one succeeds.
        """
        path = self.run.path(FILE)
        with self._alone():
            if self._read() != gone:
                return False
            if self.run.is_local:
                if gone is not None:
                    Path(path).unlink()
                temporary = Path(f"{path}.{self.token}.tmp")
                temporary.write_bytes(self._content())
                try:
                    # Exclusive also where there are no locks.
                    os.link(temporary, path)
                except FileExistsError:
                    return False
                finally:
                    temporary.unlink()
                return True
        # Object stores have no exclusive creation everywhere: the last of several writers holds the lease.
        self.run.write_bytes(self._content(), FILE)
        time.sleep(1.0)
        holder = self._read()
        return holder is not None and holder["token"] == self.token

    def _beat(self) -> None:
        while not self.stop.wait(HEARTBEAT_SECONDS):
            try:
                with self._alone():
                    self.check()
                    self.run.write_bytes(self._content(), FILE)
            except UserError:
                return
            except OSError:
                # A store that does not answer now may do so at the next beat.
                continue
