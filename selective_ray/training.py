"""A training in its folder of a run: what is trained, its checkpoints, and its metrics.

    training/NAME/begun.json                    what is being trained, and on which labels
    training/NAME/step-00001024-<sha256>.pt     the last few checkpoints, whole or not there
    training/NAME/metrics.jsonl                 a line for every few steps, and for every evaluation
    training/NAME/tensorboard/                  the same numbers for TensorBoard
    training/NAME/manifest.json                 when the last step is done

Metrics are written before the checkpoint that they lead up to, and lines beyond the checkpoint that a
training continues from are dropped: so there is no gap and no line twice.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selective_ray import objects
from selective_ray.errors import UserError
from selective_ray.store import BEGUN, MANIFEST, Manifest, Run, differences, fingerprint

_CHECKPOINT = re.compile(r"step-(\d{8,})-([0-9a-f]{16})\.pt")
_EVENTS = re.compile(r"events\.out\.tfevents\.(\d{10})")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Checkpoints that are kept: should the last be damaged, there is one before.
KEPT = 3
METRICS, EVENTS = "metrics.jsonl", "tensorboard"


def name_of(step: int, sha256: str) -> str:
    """Name of a checkpoint's file."""
    return f"step-{step:08d}-{sha256[:16]}.pt"


@dataclass(frozen=True)
class Training:
    """One training of a run."""

    run: Run
    name: str

    @property
    def table(self) -> str:
        """Its folder in the run."""
        return f"training/{self.name}"

    def begin(self, what: dict[str, Any], inputs: dict[str, str]) -> Manifest | None:
        """Claim the folder; returns the manifest where the training is complete.

        Raises UserError where it was begun with another configuration or other labels.
        """
        wanted = fingerprint("training", what, inputs)
        theirs = self.run.read_json(self.table, MANIFEST) or self.run.read_json(self.table, BEGUN)
        if theirs and theirs["fingerprint"] != wanted:
            keys = differences({**what, "inputs": inputs}, {**theirs["what"], "inputs": theirs["inputs"]})
            raise UserError(
                f"{self.run.path(self.table)} was begun with another configuration or other labels: "
                f"{'; '.join(keys)}. Give this training another --name"
            )
        if not theirs:
            begun = {
                "stage": "training",
                "what": what,
                "inputs": inputs,
                "fingerprint": wanted,
                "seconds": 0.0,
            }
            self.run.write_json(begun, self.table, BEGUN)
        return self.run.manifest(self.table)

    def fingerprint(self) -> str:
        """Fingerprint of a training that was begun."""
        found = self.run.read_json(self.table, MANIFEST) or self.run.read_json(self.table, BEGUN)
        return found["fingerprint"]

    def checkpoints(self) -> list[tuple[int, str]]:
        """Return step and name of each checkpoint, the newest first."""
        names = objects.names(self.run.path(self.table), self.run.access)
        return sorted(((int(m[1]), m[0]) for m in map(_CHECKPOINT.fullmatch, names) if m), reverse=True)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the checkpoint of a step, and remove those that are older than the last few."""
        import torch

        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        self.run.write_bytes(data, self.table, name_of(step, hashlib.sha256(data).hexdigest()))
        for _, old in self.checkpoints()[KEPT:]:
            self.run.delete(self.table, old)

    def newest(self, say: Callable[[str], None]) -> tuple[int, dict[str, Any] | None]:
        """Return the newest checkpoint that is whole, with its step; 0 and None where there is none.

        A damaged one is told of, and the one before is taken.
        """
        import torch

        step, data = self._whole(say)
        if data is None:
            return 0, None
        return step, torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)

    def newest_step(self) -> int:
        """Return the step of the newest checkpoint that is whole; 0 where there is none."""
        return self._whole(lambda words: None)[0]

    def _whole(self, say: Callable[[str], None]) -> tuple[int, bytes | None]:
        for step, name in self.checkpoints():
            data = self.run.read_bytes(self.table, name)
            if name_of(step, hashlib.sha256(data).hexdigest()) == name:
                return step, data
            say(f"checkpoint {self.run.path(self.table, name)} is damaged; the one before it is taken")
        return 0, None

    def metrics(self, upto: int | None = None) -> list[dict[str, Any]]:
        """Return the lines of the metrics, those of steps beyond `upto` left out."""
        try:
            text = self.run.read_bytes(self.table, METRICS).decode()
        except (FileNotFoundError, NotADirectoryError):
            return []
        lines = [json.loads(line) for line in text.splitlines()]
        return lines if upto is None else [line for line in lines if line["step"] <= upto]

    def write_metrics(self, lines: list[dict[str, Any]], new: int) -> None:
        """Write all lines of the metrics; the last `new` of them also as a file for TensorBoard."""
        self.run.write_bytes("".join(json.dumps(line) + "\n" for line in lines).encode(), self.table, METRICS)
        if new:
            name = f"events.out.tfevents.{lines[-new]['step']:010d}"
            self.run.write_bytes(_events(lines[-new:]), self.table, EVENTS, name)

    def clean(self, beyond: int) -> None:
        """Remove what was written for TensorBoard of steps beyond one, and what was left half written."""
        for name in objects.names(self.run.path(self.table, EVENTS), self.run.access):
            found = _EVENTS.fullmatch(name)
            if not found or int(found[1]) > beyond:
                self.run.delete(self.table, EVENTS, name)
        for name in objects.names(self.run.path(self.table), self.run.access):
            if name.endswith(".tmp"):
                self.run.delete(self.table, name)


def _events(lines: list[dict[str, Any]]) -> bytes:
    """Return a file of TensorBoard with the single numbers of some lines."""
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        writer = SummaryWriter(folder)
        for line in lines:
            for key, value in line.items():
                if isinstance(value, float):
                    writer.add_scalar(key, value, line["step"])
        writer.close()
        (file,) = Path(folder).iterdir()
        return file.read_bytes()
