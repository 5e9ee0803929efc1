"""Watch for EC2's notice that this spot machine is taken away, and drain its Ray node.

    python -m selective_ray.actors.interruption

Ray starts nothing new on a node that drains, and tells those who train on it. EC2 gives its notice two
minutes ahead, over the metadata service of the machine; it may also take a machine without one. Needs nothing
of Ray before that, so that the node can be idle.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime

METADATA = "http://169.254.169.254"
# EC2 advises to look every five seconds.
LOOK_SECONDS = 5.0
TOKEN_SECONDS = 21_600


class Metadata:
    """The metadata service of a machine (IMDSv2), or one that answers like it."""

    def __init__(self, endpoint: str = METADATA) -> None:
        self.endpoint, self.token, self.until = endpoint, "", 0.0

    def _ask(self, path: str, method: str, headers: dict[str, str]) -> str:
        request = urllib.request.Request(f"{self.endpoint}/latest/{path}", method=method, headers=headers)
        # Never by way of a proxy: the address means this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=2) as answer:
            return answer.read().decode()

    def notice(self) -> tuple[str, datetime] | None:
        """Return what will be done to this machine, and when; None while nothing is announced."""
        if time.monotonic() > self.until:
            asked = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
            self.token = self._ask("api/token", "PUT", asked)
            self.until = time.monotonic() + TOKEN_SECONDS / 2
        try:
            headers = {"X-aws-ec2-metadata-token": self.token}
            found = json.loads(self._ask("meta-data/spot/instance-action", "GET", headers))
        except urllib.error.HTTPError as error:
            if error.code == 401:
                self.until = 0.0
            if error.code in (401, 404):
                return None
            raise
        return found["action"], datetime.fromisoformat(found["time"])


def drain(seconds: float, action: str, node_id: str | None = None) -> None:
    """Drain this machine's node, which has so many seconds left."""
    words = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
    words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", f"EC2 will {action} it"]
    words += ["--deadline-remaining-seconds", str(max(0, int(seconds)))]
    words += ["--node-id", node_id] if node_id else []
    subprocess.run(words, check=True, timeout=60)


def watch(metadata: Metadata, node_id: str | None = None, every: float = LOOK_SECONDS) -> None:
    """Look until there is a notice, and drain the node; returns then."""
    while True:
        try:
            notice = metadata.notice()
        except (OSError, ValueError) as error:
            print(f"the metadata service does not answer: {error}", flush=True)  # noqa: T201
            notice = None
        if notice:
            action, at = notice
            left = (at - datetime.now(UTC)).total_seconds()
            print(f"EC2 will {action} this machine in {left:.0f} s: draining", flush=True)  # noqa: T201
            try:
                drain(left, action, node_id)
                return
            except (subprocess.SubprocessError, OSError) as error:
                print(f"not drained yet: {error}", flush=True)  # noqa: T201
        time.sleep(every)


def main() -> None:
    """Watch this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--endpoint", default=METADATA, help="another metadata service, for tests")
    parser.add_argument("--node-id", help="the node to drain (default: that of this machine)")
    given = parser.parse_args()
    watch(Metadata(given.endpoint), given.node_id)


if __name__ == "__main__":
    main()
