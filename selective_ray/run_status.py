"""How far a run is, by what lies in its folder: nothing but the store is asked, and nothing is changed."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

from selective_ray import objects
from selective_ray.lease import FILE, STALE_SECONDS
from selective_ray.store import BEGUN, BROUGHT, OPTIONAL, PREDICTED, Run, stage_of

# What stages leave in `work/` as they go on: files of groups of lists, and of iterations.
_PIECE = re.compile(r"(?:group-\d+|iteration)-(\d+)(?:\.\w+)?")


def states(run: Run) -> dict[str, dict[str, Any]]:
    """Return the state of every table of a run: complete, begun (with how far it is), or not begun."""
    found: dict[str, dict[str, Any]] = {}
    for table in (*run.tables(), *BROUGHT, *PREDICTED):
        if manifest := run.manifest(table):
            found[table] = {
                "state": "complete",
                "rows": manifest.rows,
                "seconds": manifest.seconds,
                "fingerprint": manifest.fingerprint,
                "refers_to": manifest.refers_to,
            }
        elif run.exists(table, BEGUN):
            found[table] = {"state": "begun", **_progress(run, table)}
        elif table not in (*OPTIONAL, *BROUGHT, *PREDICTED):
            found[table] = {"state": "not begun"}
    return found


def _progress(run: Run, table: str) -> dict[str, Any]:
    """Return how far a table is: shards, share, rows a second and seconds left; iterations or groups."""
    begun = run.read_json(table, BEGUN) or {"seconds": 0.0, "what": {}}
    shards = len(run.finished_shards(table))
    progress: dict[str, Any] = {"shards": shards, "seconds": round(begun["seconds"], 1)}
    pieces = [m for m in map(_PIECE.fullmatch, objects.names(run.path(table, "work"), run.access)) if m]
    if stage_of(table) == "clusters" and pieces:
        progress["iterations"] = max(int(m[1]) for m in pieces)
    elif pieces:
        progress["groups"] = len(pieces)
    images = run.manifest("images")
    if images and images.shards and table in ("embeddings", "predictions"):
        # All shards but the last have as many rows.
        done = min(images.rows, shards * images.shards[0].rows)
        progress["share"] = round(done / max(1, images.rows), 4)
        if done and begun["seconds"] > 0:
            speed = done / begun["seconds"]
            progress["rows_per_second"] = round(speed, 2)
            progress["seconds_left"] = round((images.rows - done) / speed)
    return progress


def sign_of_life(run: Run) -> dict[str, Any] | None:
    """Return who works on a run, and how many seconds ago it said so; None where no one does.

    The age is by this machine's clock.
    """
    try:
        holder = json.loads(run.read_bytes(FILE))
        age = max(0.0, time.time() - holder["heartbeat"])
        return {"host": holder["host"], "pid": holder["pid"], "seconds_ago": round(age, 1)}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def lines(found: dict[str, dict[str, Any]], alive: dict[str, Any] | None) -> Iterator[str]:
    """Tell it to a person."""
    for table, state in found.items():
        rest = [_words(key, value) for key, value in state.items() if key != "state" and value is not None]
        yield f"{table:<11} {state['state']:<10} {', '.join(rest)}".rstrip()
    if alive:
        silent = alive["seconds_ago"] > STALE_SECONDS
        yield (
            f"process {alive['pid']} on {alive['host']} gave a sign of life {alive['seconds_ago']:.0f} s ago"
            + ("; it has most likely ended: run the same command again" if silent else "")
        )


def _words(key: str, value: Any) -> str:
    match key:
        case "share":
            return f"{value:.1%} done"
        case "rows_per_second":
            return f"{value:,.1f} rows/s"
        case "seconds_left":
            return f"{value / 60:,.0f} min left"
        case _:
            return f"{key} {value}"
