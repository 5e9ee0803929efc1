"""What a run will take, before it does: time, memory, requests and money of each stage.

Counted by the functions that plan a run (`ivf.plan`, `Plan.holder_bytes`, `kmeans.holder_bytes`), at the
rates that a probe measured. GPUs that the probe did not have work at the rates of the table of prices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from selective_ray import ivf, kmeans, memory, two_level
from selective_ray.config import Config
from selective_ray.listing import PIECE_ROWS, shard_rows
from selective_ray.machines import Fleet, Machine
from selective_ray.survey import Survey

# Bytes of a row in the run's folder beside its embedding: uri, version, digest, density, cluster.
ROW_BYTES = 150
# Batches that each decoder has on its way to the encoders.
BATCHES_UNDER_WAY = 8
# A CPU of a machine whose encoders have GPUs goes to decoding, but for this much for each encoder.
CPUS_OF_GPU_ENCODER = 0.1
# More machines of a kind than this are not looked for.
MOST_MACHINES = 1_000


@dataclass(frozen=True)
class Rates:
    """What a probe measured, by so many CPUs, GPUs, and workers that hold embeddings.

    Seconds of starting: Ray; encoders; holders; clustering and selecting, whatever the rows. A second:
    list_rows of one process; embed_rows of all encoders and decoders together; decode_rows of a CPU;
    encode_rows of an encoder; join_products and products (of vectors, as the join and K-Means make them) of
    all workers together. row_seconds, cluster_seconds, select_seconds: of a worker, for what else a stage
    does with a row. pixel_bytes and encode_flops of an image as the encoder sees it; d the dimension;
    rejected the share of the images. iterations of K-Means, of which the second and later take later_share as
    long as the first. select_clusters of the stand-in that was selected from.
    """

    cpus: float
    gpus: float
    workers: int
    d: int
    ray_seconds: float = 0.0
    list_rows: float = 0.0
    encoder_seconds: float = 0.0
    embed_rows: float = 0.0
    decode_rows: float = 0.0
    encode_rows: float = 0.0
    encode_flops: float = 0.0
    pixel_bytes: int = 0
    rejected: float = 0.0
    holder_seconds: float = 0.0
    join_products: float = math.inf
    row_seconds: float = 0.0
    products: float = math.inf
    later_share: float = 1.0
    iterations: int = 1
    cluster_seconds: float = 0.0
    select_seconds: float = 0.0
    select_clusters: int = 0
    cluster_start: float = 0.0
    select_start: float = 0.0


@dataclass(frozen=True)
class Stage:
    """What a stage takes: seconds, and what they are spent on; machine_seconds of each kind of machine.

    workers that state worker_bytes each to Ray; store_bytes in its object store; requests to stores, by kind.
    """

    name: str
    seconds: float
    limit: str
    machine_seconds: dict[str, float]
    workers: int
    worker_bytes: int
    store_bytes: int
    requests: dict[str, int]
    dollars: float = 0.0


@dataclass(frozen=True)
class Planned:
    """A run on a fleet. refused: why it does not fit, and what would; nothing where it fits.

    seconds and dollars are of everything, the start of machines and what idle ones cost included.
    """

    on: str
    images: int
    nbytes: int
    run_bytes: int
    disk_bytes: int
    stages: tuple[Stage, ...]
    seconds: float
    dollars: float
    refused: tuple[str, ...] = field(default=())


def plan(
    rates: Rates,
    config: Config,
    fleet: Fleet,
    *,
    survey: Survey | None = None,
    n: int = 0,
    requests: dict[str, float] | None = None,
    kinds: Iterable[Machine] = (),
) -> Planned:
    """Plan a run over what was surveyed, or over n embeddings that are there.

    requests: the price of a thousand, by kind. kinds: machines to look among where the fleet is too small.
    """
    made = []
    if survey:
        made += [_list(survey, rates, config, fleet), _embed(survey, rates, config, fleet)]
        n = round(survey.images * (1 - rates.rejected))
    holding = Holding(n, rates, config, fleet.holding)
    made += holding.stages()
    made = [replace(stage, dollars=_dollars(stage, fleet, requests or {})) for stage in made]
    seconds = fleet.start_seconds + sum(stage.seconds for stage in made)
    paid = sum((kind.hour or 0.0) * count for kind, count in fleet.machines)
    head = (fleet.head.hour or 0.0) * (seconds + fleet.idle_seconds) / 3600 if fleet.head else 0.0
    return Planned(
        on=fleet.name,
        images=survey.images if survey else n,
        nbytes=survey.nbytes if survey else 0,
        run_bytes=n * (_itemsize(config) * rates.d + ROW_BYTES),
        disk_bytes=holding.spilled_bytes,
        stages=tuple(made),
        seconds=seconds,
        dollars=sum(stage.dollars for stage in made)
        + paid * (fleet.start_seconds + fleet.idle_seconds) / 3600
        + head,
        refused=tuple(holding.refusals(kinds)),
    )


def _itemsize(config: Config) -> int:
    return 2 if config.embed.dtype == "float16" else 4


def _dollars(stage: Stage, fleet: Fleet, requests: dict[str, float]) -> float:
    hours = {kind.name: kind.hour or 0.0 for kind, _ in fleet.machines}
    return sum(seconds * hours[name] / 3600 for name, seconds in stage.machine_seconds.items()) + sum(
        count * requests.get(kind, 0.0) / 1000 for kind, count in stage.requests.items()
    )


def _machine_seconds(fleet: Fleet, seconds: float) -> dict[str, float]:
    return {kind.name: count * seconds for kind, count in fleet.machines}


def _shards(n: int, config: Config) -> int:
    return -(-n // shard_rows(n, config.resources.shard_rows))


def _list(survey: Survey, rates: Rates, config: Config, fleet: Fleet) -> Stage:
    """Listing is done where there are no GPUs, as far as there are such machines."""
    without = tuple((kind, count) for kind, count in fleet.machines if not kind.gpus)
    fleet = replace(fleet, machines=without or fleet.machines)
    at_once = fleet.speed if survey.parts else 1.0
    seconds = rates.ray_seconds + survey.images / (rates.list_rows * at_once)
    shards, pieces = _shards(survey.images, config), -(-survey.images // PIECE_ROWS)
    return Stage(
        *("list", seconds, "listing", _machine_seconds(fleet, seconds)),
        workers=int(fleet.speed),
        worker_bytes=0,
        store_bytes=0,
        requests={"list": survey.list_requests, "put": pieces + shards, "get": pieces},
    )


def _embed(survey: Survey, rates: Rates, config: Config, fleet: Fleet) -> Stage:
    gpus = _gpus(config, fleet)
    if gpus:
        workers = int(gpus)
        # What the stage loses beside decoding and encoding alone, where both shared the CPUs of the probe.
        alone = rates.cpus / (1 / rates.decode_rows + 1 / rates.encode_rows)
        kept = 1.0 if rates.gpus else min(1.0, rates.embed_rows / alone)
        decoding = (fleet.speed - CPUS_OF_GPU_ENCODER * gpus) * rates.decode_rows * kept
        speeds = {"decoding": decoding, "encoding": _encoding(rates, fleet, gpus)}
    else:
        workers = _workers(config) or int(fleet.total("cpus"))
        # Encoders and decoders share the CPUs.
        limit = "encoding" if rates.encode_rows < rates.decode_rows else "decoding"
        speeds = {limit: rates.embed_rows * fleet.speed / rates.cpus}
    speeds["network"] = fleet.total("network") * survey.images / max(1, survey.nbytes)
    limit = min(speeds, key=speeds.get)
    shards = _shards(survey.images, config)
    waves = -(-shards // memory.shards_per_wave(workers))
    seconds = waves * rates.encoder_seconds + survey.images / speeds[limit]
    under_way = BATCHES_UNDER_WAY * config.embed.batch * rates.pixel_bytes
    return Stage(
        *("embed", seconds, limit, _machine_seconds(fleet, seconds)),
        workers=workers,
        worker_bytes=memory.encoder_bytes(config.resources.memory),
        store_bytes=int(fleet.total("cpus")) * under_way,
        requests={"get": survey.get_requests + 2 * shards, "put": 3 * shards},
    )


def _workers(config: Config) -> int | None:
    """How many workers were asked for; where machines come as they are asked for, the fleet says how many."""
    return None if config.resources.autoscale else config.resources.workers


def _gpus(config: Config, fleet: Fleet) -> float:
    return 0.0 if config.resources.gpus_per_worker == 0 else fleet.total("gpus")


def _encoding(rates: Rates, fleet: Fleet, gpus: float) -> float:
    """Images a second of all GPUs: as measured where the probe had some, else by operations."""
    if rates.gpus:
        return rates.encode_rows * gpus
    return sum(kind.gpus * count * kind.encode for kind, count in fleet.machines) / rates.encode_flops


@dataclass(frozen=True)
class Holding:
    """The stages whose workers hold the n embeddings, on the machines that hold them."""

    n: int
    rates: Rates
    config: Config
    fleet: Fleet

    @property
    def workers(self) -> int:
        """How many there are: one for each GPU, else for each CPU, and none without a shard."""
        gpus = _gpus(self.config, self.fleet)
        return max(
            1,
            min(_workers(self.config) or int(gpus or self.fleet.total("cpus")), _shards(self.n, self.config)),
        )

    @property
    def rows(self) -> int:
        """Rows of the worker that has the most."""
        each = -(-_shards(self.n, self.config) // self.workers)
        return min(self.n, each * shard_rows(self.n, self.config.resources.shard_rows))

    @property
    def search(self) -> ivf.Plan:
        """How neighbors are searched."""
        settings = self.config.density
        made = ivf.plan_for(settings, self.n, self.rates.d, min(settings.k, self.n))
        return replace(made, workers=self.workers)

    @property
    def store_bytes(self) -> int:
        """Bytes of all groups of rows, as they are joined."""
        return self.search.moved_bytes(_itemsize(self.config))

    @property
    def spilled_bytes(self) -> int:
        """What of these the object stores do not hold."""
        return max(0, self.store_bytes - int(self.fleet.total("store")))

    @property
    def worker_bytes(self) -> dict[str, int]:
        """Bytes that a worker states, by stage."""
        clusters = max(self.config.selection.every_budget(), default=1)
        return {
            "density": self.search.holder_bytes(self.rows, self.workers),
            "cluster": kmeans.holder_bytes(self.rows, self.rates.d, clusters),
        }

    @property
    def fits(self) -> bool:
        """Whether memory and disks suffice."""
        enough = self.fleet.room(max(self.worker_bytes.values())) >= self.workers
        return enough and self.spilled_bytes <= self.fleet.total("disk")

    def refusals(self, kinds: Iterable[Machine]) -> Iterator[str]:
        """Say why it does not fit, and how many machines of the kinds here or of others would do."""
        if self.fits:
            return
        needed = max(self.worker_bytes, key=self.worker_bytes.get)
        each = self.worker_bytes[needed]
        room = self.fleet.room(each)
        if room < self.workers:
            why = (
                f"{needed}: {self.workers} workers that hold the embeddings take {each / 1e9:.1f} GB each, "
                f"and {self.fleet.name} has memory for {room}"
            )
        else:
            why = (
                f"density: {self.spilled_bytes / 1e9:.0f} GB do not fit into the object stores of "
                f"{self.fleet.name}, and its disks hold {self.fleet.total('disk') / 1e9:.0f} GB"
            )
        others = [kind for kind, _ in self.fleet.machines if kind.hour is not None]
        enough = [f"{kind.name}:{count}" for kind, count in self._enough([*others, *kinds])]
        yield why + (f"; {' or '.join(enough)} would do" if enough else "; no kind of machine here would do")

    def _enough(self, kinds: list[Machine]) -> Iterator[tuple[Machine, int]]:
        """Yield kinds with the smallest number of machines that do."""
        for kind in {kind.name: kind for kind in kinds}.values():
            low, high = 0, 1
            while high <= MOST_MACHINES and not self._with(kind, high).fits:
                low, high = high, 2 * high
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if self._with(kind, middle).fits else (middle, high)
            if self._with(kind, high).fits:
                yield kind, high

    def _with(self, kind: Machine, count: int) -> Holding:
        return replace(self, fleet=replace(self.fleet, machines=((kind, count),)))

    # Seconds

    def stages(self) -> Iterator[Stage]:
        """Yield density, and clusters and selection of every budget."""
        yield self._stage("density", *self._density(), store_bytes=self.store_bytes)
        for budget in self.config.selection.every_budget():
            yield self._stage("cluster", *self._cluster(budget))
            each = self.rates.select_seconds
            swaps = self.config.selection.method == "prototypes"
            if swaps:
                # Rows are compared with all picks, of which the stand-in had so many.
                each *= budget / max(1, self.rates.select_clusters)
            seconds = self.rates.select_start + self._rows(each)
            yield self._stage("select", seconds, "passes" if swaps else "rounds")

    def _stage(self, name: str, seconds: float, limit: str, *, store_bytes: int = 0) -> Stage:
        shards = _shards(self.n, self.config)
        written = {"density": shards + self.search.groups, "cluster": shards}.get(name, 2)
        read = {"density": 3 * shards + self.search.groups}.get(name, 1)
        return Stage(
            *(name, seconds, limit, _machine_seconds(self.fleet, seconds)),
            workers=self.workers,
            worker_bytes=self.worker_bytes.get(name, self.worker_bytes["cluster"]),
            store_bytes=store_bytes,
            requests={"put": written, "get": read},
        )

    def _rows(self, seconds: float) -> float:
        """Seconds of what each worker does with its rows."""
        return self.n * seconds / self.workers / self._speed

    @property
    def _speed(self) -> float:
        """Of a CPU here, in those of the probe."""
        return self.fleet.speed / self.fleet.total("cpus")

    def _rate(self, measured: float) -> float:
        """Products a second of all workers."""
        if not _gpus(self.config, self.fleet):
            return measured * self.workers / self.rates.workers * self._speed
        if self.rates.gpus:
            return measured * self.fleet.total("gpus") / self.rates.gpus
        return sum(kind.gpus * count * kind.products for kind, count in self.fleet.machines) / (
            2 * self.rates.d
        )

    def _density(self) -> tuple[float, str]:
        search, machines = self.search, sum(count for _, count in self.fleet.machines)
        products = search.products / self._rate(self.rates.join_products)
        network = 0.0
        if machines > 1:
            itemsize = _itemsize(self.config)
            once = all(kind.store >= self.store_bytes for kind, _ in self.fleet.machines)
            fetched = self.store_bytes * (1 + machines) if once else search.fetched_bytes(itemsize)
            network = fetched / self.fleet.total("network")
        seconds = self.rates.holder_seconds + max(products, network) + self._rows(self.rates.row_seconds)
        return seconds, "products" if products >= network else "network"

    def _cluster(self, budget: int) -> tuple[float, str]:
        settings, on_gpus = self.config.cluster, bool(_gpus(self.config, self.fleet))
        # On GPUs every iteration compares all rows with all centroids.
        later = 1.0 if on_gpus else self.rates.later_share
        if budget >= settings.two_level:
            coarse = round(math.sqrt(budget))
            inside = budget / coarse
            full = two_level.FULL_ITERATIONS
            compared = (
                coarse * (1 + later * (two_level.COARSE_ITERATIONS - 1))
                + inside * two_level.INSIDE_ITERATIONS
                + budget * (1 + later * (full - 1))
            )
        else:
            full = settings.iterations
            if settings.tolerance > 0:
                full = min(full, self.rates.iterations)
            compared = budget * (1 + later * (full - 1))
        products = self.n * compared / self._rate(self.rates.products)
        network = 0.0
        if sum(count for _, count in self.fleet.machines) > 1:
            # Sums come to the driver, which is on the head.
            wire = (
                self.fleet.head.network if self.fleet.head else min(k.network for k, _ in self.fleet.machines)
            )
            network = full * self.workers * budget * self.rates.d * 8 / wire
        seconds = self.rates.cluster_start + products + network + self._rows(self.rates.cluster_seconds)
        return seconds, "products" if products >= network else "network"
