"""What a person sees while a run works: rate, share done, time left, as a bar or as lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from selective_ray.errors import UserError

# Seconds from one line of a log to the next.
LINE_SECONDS = 30.0


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {task.fields['unit']}/s" if speed else "", style="cyan")


class Watch:
    """One stage's progress; `advance` is called with the units done since the last call."""

    def __init__(self, bar: Progress | None, task: int | None) -> None:
        self.bar, self.task = bar, task
        self.note = ""

    def advance(self, units: float) -> None:
        """Count units as done."""
        if self.bar:
            self.bar.advance(self.task, units)

    def say(self, note: str) -> None:
        """Show a few words beside the bar."""
        if self.bar:
            self.bar.update(self.task, note=note)


class _Lines(Watch):
    """Progress where there is no terminal, as in the log of a job: a line now and then."""

    def __init__(self, console: Console, name: str, total: float | None, unit: str, done: float) -> None:
        super().__init__(None, None)
        self.console, self.name, self.total, self.unit = console, name, total, unit
        self.done = self.first = done
        self.began = self.told = time.monotonic()

    def advance(self, units: float) -> None:
        self.done += units
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
        self.console.print(words, markup=False, highlight=False, soft_wrap=True)

    def say(self, note: str) -> None:
        self.note = note


class Reporter:
    """Talks to the person: bars and messages on a terminal, lines and warnings elsewhere; not with quiet."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.warnings: list[str] = []

    @property
    def watched(self) -> bool:
        """Whether there is a terminal to draw on."""
        return self.console.is_terminal and not self.console.quiet

    @contextmanager
    def stage(self, name: str, total: float | None, unit: str, done: float = 0) -> Iterator[Watch]:
        """Show a bar for a stage of `total` units, `done` of them by earlier attempts; None: not known."""
        if self.console.quiet:
            yield Watch(None, None)
            return
        if not self.watched:
            yield _Lines(self.console, name, total, unit, done)
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
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        """Tell of something unexpected that does not stop the run; the summary repeats it."""
        self.warnings.append(message)
        self.console.print(
            f"warning: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True
        )


def one_line(error: UserError) -> str:
    """Return the message of an error as one line that any terminal can show."""
    return " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode()
