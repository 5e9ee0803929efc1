"""What is asked for: one model per stage for what changes the answer, and `Resources` for what does not.

Order: default < preset < --config < options and --set. Unknown keys are errors that name the nearest key.
"""

from __future__ import annotations

import difflib
import itertools
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from selective_ray import encoders
from selective_ray.errors import UsageError
from selective_ray.objects import Access
from selective_ray.presets import PRESETS
from selective_ray.repulsion import Repulsion


class Section(BaseModel):
    """A section of the configuration; its values do not change and its keys are all there are."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Images(Section):
    """Which images of the source count."""

    # Shell patterns on the path below the source, `*` also matching `/`; nothing given: every image.
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    # The column of images, or of uris, of Parquet files; None: the one that can be meant.
    column: str | None = None


class Embed(Section):
    """Which network turns an image into a vector, and from which pixels."""

    encoder: str = encoders.DEFAULT
    checkpoint: str | None = None
    # None: the size that the encoder's published weights were evaluated at.
    image_size: int | None = Field(None, ge=1, le=4096)
    # float16 halves the store and moves a tenth to a half of the picks on small sets.
    dtype: Literal["float32", "float16"] = "float32"
    # Every batch is padded to this size: the last bits of a network depend on the batch's shape. So it is
    # when a trained network predicts.
    batch: int = Field(64, ge=1)
    # "auto": bfloat16 on GPUs that have it, whose units for it are the fastest; float32 elsewhere.
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # A compiled network rounds differently, and every process compiles it anew.
    compile: bool = False


class Density(Section):
    """How dense the neighborhood of an image is."""

    # USL on ImageNet; large enough to average out single neighbors, small enough to stay local.
    k: int = Field(20, ge=1)
    # Published: every image is its own first neighbor, at distance 0.
    include_self: bool = True
    # "mean": 1 / mean of k squared distances (published code).
    # "kth": 1 / k-th squared distance (the paper's p_kNN).
    estimator: Literal["mean", "kth"] = "mean"
    # "auto": whichever of brute force and inverted lists costs less, by n, d, k and recall (`ivf.plan`).
    mode: Literal["auto", "exact", "ivf"] = "auto"
    # None: about two for each square root of n; as many probes a row as the recall takes, by a sample.
    lists: int | None = Field(None, ge=1)
    probes: int | None = Field(None, ge=1)
    # Share of the true neighbors that must be found; 1: brute force.
    recall: float = Field(0.99, gt=0, le=1)
    # Squared distances under this count as this: exact duplicates get a high density, not an infinite one.
    floor: float = Field(1e-6, gt=0)
    # "collapse": equal embeddings count as one neighbor, and each has the density of that one. As published,
    # every copy is a neighbor of its own.
    duplicates: Literal["keep", "collapse"] = "keep"
    # Leave the k neighbors of every image in `neighbors/`.
    keep_neighbors: bool = False


class Cluster(Section):
    """K-Means with as many clusters as the budget."""

    # With the tolerance, a bound that is rarely reached.
    iterations: int = Field(100, ge=1)
    # Stop when an iteration lowers the mean squared distance by less than this share of it.
    tolerance: float = Field(1e-4, ge=0)
    # "random": the first rows of a seeded permutation (published). "k-means||": rows far from each other
    # (`starts`), for the work of about five full iterations.
    init: Literal["random", "k-means||"] = "random"
    # From so many clusters on in two levels: about √m of them first, each then split by its size.
    two_level: int = Field(50_000, ge=2)
    # Labels belong to the centroids written; the published labels lag one update.
    final_assignment: bool = True


# What only USL's selection takes.
USL_ONLY = (
    *("rounds", "weight", "momentum", "alpha", "horizon_sq_dist", "horizon_picks"),
    *("exclude_own_cluster", "scale", "keep_utilities"),
)


# The keys that each method takes, besides what all do: the budget, and the images that have labels.
METHOD_KEYS: dict[str, tuple[str, ...]] = {
    "usl": USL_ONLY,
    "prototypes": ("passes", "density_cost"),
    "k-medoid": (),
    "typiclust": (),
    # Its own section, `usl_t`.
    "usl-t": (),
    "probcover": ("radius",),
    "max-herding": ("radius",),
    "rdss": ("radius", "features"),
    "k-center": (),
    "random": (),
    "stratified": ("labels",),
}
# They take the neighbors of every image.
OF_NEIGHBORS = ("probcover", "max-herding")


class Selection(Section):
    """Which images are selected."""

    # "prototypes": the image nearest to the centroid of each cluster, improved by swaps that bring the picks
    # nearer to all images, and to where images are dense. "usl": the densest of each cluster, regularized;
    # asked for, too, by a key that is its own (the presets usl-…). "k-medoid": prototypes without swaps.
    # "usl-t": one of each cluster, which is trained in place of computed. The others are baselines, each in a
    # file of its own.
    method: Literal[
        "usl",
        "prototypes",
        "k-medoid",
        "usl-t",
        "typiclust",
        "probcover",
        "max-herding",
        "rdss",
        "k-center",
        "random",
        "stratified",
    ] = "prototypes"
    # Passes of swaps at most.
    passes: int = Field(8, ge=1)
    # What a pick of median density costs each image it stands for, as a share of the mean squared distance
    # to the picks at the start.
    density_cost: float = Field(0.2, ge=0, le=1)
    # Of probcover: how far a pick covers; of max-herding and rdss: the width of the kernel. None: for rdss 1,
    # as published; for the others the root of the median of `density/`, so that it fits any n, d and k.
    radius: float | None = Field(None, gt=0, le=2)
    # Random features that estimate the kernel of rdss: its error falls with their root.
    features: int = Field(1024, ge=2, multiple_of=2)
    # Labels of all or many images, a file or `folders`: for stratified only, an oracle.
    labels: str | None = None

    budget: int | None = Field(None, ge=1)
    # Budgets that contain each other, ascending, in place of one.
    budgets: tuple[Annotated[int, Field(ge=1)], ...] = ()
    # CSV file of images that have labels: they repel, are never picked, and close their clusters.
    labeled: str | None = None
    # Ten rounds with momentum 0.9 (USL on CIFAR) let the picks settle instead of swapping places.
    rounds: int = Field(10, ge=1)
    # In units of `scale`; chosen with alpha and the window on three sets of images by the accuracy of a
    # nearest-neighbor classifier on the picks (benchmarks/README.md, "Defaults").
    weight: float = Field(2.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    # The exponent on the squared distance (USL on CIFAR-100 and with CLIP).
    alpha: float = Field(1.0, gt=0, le=4)
    # Picks at this squared distance or farther do not repel; 0: no limit.
    horizon_sq_dist: float = Field(0.0, ge=0)
    # Only so many nearest picks repel; 0: no limit. A window keeps the repulsion local at any budget.
    horizon_picks: int = Field(8, ge=0)
    # As published for all but MoCo: a cluster's own pick must not drive its neighbors out of the race.
    exclude_own_cluster: bool = True
    # "median": density in units of its median, repulsion in units of what picks feel from each other, so
    # that one weight means the same for any n, d, k and budget. "none": as published.
    scale: Literal["none", "median"] = "median"
    # Leave the utility and repulsion of every image in `utilities/`; every image then meets every pick.
    keep_utilities: bool = False

    def every_budget(self) -> tuple[int, ...]:
        """Return the budgets to select for, ascending; the last is the one that is asked for."""
        return self.budgets or (() if self.budget is None else (self.budget,))

    def repulsion(self) -> Repulsion:
        """Return how picks push, as the maths takes it."""
        return Repulsion(
            alpha=self.alpha,
            horizon_sq_dist=self.horizon_sq_dist,
            horizon_picks=self.horizon_picks,
            exclude_own_cluster=self.exclude_own_cluster,
        )


class Train(Section):
    """FixMatch on the labels that people gave and all other images."""

    # wrn-DEPTH-WIDTH, cifar-resnet18, or a ResNet of torchvision.
    network: str = "resnet18"
    # Weights of a self-supervised network to begin from; None: random ones.
    checkpoint: str | None = None
    # Images are cut to the square in their center, and resized to this.
    image_size: int = Field(96, ge=8, le=1024)
    steps: int = Field(20_000, ge=1)
    # Labeled images of a step, and how many times as many unlabeled ones; 0: supervised training.
    batch: int = Field(64, ge=1)
    unlabeled_ratio: int = Field(7, ge=0)
    # So many of the densest images of a labeled image's cluster are taught its label (USL-T on ImageNet: 20);
    # what is compared with it should be, too. 0: none.
    propagate: int = Field(0, ge=0)
    # What an answer must reach to be a pseudo-label; above 1 none does.
    threshold: float = Field(0.95, ge=0)
    unlabeled_weight: float = Field(1.0, ge=0)
    # Whose answers are pseudo-labels: the network's own, or those of its moving average (EMAN).
    teacher: Literal["network", "average"] = "network"
    # The moving average keeps so much of itself in a step, and is what is evaluated.
    average: float = Field(0.999, ge=0, lt=1)
    # Average the batch statistics, too (EMAN); else they are copied.
    average_statistics: bool = True
    lr: float = Field(0.03, gt=0)
    warmup: int = Field(0, ge=0)
    # "cosine": down to a fifth by cos(7 π t / 16 T); "steps": a tenth after 60 %, again after 80 %.
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    momentum: float = Field(0.9, ge=0, lt=1)
    # Not of biases and norms.
    weight_decay: float = Field(5e-4, ge=0)
    # Side of the gray square in strong views, as a share of the image's.
    cutout: float = Field(0.5, ge=0, le=1)
    # "auto": bfloat16 on GPUs that have it.
    precision: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    # Steps from one evaluation, and from one checkpoint, to the next.
    evaluate_every: int = Field(500, ge=1)
    checkpoint_every: int = Field(250, ge=1)

    def recipe(self) -> dict[str, Any]:
        """Return what the maths takes of it (`fixmatch.Recipe`)."""
        of_the_batch = {"network", "checkpoint", "image_size", "batch", "unlabeled_ratio", "precision"}
        of_the_batch |= {"propagate"}
        return self.model_dump(exclude=of_the_batch | {"evaluate_every", "checkpoint_every"})


class Pretrain(Section):
    """How an encoder is learned from images without labels."""

    # "simclr": SimCLR as SCAN trains it; "moco": MoCo v2; "cld": MoCo with cross-level discrimination.
    method: Literal["simclr", "moco", "cld"] = "simclr"
    # cifar-resnet18, small-resnet (for CPUs), wrn-DEPTH-WIDTH, a ResNet of torchvision, or vit-small (timm).
    network: str = "resnet18"
    # Images are cut to the square in their center, and resized to this.
    image_size: int = Field(96, ge=8, le=1024)
    steps: int = Field(20_000, ge=1)
    batch: int = Field(256, ge=2)
    # None: that of the method, as published: 0.1 (simclr), 0.2 (moco), 0.07 (cld).
    temperature: float | None = Field(None, gt=0)
    # None: as published for the method, in proportion to the batch: 0.4 for 512 images (simclr), 0.03 for
    # 256 (moco) and 128 (cld). Down to 0 by half a cosine.
    lr: float | None = Field(None, gt=0)
    # The full rate on random weights costs more than its steps: after 500 steps of SimCLR on CIFAR-10 41 % of
    # neighbors' classes without these, 49 with them (benchmarks/README.md, "Learned features").
    warmup: int = Field(100, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    # Not of biases and norms.
    weight_decay: float = Field(1e-4, ge=0)
    # Of moco and cld: what the network of the keys keeps of itself in a step, and how many keys are kept.
    keep: float = Field(0.99, ge=0, lt=1)
    queue: int = Field(4096, ge=1)
    # Of cld: groups of a step's images, and what telling them counts. 60 and a fourth are between those
    # published for CIFAR and ImageNet.
    groups: int = Field(60, ge=2)
    group_temperature: float = Field(0.2, gt=0)
    group_weight: float = Field(0.25, ge=0)
    # Of views (`views.Views`): least area of the box, chance that colors change, of gray, and of blur.
    smallest: float = Field(0.2, gt=0, le=1)
    colors: float = Field(0.8, ge=0, le=1)
    gray: float = Field(0.2, ge=0, le=1)
    blur: float = Field(0.0, ge=0, le=1)
    # "auto": bfloat16 on GPUs that have it.
    precision: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    # Steps from one evaluation, and from one checkpoint, to the next.
    evaluate_every: int = Field(500, ge=1)
    checkpoint_every: int = Field(250, ge=1)

    def recipe(self) -> dict[str, Any]:
        """Return what the maths takes of it (`contrastive.Recipe`); what is None is the method's own."""
        temperature, lr, images = {
            "simclr": (0.1, 0.4, 512),
            "moco": (0.2, 0.03, 256),
            "cld": (0.07, 0.03, 128),
        }[self.method]
        keys = ("method", "steps", "warmup", "momentum", "weight_decay", "keep", "queue", "groups")
        return {key: getattr(self, key) for key in (*keys, "group_temperature", "group_weight")} | {
            "temperature": self.temperature or temperature,
            "lr": self.lr or lr * self.batch / images,
        }

    def views(self) -> dict[str, float]:
        """Return what views take of it (`views.Views`)."""
        return {key: getattr(self, key) for key in ("smallest", "colors", "gray", "blur")}


