"""Machines that a plan is made for: kinds of a cluster's description, with what they have and cost."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from selective_ray.errors import UsageError, UserError, named

PRICES = Path(__file__).with_name("prices.toml")
# What Ray sets aside of a machine's memory for its object store, and at most; the rest is for processes.
STORE_SHARE = 0.3
STORE_MOST = 200 * 10**9


@dataclass(frozen=True)
class Machine:
    """A kind of machine.

    memory is what Ray lets processes state, store its object store, disk what it may spill to, all bytes;
    network bytes a second; encode and products floating-point operations a second of each GPU; hour the price
    of one, None where it is there anyway; cpu the speed of one in units of a probed one; most how many there
    may be.
    """

    name: str
    cpus: float
    memory: float
    store: float
    disk: float = 0.0
    network: float = float("inf")
    gpus: float = 0.0
    encode: float = 0.0
    products: float = 0.0
    cpu: float = 1.0
    hour: float | None = None
    most: int | None = None


@dataclass(frozen=True)
class Fleet:
    """Machines of some kinds, and the head that costs while they work.

    start_seconds until the first machine works, and idle_seconds that one is kept without work.
    """

    machines: tuple[tuple[Machine, int], ...]
    head: Machine | None = None
    start_seconds: float = 0.0
    idle_seconds: float = 0.0

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        return ",".join(f"{kind.name}:{count}" for kind, count in self.machines)

    def total(self, what: str) -> float:
        """Return the sum of a quantity over all machines."""
        return sum(getattr(kind, what) * count for kind, count in self.machines)

    @property
    def speed(self) -> float:
        """CPUs, in those of the probe."""
        return sum(kind.cpus * kind.cpu * count for kind, count in self.machines)

    @property
    def holding(self) -> Fleet:
        """The machines that hold embeddings and compare: those with GPUs, where there are any."""
        with_gpus = tuple((kind, count) for kind, count in self.machines if kind.gpus)
        return replace(self, machines=with_gpus or self.machines)

    def room(self, each: float) -> int:
        """Return how many processes that state so many bytes the machines have memory for."""
        return sum(count * int(kind.memory // each) for kind, count in self.machines)


@dataclass(frozen=True)
class Prices:
    """The table of what machines have and cost: its date, that of a thousand requests, and the instances."""

    date: date
    requests: dict[str, float]
    instances: dict[str, dict[str, Any]]
    gpus: dict[str, dict[str, float]]
    assumed: dict[str, float] = field(default_factory=dict)

    def machine(self, name: str, instance: str, *, spot: bool = True, most: int | None = None) -> Machine:
        """Return a kind of machine by its instance type; raises UserError where the table has no such."""
        if instance not in self.instances:
            raise UserError(
                f"the table of prices has no {instance}, which {name} is; add it to a copy of it and give "
                f"that by --prices (it has {named(self.instances, ', ')})"
            )
        has = self.instances[instance]
        gpu = self.gpus[has["gpu"]] if has.get("gpus") else {"encode": 0.0, "products": 0.0}
        memory = has["memory_gib"] * 2**30
        store = min(STORE_SHARE * memory, STORE_MOST)
        return Machine(
            name,
            cpus=has["cpus"],
            memory=memory - store,
            store=store,
            disk=has["disk_gb"] * 1e9,
            network=has["network_gbit"] * 1e9 / 8,
            gpus=has.get("gpus", 0),
            **gpu,
            cpu=self.assumed.get("cpu", 1.0),
            hour=has["spot" if spot else "hour"],
            most=most,
        )


def read_prices(path: str | None = None) -> Prices:
    """Read the table of prices, or another one of the same form; raises UsageError where it is none."""
    file = Path(path) if path else PRICES
    try:
        return Prices(**{k: v for k, v in tomllib.loads(file.read_text()).items() if k != "currency"})
    except FileNotFoundError:
        raise UsageError(f"{file} does not exist; check --prices") from None
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, TypeError) as error:
        raise UsageError(f"{file} is no table of prices ({error}); begin with a copy of {PRICES}") from None


def read_cluster(path: str, prices: Prices) -> tuple[Machine, dict[str, Machine]]:
    """Read a description for Ray's launcher: the head, and the kinds of workers by name.

    Raises UserError where it is no such
    description, or has a kind that the table of prices lacks.
    """
    import yaml

    try:
        described = yaml.safe_load(Path(path).read_text())
        head = described["head_node_type"]
        kinds = {}
        for name, kind in described["available_node_types"].items():
            config = kind["node_config"]
            spot = config.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
            kinds[name] = prices.machine(
                name, config["InstanceType"], spot=spot, most=kind.get("max_workers")
            )
        return kinds.pop(head), kinds
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no description of a cluster for Ray's launcher ({type(error).__name__}: {error}); "
            "check --cluster"
        ) from None


def chosen(
    words: Iterable[str], head: Machine | None, kinds: dict[str, Machine], prices: Prices
) -> list[Fleet]:
    """Read fleets as KIND:COUNT with commas between; raises UsageError where they are none.

    A kind is one of the cluster's description, or an instance type of the table.
    """
    fleets = []
    for word in words:
        machines = []
        for part in word.split(","):
            name, _, count = part.partition(":")
            if not count.isdecimal() or int(count) < 1:
                raise UsageError(f"--on {word!r} is not of the form KIND:COUNT, as gpu_small:4,decode:2")
            if name not in kinds and name not in prices.instances:
                known = [*kinds, *prices.instances]
                raise UsageError(f"--on {word!r}: there is no kind {name!r}; there are {', '.join(known)}")
            kind = kinds.get(name) or prices.machine(name, name)
            if kind.most is not None and int(count) > kind.most:
                raise UsageError(
                    f"--on {word!r}: the cluster has at most {kind.most} of {name}; raise its max_workers"
                )
            machines.append((kind, int(count)))
        waits = (prices.assumed.get(key, 0.0) for key in ("start_seconds", "idle_seconds"))
        fleets.append(Fleet(tuple(machines), head, *waits))
    return fleets
