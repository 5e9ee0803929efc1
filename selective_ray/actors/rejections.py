"""Why images are rejected, how many, and when that is too many."""

from __future__ import annotations

from collections import Counter

from selective_ray.errors import UserError
from selective_ray.store import Run

# Images seen before the share of rejected ones is judged; the end of the stage judges any number.
ENOUGH_TO_JUDGE = 500


class Rejections:
    """Counts the images seen and why some are rejected, and stops a run that goes wrong."""

    def __init__(self, most: float) -> None:
        self.most = most
        self.seen = 0
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        # Of shards that are not written yet: their images are seen again if they are begun again.
        self.open: dict[int, tuple[int, Counter[str]]] = {}

    def add(self, shard: int, seen: int, reasons: Counter[str], examples: dict[str, list[str]]) -> None:
        """Count some images of a shard."""
        self.seen += seen
        self.reasons += reasons
        before, why = self.open.get(shard, (0, Counter()))
        self.open[shard] = (before + seen, why + reasons)
        for reason, uris in examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + uris)[:3]

    def keep(self, shard: int) -> None:
        """Count a shard for good: it is written."""
        self.open.pop(shard, None)

    def forget_open(self) -> None:
        """Leave out the shards that were not written: their images will be seen again."""
        for seen, reasons in self.open.values():
            self.seen -= seen
            self.reasons -= reasons
        self.open = {}

    def check(self, enough: int) -> None:
        """Raise UserError where more than the allowed share is rejected, of at least so many images."""
        rejected = self.reasons.total()
        if not rejected or self.seen < enough or rejected <= self.most * self.seen:
            return
        reason, count = self.reasons.most_common(1)[0]
        raise UserError(
            f"{rejected:,} of {self.seen:,} images are rejected, more than --max-rejected {self.most:.3g}; "
            f"most often ({count:,}): {reason}, as {', '.join(self.examples[reason])}. Mend that, or allow "
            "more with --max-rejected, and run again to continue"
        )


def reasons_of(run: Run, shard: int) -> tuple[Counter[str], dict[str, list[str]]]:
    """Return why images of a finished shard were rejected, and three examples of each reason."""
    reasons: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for row in run.read_shard("rejected", shard, ["uri", "reason"]).to_pylist():
        reasons[row["reason"]] += 1
        if len(some := examples.setdefault(row["reason"], [])) < 3:
            some.append(row["uri"])
    return reasons, examples


def nothing_usable(n: int, reasons: Counter[str]) -> str:
    """Return the sentence for a run in which no image is left."""
    often = "; most often: {} ({} times)".format(*reasons.most_common(1)[0]) if reasons else ""
    return f"none of the {n} images could be used{often}; check --images"
