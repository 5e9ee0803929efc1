"""Run a command on a cluster as a job: pack the small files it names, submit it, and follow its log.

The job goes on without this process. Nothing secret travels: a job finds its credentials where it runs.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from ray.job_submission import JobStatus, JobSubmissionClient

from selective_ray.errors import UserError, first_line

# Options whose local files travel with the job; all other paths must be reachable from the cluster, and are
# those of here: a job runs in a folder of its own.
FILES = ("--config", "--labeled", "--labels", "--truth", "--validation", "--checkpoint")
PATHS = (*FILES, "--images", "--embeddings", "--since", "--run")
# More than this does not belong into a job's folder.
LARGEST_BYTES = 256 << 20
# The address of the Jobs API on the head, as a tunnel to it has it, too.
ADDRESS = "http://127.0.0.1:8265"
RECONNECT_SECONDS = 3.0
# A head that has just been started has no agent yet that could start a job.
PATIENCE_SECONDS = 120.0
# A cluster that does not answer for so long is not waited for.
GONE_SECONDS = 300.0


@dataclass(frozen=True)
class Packed:
    """A command as the cluster runs it: its words, and the files that go with it by their names there."""

    words: list[str]
    files: dict[str, Path]

    @property
    def name(self) -> str:
        """The same for the same command with the same files."""
        digest = hashlib.sha256(repr(self.words).encode())
        for file in self.files.values():
            digest.update(file.read_bytes())
        return f"selective-ray-{self.words[0]}-{digest.hexdigest()[:12]}"


def pack(words: list[str]) -> Packed:
    """Replace local files that options name by names in the job's folder, and make other paths absolute.

    Raises UserError where a file is too large to travel.
    """
    packed, files, option = [], {}, ""
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name in PATHS:
            packed.append(f"{name}={_there(name, value, files)}")
        else:
            packed.append(_there(option, word, files))
        option = word
    return Packed(packed, files)


def _there(option: str, value: str, files: dict[str, Path]) -> str:
    """Return the value of an option as the job knows it; a file that travels is added to the files."""
    path = Path(value)
    if option in FILES and path.is_file():
        if path.stat().st_size > LARGEST_BYTES:
            raise UserError(
                f"{path} is too large to travel with a job; put it into object storage and give its uri"
            )
        name = f"{len(files)}-{path.name}"
        files[name] = path
        return name
    local = option in PATHS or (option == "--encoder" and path.is_dir())
    return str(path.absolute()) if local and "://" not in value else value


def submit(words: list[str], address: str | None, say: Callable[[str], None], *, wait: bool = True) -> int:
    """Submit a command, or find it where it runs already, and follow it; returns the exit status.

    Raises UserError where no cluster answers. Interrupted, it raises KeyboardInterrupt and the job goes on.
    """
    # Of packages and websockets.
    logging.getLogger("ray").setLevel(logging.WARNING)
    packed = pack(words)
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS
    try:
        client = JobSubmissionClient(address)
        jobs = client.list_jobs()
    except (ConnectionError, RuntimeError, OSError) as error:
        raise UserError(
            f"no cluster answers at {address} ({first_line(error)}); open a tunnel to its head, as `ray "
            "dashboard cluster.yaml` does, or give --job-address"
        ) from None
    earlier = [job for job in jobs if (job.submission_id or "").rpartition("-")[0] == packed.name]
    running = [job.submission_id for job in earlier if not job.status.is_terminal()]
    if running:
        job = running[0]
        say(f"this command runs already, as job {job}")
    else:
        job = _start(client, packed, len(earlier))
        say(f"submitted as job {job}")
    for line in _hints(job, address):
        say(line)
    return _follow(client, job, address) if wait else 0


def _start(client: JobSubmissionClient, packed: Packed, attempt: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        # Never empty, for which Ray would take something else.
        (Path(folder) / "command.txt").write_text(shlex.join(packed.words))
        for name, file in packed.files.items():
            shutil.copy(file, Path(folder) / name)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return client.submit_job(
                    entrypoint=shlex.join(["python", "-m", "selective_ray", *packed.words]),
                    submission_id=f"{packed.name}-{attempt}",
                    runtime_env={"working_dir": folder, "env_vars": {"PYTHONUNBUFFERED": "1"}},
                    metadata={"command": shlex.join(packed.words)[:1000]},
                )
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise UserError(f"the cluster does not take the job: {first_line(error)}") from None
                time.sleep(RECONNECT_SECONDS)


def _hints(job: str, address: str) -> list[str]:
    there = f"--address {address} {job}"
    return [
        f"to look again     ray job logs --follow {there}",
        f"to stop it        ray job stop {there}",
        "to go on          submit the same command again: what is done stays done",
    ]


def _follow(client: JobSubmissionClient, job: str, address: str) -> int:
    """Print the log until the job ends, over lost connections; returns the exit status of its command.

    Raises UserError where the job fails, or the cluster is gone for GONE_SECONDS.
    """
    printed, answered = 0, time.monotonic()
    while True:
        try:
            printed = asyncio.run(_print_log(client, job, printed))
            info = client.get_job_info(job)
            if info.status.is_terminal():
                break
            answered = time.monotonic()
        except (ConnectionError, RuntimeError, OSError, aiohttp.ClientError) as error:
            # The head, or the way to it, is gone for now; the job may not be.
            if time.monotonic() - answered > GONE_SECONDS:
                raise UserError(
                    f"the cluster at {address} has not answered for {GONE_SECONDS:.0f} s "
                    f"({first_line(error)}); where it is there, job {job} goes on: open the way to it and "
                    "submit the same command to follow it again. Where it is gone, submit it to another: the "
                    "run goes on where it was"
                ) from None
        time.sleep(RECONNECT_SECONDS)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        raise UserError(f"job {job} was stopped; submit the same command again to go on")
    if info.driver_exit_code in (1, 2):
        # Its last line has said why.
        return info.driver_exit_code
    raise UserError(f"job {job} failed: {info.message}; submit the same command again to go on")


async def _print_log(client: JobSubmissionClient, job: str, printed: int) -> int:
    """Print what is beyond so many characters of a job's log, as it comes; returns how many there are."""
    seen = 0
    async for text in client.tail_job_logs(job):
        new = text[max(0, printed - seen) :]
        seen += len(text)
        print(new, end="", flush=True)  # noqa: T201
        printed = max(printed, seen)
    return printed
