"""One writer at a time: the living are refused entry, the dead are replaced, races have one winner."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import s3

from selective_ray import lease as leases
from selective_ray.errors import UserError
from selective_ray.lease import FILE, Lease
from selective_ray.store import Run

# Takes a run at the moment it is told, and keeps it until the next line.
PROCESS = """
import sys, time
from selective_ray.errors import UserError
from selective_ray.lease import Lease
from selective_ray.store import Run
print("ready", flush=True)
for line in sys.stdin:
    uri, moment = line.split()
    time.sleep(max(0.0, float(moment) - time.time()))
    try:
        with Lease(Run(uri)) as lease:
            print("got", flush=True)
            sys.stdin.readline()
            lease.check()
        print("released", flush=True)
    except UserError as error:
        print(error, flush=True)
"""


class Process:
    """Another process that takes a run when told."""

    def __init__(self) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def hear(self) -> str:
        return self.popen.stdout.readline().strip()

    def tell(self, *words: object) -> None:
        print(*words, file=self.popen.stdin, flush=True)

    def take(self, run: Run) -> str:
        self.tell(run.uri, 0)
        return self.hear()


@pytest.fixture
def processes():
    started = []

    def start(number: int) -> list[Process]:
        started.extend(Process() for _ in range(number))
        for process in started:
            assert process.hear() == "ready"
        return started

    yield start
    for process in started:
        process.popen.kill()
        process.popen.communicate()


@pytest.fixture
def run(tmp_path) -> Run:
    run = Run(str(tmp_path / "run"))
    run.prepare()
    return run


@pytest.fixture
def quick(monkeypatch):
    """Hearts that beat ten times a second and are given up after 0.6 s."""
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(leases, "STALE_SECONDS", 0.6)


def holder(run: Run) -> dict:
    return json.loads(run.read_bytes(FILE))


def held_by(run: Run, **changes: object) -> dict:
    """Write the lease of some process: of this one, apart from the changes."""
    mine = json.loads(Lease(run)._content())
    run.write_json({**mine, "token": "another", **changes}, FILE)
    return holder(run)


def ended_pid() -> int:
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


def left_over(run: Run) -> list[str]:
    return [path.name for path in Path(run.uri).iterdir()]


def refusal(run: Run) -> str:
    with pytest.raises(UserError) as caught, Lease(run):
        pass
    return str(caught.value)


def taken_at_once(run: Run, seconds: float = 1.0) -> None:
    """The run is taken within a moment, held by this process, and free afterwards."""
    said: list[str] = []
    start = time.monotonic()
    with Lease(run, said.append) as lease:
        assert time.monotonic() - start < seconds
        lease.check()
        assert holder(run)["token"] == lease.token and holder(run)["pid"] == os.getpid()
    assert said == [] and left_over(run) == []


# One at a time


def test_a_lease_is_there_while_it_is_held_and_gone_after(run):
    with Lease(run) as lease:
        found = holder(run)
        assert found["token"] == lease.token and found["pid"] == os.getpid()
        assert found["host"] == socket.gethostname() and abs(found["heartbeat"] - time.time()) < 5
        assert left_over(run) == [FILE]
        lease.check()
    assert left_over(run) == []
    taken_at_once(run)


def test_a_lease_is_gone_after_an_error_and_the_error_stays(run):
    with pytest.raises(ZeroDivisionError), Lease(run):
        assert left_over(run) == [FILE]
        1 / 0  # noqa: B018
    assert left_over(run) == []


def test_a_second_living_process_is_refused_until_the_first_ends(run, processes):
    (first,) = processes(1)
    assert first.take(run) == "got"
    said = refusal(run)
    assert run.uri in said and f"process {first.popen.pid} " in said and "run the same command again" in said
    assert holder(run)["pid"] == first.popen.pid  # the refused leaves the holder in peace
    first.tell()
    assert first.hear() == "released"
    taken_at_once(run)


def test_the_same_process_cannot_hold_a_run_twice(run):
    with Lease(run) as first:
        assert str(os.getpid()) in refusal(run)
        first.check()


def test_two_runs_are_held_apart(run, tmp_path):
    other = Run(str(tmp_path / "other"))
    other.prepare()
    with Lease(run) as one, Lease(other) as two:
        one.check()
        two.check()


def test_the_heart_beats(run, quick):
    with Lease(run) as lease:
        first = holder(run)
        time.sleep(0.5)
        later = holder(run)
        assert later["heartbeat"] > first["heartbeat"]
        assert {**later, "heartbeat": 0} == {**first, "heartbeat": 0}
        lease.check()
    assert left_over(run) == []


# The dead


def test_the_place_of_a_killed_process_is_taken_at_once(run, processes):
    (first,) = processes(1)
    assert first.take(run) == "got"
    first.popen.send_signal(signal.SIGKILL)
    first.popen.wait()
    assert holder(run)["pid"] == first.popen.pid
    taken_at_once(run)


def test_a_killed_process_whose_parent_has_not_noticed_is_dead_too(run, processes):
    (first,) = processes(1)
    assert first.take(run) == "got"
    first.popen.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, first.popen.pid, os.WEXITED | os.WNOWAIT)  # ended, and not reaped: a zombie
    taken_at_once(run)


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": None},  # nobody has that pid any more
        {"boot_id": "the-boot-before"},
        {"started": "1"},  # the pid was given to another process since
    ],
    ids=["ended", "other boot", "reused pid"],
)
def test_a_holder_on_this_machine_that_is_gone_is_replaced_however_fresh_its_heartbeat(run, changes):
    changes = {key: value or ended_pid() for key, value in changes.items()}
    held_by(run, **changes)
    taken_at_once(run)


def test_the_same_holder_unchanged_is_alive(run):
    """What the three above differ from."""
    held_by(run)
    assert f"process {os.getpid()} on this machine" in refusal(run)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"token": "a', b"null", b"[]", b"7", b"{}", b"\xff\xfe", b'{"token": "a", "pid": "x"}'],
)
def test_a_damaged_lease_belongs_to_nobody(run, content):
    run.write_bytes(content, FILE)
    taken_at_once(run)


# Elsewhere


def test_a_holder_elsewhere_with_an_old_heartbeat_is_replaced_at_once(run):
    held_by(run, host="elsewhere", heartbeat=time.time() - 61)
    taken_at_once(run)


def test_a_fresh_holder_elsewhere_is_waited_for_with_a_message_and_replaced_when_stale(run, quick):
    held_by(run, host="elsewhere", heartbeat=time.time() - 0.1)
    said: list[str] = []
    start = time.monotonic()
    with Lease(run, said.append) as lease:
        assert 0.4 < time.monotonic() - start < 2
        lease.check()
    assert said and all(run.uri in line and "elsewhere" in line and "waiting" in line for line in said)
    assert left_over(run) == []


def test_a_holder_elsewhere_whose_heart_beats_meanwhile_is_left_in_peace(run, quick):
    found = held_by(run, host="elsewhere")

    def beat() -> None:
        time.sleep(0.2)
        run.write_json({**found, "heartbeat": time.time()}, FILE)

    heart = threading.Thread(target=beat)
    heart.start()
    said = refusal(run)
    heart.join()
    assert "elsewhere" in said and str(found["pid"]) in said and "run the same command again" in said
    assert holder(run)["token"] == "another"


def test_a_holder_elsewhere_that_ends_meanwhile_frees_the_run(run, quick, monkeypatch):
    monkeypatch.setattr(leases, "STALE_SECONDS", 60.0)
    held_by(run, host="elsewhere")
    end = threading.Timer(0.2, Path(run.path(FILE)).unlink)
    end.start()
    start = time.monotonic()
    with Lease(run) as lease:
        assert time.monotonic() - start < 5
        lease.check()
    end.join()


def test_a_clock_that_is_ahead_elsewhere_does_not_prolong_the_wait(run, quick):
    held_by(run, host="elsewhere", heartbeat=time.time() + 3600)
    start = time.monotonic()
    with Lease(run):
        assert 0.5 < time.monotonic() - start < 3


# Taken over


def test_check_raises_after_a_takeover_and_the_new_lease_stays(run, quick):
    with Lease(run) as lease:
        lease.check()
        # Written while the heart of this one cannot beat, as after a process that slept for long.
        with lease._alone():
            held_by(run, token="newer", host="elsewhere")
        with pytest.raises(UserError, match="taken over"):
            lease.check()
        time.sleep(0.4)  # beats that must not be written over the newer lease
        assert holder(run)["token"] == "newer"
    assert holder(run)["token"] == "newer"


def test_check_raises_when_the_lease_is_gone(run):
    with Lease(run) as lease:
        Path(run.path(FILE)).unlink()
        with pytest.raises(UserError, match="taken over"):
            lease.check()


# At once


def test_of_eight_processes_at_the_same_moment_exactly_one_gets_the_run(tmp_path, processes):
    """Over a free run and, in turn, over the leases of dead processes of this machine and elsewhere."""
    eight = processes(8)
    dead = [{"pid": ended_pid()}, {"host": "elsewhere", "heartbeat": time.time() - 1000}, None]
    for attempt in range(9):
        run = Run(str(tmp_path / f"run{attempt}"))
        run.prepare()
        if changes := dead[attempt % 3]:
            held_by(run, **changes)
        moment = time.time() + 0.05
        for process in eight:
            process.tell(run.uri, moment)
        answers = [process.hear() for process in eight]
        winners = [process for process, answer in zip(eight, answers, strict=True) if answer == "got"]
        assert len(winners) == 1, answers
        (winner,) = winners
        assert holder(run)["pid"] == winner.popen.pid
        refused = [answer for answer in answers if answer != "got"]
        assert all(f"in use by process {winner.popen.pid} " in answer for answer in refused), answers
        winner.tell()
        assert winner.hear() == "released"  # its check passed: nobody took the run from it
        assert left_over(run) == []


# Stores without links and locks


@pytest.fixture
def store(s3_endpoint, monkeypatch) -> Run:
    """A run on an object store."""
    for name, value in s3.environment(s3_endpoint).items():
        monkeypatch.setenv(name, value)
    s3.fill(s3_endpoint, "lease-test", {})
    run = Run("s3://lease-test/run")
    run.prepare()
    return run


def test_on_an_object_store_a_run_is_held_released_and_refused(store):
    with Lease(store) as lease:
        lease.check()
        assert "in use by process" in refusal(store)
        lease.check()
    assert not store.exists(FILE)


def test_on_an_object_store_the_dead_are_replaced(store):
    held_by(store, pid=ended_pid())
    with Lease(store) as lease:
        lease.check()
    held_by(store, host="elsewhere", heartbeat=time.time() - 61)
    with Lease(store) as lease:
        lease.check()
    assert not store.exists(FILE)