class UslT(Section):
    """How the clusters of `selection.method = "usl-t"` are trained."""

    # "frozen": heads on the features of the encoder; "trained": the encoder learns, too.
    network: Literal["frozen", "trained"] = "frozen"
    # "cosine": of fixed scale, begun from images; "linear".
    heads: Literal["cosine", "linear"] = "cosine"
    count: int = Field(3, ge=1)
    scale: float = Field(40.0, gt=0)
    # Clusters; None: as many as the budget and the labeled images.
    clusters: int | None = Field(None, ge=2)
    steps: int = Field(2_000, ge=1)
    batch: int = Field(512, ge=2)
    # Adam's.
    lr: float = Field(1e-4, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    # A cluster of a probability above this is taught to the strong view.
    threshold: float = Field(0.0, ge=0, lt=1)
    # What the loss of neighbors counts, and how their clusters become a target: less so many logarithms of
    # what is common, and sharpened by this temperature.
    local_weight: float = Field(0.5, ge=0)
    adjustment: float = Field(2.5, ge=0)
    temperature: float = Field(0.5, gt=0)
    reweight: Literal["none", "count", "renorm"] = "renorm"
    # Means are over all images of a step, also those that are not confident.
    mean_of_all: bool = True
    # Nearest neighbors that one is drawn from, besides the image itself.
    neighbors: int = Field(20, ge=1)
    # From this step on the largest cluster is split where the smallest has under `repair_below` images of n,
    # and itself over `repair_above`; None: never.
    repair_after: int | None = Field(None, ge=0)
    repair_below: int = Field(50, ge=0)
    repair_above: int = Field(500, ge=0)
    # "moco": boxes, colors and blur; "randaugment": as FixMatch's strong view.
    strong: Literal["moco", "randaugment"] = "moco"
    # Which image of a cluster is picked.
    pick: Literal["confidence", "density"] = "density"
    # Confidence is the mean over heads, or the first one's.
    confidence_of_all: bool = True
    # Steps from one checkpoint to the next.
    checkpoint_every: int = Field(250, ge=1)

    def recipe(self) -> dict[str, Any]:
        """Return what the maths takes of it (`usl_t.Recipe`)."""
        keys = ("threshold", "local_weight", "adjustment", "temperature", "reweight", "mean_of_all")
        return {key: getattr(self, key) for key in (*keys, "repair_after", "repair_below", "repair_above")}

    @property
    def evaluate_every(self) -> int:
        """Steps from one evaluation to the next: there is none but the lines."""
        return self.steps

    def trained_by(self) -> dict[str, Any]:
        """Return what the trained heads depend on."""
        return self.model_dump(exclude={"pick", "confidence_of_all", "checkpoint_every"})


class Resources(Section):
    """Where the work is done; nothing here changes the answer."""

    # Processes that hold shards and encode; None: one for each CPU of the cluster.
    workers: int | None = Field(None, ge=1)
    # GPUs that an encoder, or a holder of embeddings, takes; None: one where the cluster has any.
    gpus_per_worker: float | None = Field(None, ge=0)
    # Machines come as work asks for them: workers and gpus_per_worker hold where none is there yet, and
    # nothing is squeezed into those that are.
    autoscale: bool = False
    # GiB that an encoder states to Ray; None: 2, or its share of a smaller cluster.
    memory: float | None = Field(None, gt=0)
    # Images in a shard; None: max(256, n / 64), at most 65,536.
    shard_rows: int | None = Field(None, ge=1)
    # An S3-compatible store in place of Amazon's; None: AWS_ENDPOINT_URL, else Amazon's.
    endpoint_url: str | None = None
    # A store that is silent for so long while it answers is asked again.
    silence_seconds: float = Field(20.0, gt=0)
    # The run stops when more than this share of the images seen so far is rejected.
    max_rejected: float = Field(1.0, ge=0, le=1)
    # A wave of shards without progress for so long is ended and begun again.
    stall_seconds: float = Field(300.0, gt=0)
    # The same for its first images, while machines and processes start and load the encoder.
    start_seconds: float = Field(900.0, gt=0)
    # GiB of decoded images that training keeps on the disk of each machine; what is beyond is read again.
    cache: float = Field(20.0, ge=0)
    # Project of Weights & Biases that the numbers of a training go to as well.
    wandb: str | None = None

    def access(self) -> Access:
        """Return how stores are reached, as reading takes it."""
        return Access(self.endpoint_url, self.silence_seconds)


class Config(Section):
    """Everything that a run is asked for."""

    images: Images = Images()
    embed: Embed = Embed()
    density: Density = Density()
    cluster: Cluster = Cluster()
    selection: Selection = Selection()
    train: Train = Train()
    pretrain: Pretrain = Pretrain()
    usl_t: UslT = UslT()
    seed: int = Field(0, ge=0, lt=2**32)
    resources: Resources = Resources()


def load(
    *,
    preset: str | None = None,
    file: str | None = None,
    assignments: list[str] | None = None,
    options: dict[str, Any] | None = None,
    own_embeddings: bool = False,
) -> tuple[Config, set[str]]:
    """Merge the sources into a Config; also return the dotted keys that were asked for, not left at default.

    assignments are `section.key=value` strings (--set); options maps dotted keys to the values of command
    line options, None where an option was not given. With own_embeddings a preset's [embed] is ignored.
    Raises UsageError for unknown presets, keys and values, and where an option and a --set disagree.
    """
    asked: dict[str, Any] = {}
    if preset is not None:
        if preset not in PRESETS:
            raise UsageError(
                f"unknown preset {preset!r}{_nearest(preset, PRESETS)}; presets: {', '.join(PRESETS)}"
            )
        sections = {
            name: keys for name, keys in PRESETS[preset].items() if name != "embed" or not own_embeddings
        }
        asked |= _flatten(sections)
    if file is not None:
        asked |= _flatten(_read_toml(file))
    direct = {key: value for key, value in (options or {}).items() if value is not None}
    given: dict[str, Any] = {}
    for assignment in assignments or []:
        key, value = _parse(assignment)
        if key in given and given[key] != value:
            raise UsageError(f"--set gives {key} twice, {given[key]!r} and {value!r}; keep one")
        if key in direct and direct[key] != value:
            raise UsageError(
                f"--set {key}={value} disagrees with the option that sets {key} to {direct[key]}; keep one"
            )
        given[key] = value
    asked |= direct | given
    return _validate(asked), set(asked)


def _known_keys() -> list[str]:
    keys = []
    for name, field in Config.model_fields.items():
        section = field.annotation
        nested = isinstance(section, type) and issubclass(section, Section)
        keys += [f"{name}.{key}" for key in section.model_fields] if nested else [name]
    return keys


def _default(key: str) -> Any:
    section, _, name = key.partition(".")
    default = getattr(Config(), section, "")
    return getattr(default, name, "") if name else default


def _nearest(word: str, known: Any) -> str:
    # A key without its section is meant before one that looks like it.
    close = [key for key in known if key.endswith(f".{word}")][:1]
    close = close or difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _flatten(sections: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in sections.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def _read_toml(file: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"configuration file {file} does not exist; check --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"configuration file {file} cannot be read ({error}); check --config") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"configuration file {file} is not valid TOML: {error}") from None


def _parse(assignment: str) -> tuple[str, Any]:
    key, equals, text = assignment.partition("=")
    key, text = key.strip(), text.strip()
    if not equals or not key:
        raise UsageError(f"--set {assignment!r} is not of the form section.key=value")
    try:
        return key, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        # `none` means "not given" where that is the default; it is also a word, as in selection.scale. Other
        # bare words are strings: --set embed.encoder=resnet18
        return key, None if text.lower() == "none" and _default(key) is None else text


def _validate(flat: dict[str, Any]) -> Config:
    known = _known_keys()
    nested: dict[str, Any] = {}
    if any(f"selection.{key}" in flat for key in USL_ONLY):
        # Who asks for what only USL has, as its presets do, asks for USL.
        flat = {"selection.method": "usl", **flat}
    for key, value in flat.items():
        if key not in known:
            raise UsageError(f"unknown key {key!r}{_nearest(key, known)}")
        section, dot, name = key.partition(".")
        if dot:
            nested.setdefault(section, {})[name] = value
        else:
            nested[key] = value
    try:
        config = Config.model_validate(nested)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{key} = {first['input']!r} is not possible: {first['msg'].lower()}") from None
    encoders.check_name(config.embed.encoder)
    budgets = config.selection.budgets
    if budgets and config.selection.budget is not None:
        raise UsageError("--budget and --budgets disagree; --budgets holds all of them, the largest last")
    for smaller, larger in itertools.pairwise(budgets):
        if larger <= smaller:
            raise UsageError(
                f"budgets must increase, and {larger} follows {smaller}; each contains the ones before it"
            )
    if config.selection.keep_utilities and config.selection.method != "usl":
        raise UsageError(
            "selection.keep_utilities is of the method usl; other methods give only picks a utility"
        )
    if config.selection.method == "usl-t":
        if budgets:
            raise UsageError(
                "clusters of usl-t are trained for one budget; give --budget in place of --budgets"
            )
        density = config.density.model_copy(update={"keep_neighbors": True})
        config = config.model_copy(update={"density": density})
    if config.pretrain.queue < config.pretrain.batch:
        raise UsageError(
            f"pretrain.queue = {config.pretrain.queue:,} must hold the keys of a step, pretrain.batch = "
            f"{config.pretrain.batch:,}; raise the one or lower the other"
        )
    if (config.selection.labels is not None) != (config.selection.method == "stratified"):
        raise UsageError(
            "selection.method = stratified is an oracle that knows labels: give it those of all or many "
            "images with --set selection.labels=FILE, or folders"
            if config.selection.labels is None
            else "selection.labels goes with the method stratified: all others select without labels"
        )
    if config.density.k == 1 and config.density.include_self:
        raise UsageError(
            "density.k = 1 with density.include_self is the distance of every image to itself, which is 0; "
            "ask for k of 2 or more"
        )
    if config.density.mode == "exact" and (config.density.lists or config.density.probes):
        raise UsageError(
            "density.lists and density.probes mean nothing with density.mode = exact; leave them out, or set "
            "density.mode to ivf"
        )
    return config
