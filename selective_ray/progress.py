"""What is seen of a run while it works: a bar, lines in a log, JSON for machines, and who else follows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from selective_ray.errors import UserError

# Seconds from one line of a log to the next, and from one telling of progress to those that follow.
LINE_SECONDS = 30.0
FOLLOW_SECONDS = 1.0


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {task.fields['unit']}/s" if speed else "", style="cyan")


@dataclass(frozen=True)
class Event:
    """What happened in a stage: in words, if any; numbers by their names; of which shard, if of one."""

    stage: str
    what: str
    numbers: dict[str, float]
    shard: int | None = None


class Watch:
    """One stage's progress; `advance` is called with the units done since the last call."""

    def __init__(self, bar: Progress | None, task: int | None) -> None:
        self.bar, self.task = bar, task
        self.note = ""
        self.name, self.unit, self.total, self.done = "", "units", None, 0.0
        # When something was last heard of the stage, and told to those that follow.
        self.heard = self.followed = time.monotonic()
        self.follow: Callable[[Event], None] | None = None

    def advance(self, units: float) -> None:
        """Count units as done."""
        self.done += units
        self.heard = time.monotonic()
        if self.bar:
            self.bar.advance(self.task, units)
        if self.heard - self.followed >= FOLLOW_SECONDS:
            self.followed = self.heard
            share = {"share": self.done / self.total} if self.total else {}
            self.tell("", **{self.unit: self.done}, **share)

    def say(self, note: str) -> None:
        """Show a few words beside the bar."""
        self.heard = time.monotonic()
        if self.bar:
            self.bar.update(self.task, note=note)

    def tell(self, what: str, *, shard: int | None = None, **numbers: float) -> None:
        """Tell those that follow what happened, in words and numbers."""
        if self.follow:
            self.follow(Event(self.name, what, numbers, shard))


class _Lines(Watch):
    """Progress where there is no terminal, as in the log of a job: a line now and then."""

    def __init__(self, write: Callable[[str], None], done: float) -> None:
        super().__init__(None, None)
        self.write, self.first = write, done
        self.began = self.told = time.monotonic()

    def advance(self, units: float) -> None:
        super().advance(units)
        now = time.monotonic()
        if now - self.told < LINE_SECONDS:
            return
        self.told = now
        words = f"{self.name} {self.done:,.0f}"
        speed = (self.done - self.first) / (now - self.began)
        if self.total:
            words += f" of {self.total:,.0f} {self.unit} ({self.done / self.total:.0%})"
            left = max(0.0, self.total - self.done) / speed if speed else 0.0
            words += f", {speed:,.3g}/s, {left / 60:,.0f} min left"
        else:
            words += f" {self.unit}, {speed:,.3g}/s"
        words += f"; {self.note}" if self.note else ""
        self.write(words)

    def say(self, note: str) -> None:
        super().say(note)
        self.note = note


class Reporter:
    """Talks to the person: bars and messages on a terminal, lines and warnings elsewhere; not with quiet.

    structured: every line is a JSON object, with time, level, run, stage, shard, message and numbers.
    """

    def __init__(self, *, quiet: bool = False, structured: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.warnings: list[str] = []
        self.structured = structured
        # The run that is worked on, and its stage.
        self.run = ""
        self.watch: Watch | None = None
        self.followers: list[Callable[[Event], None]] = [self._log_event] if structured else []

    @property
    def watched(self) -> bool:
        """Whether there is a terminal to draw on."""
        return self.console.is_terminal and not self.console.quiet and not self.structured

    @contextmanager
    def stage(self, name: str, total: float | None, unit: str, done: float = 0) -> Iterator[Watch]:
        """Show a bar for a stage of `total` units, `done` of them by earlier attempts; None: not known."""
        with self._drawn(name, total, unit, done) as watch:
            watch.name, watch.total, watch.unit, watch.done = name, total, unit, float(done)
            watch.follow = self._follow
            self.watch = watch
            watch.tell("begins", **{unit: done}, **({"of": total} if total else {}))
            try:
                yield watch
            finally:
                self.watch = None

    def _follow(self, event: Event) -> None:
        for follower in self.followers:
            follower(event)

    def _log_event(self, event: Event) -> None:
        if event.what:
            self._log("info", event.what, event.shard, event.numbers)

    def _log(
        self, level: str, message: str, shard: int | None = None, numbers: dict[str, float] | None = None
    ) -> None:
        if not self.console.quiet:
            told = {
                "time": round(time.time(), 3),
                "level": level,
                "run": self.run,
                "stage": self.watch.name if self.watch else None,
                "shard": shard,
                "message": message,
                **(numbers or {}),
            }
            self.console.file.write(json.dumps(told) + "\n")
            self.console.file.flush()

    def _print(self, message: str) -> None:
        if self.structured:
            self._log("info", message)
        else:
            self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def _drawn(self, name: str, total: float | None, unit: str, done: float) -> Iterator[Watch]:
        if self.console.quiet:
            yield Watch(None, None)
            return
        if not self.watched:
            yield _Lines(self._print, done)
            return
        share = (
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
        )
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            *((TextColumn("{task.completed:,.0f} {task.fields[unit]}"),) if total is None else share),
            _Rate(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task(name, total=total, unit=unit, note="", completed=done)
            yield Watch(bar, task)

    def say(self, message: str) -> None:
        """Tell a person who watches."""
        if self.watched:
            self.console.print(message, style="dim", markup=False, highlight=False)

    def tell(self, message: str) -> None:
        """Tell whoever looks, or reads the log."""
        self._print(message)

    def warn(self, message: str) -> None:
        """Tell of something unexpected that does not stop the run; the summary repeats it."""
        self.warnings.append(message)
        if self.structured:
            self._log("warning", message)
            return
        self.console.print(
            f"warning: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True
        )


def one_line(error: UserError) -> str:
    """Return the message of an error as one line that any terminal can show."""
    return " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode()
