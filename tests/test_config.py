"""What is asked for: the order of the sources, and a sentence for everything that cannot be."""

import pytest

from selective_ray import config, encoders
from selective_ray.config import Config, load
from selective_ray.errors import UsageError
from selective_ray.presets import PRESETS


def refused(**sources) -> str:
    with pytest.raises(UsageError) as caught:
        load(**sources)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def toml(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "asked.toml"
        path.write_text(text)
        return str(path)

    return write


# Order


def test_nothing_asked_gives_the_defaults():
    settings, asked = load()
    assert settings == Config() and asked == set()
    assert (settings.density.k, settings.selection.scale, settings.seed) == (20, "median", 0)
    assert settings.embed.encoder == encoders.DEFAULT


def test_each_source_overrides_the_ones_before_it(toml):
    file = toml("seed = 7\n[density]\nk = 30\n[selection]\nweight = 0.25\n")
    preset = {"preset": "usl-cifar10"}
    assert load(**preset)[0].density.k == 400
    assert load(**preset, file=file)[0].density.k == 30
    assert load(**preset, file=file, assignments=["density.k=50"])[0].density.k == 50
    assert load(**preset, file=file, options={"density.k": 60})[0].density.k == 60
    settings, asked = load(**preset, file=file, assignments=["density.k=50"], options={"seed": 9})
    assert settings.seed == 9 and settings.selection.weight == 0.25  # option over file, file over preset
    assert settings.selection.scale == "none"  # what nobody overrode stays the preset's
    assert settings.selection.budget is None  # and what the preset does not set stays the default
    assert {"density.k", "seed", "selection.weight", "selection.scale"} <= asked
    assert "selection.budget" not in asked and "density.estimator" not in asked


def test_asked_is_exactly_what_was_given(toml):
    file = toml("[density]\nk = 30\n")
    options = {"selection.budget": 40, "seed": None, "embed.encoder": None}
    _, asked = load(file=file, assignments=["cluster.iterations=5"], options=options)
    assert asked == {"density.k", "cluster.iterations", "selection.budget"}


def test_a_default_that_is_asked_for_counts_as_asked():
    assert load(assignments=["density.k=20"]) == (Config(), {"density.k"})


# Unknown names


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("density.kk", "density.k"),
        ("densty.k", "density.k"),
        ("selection.wieght", "selection.weight"),
        ("sed", "seed"),
        ("seed.a", "seed"),
        ("weight", "selection.weight"),
        ("density", "density.k"),
        ("embed.image-size", "embed.image_size"),
    ],
)
def test_unknown_keys_name_the_nearest(key, nearest):
    message = refused(assignments=[f"{key}=1"])
    assert repr(key) in message and repr(nearest) in message


@pytest.mark.parametrize(
    ("text", "wrong", "nearest"),
    [
        ("[densty]\nk = 5", "densty.k", "density.k"),
        ("[density]\nkay = 5", "density.kay", "density.k"),
        ("sead = 5", "sead", "seed"),
        ("density = 5", "density", "density.k"),
    ],
)
def test_unknown_sections_and_keys_of_a_file_name_the_nearest(toml, text, wrong, nearest):
    message = refused(file=toml(text))
    assert repr(wrong) in message and repr(nearest) in message


def test_a_key_like_no_other_is_refused_without_a_guess():
    message = refused(options={"zzzzzz": 1})
    assert "'zzzzzz'" in message and "did you mean" not in message


def test_unknown_preset_names_the_nearest_and_lists_all():
    message = refused(preset="usl-cifar")
    assert "did you mean 'usl-cifar10'" in message
    assert all(name in message for name in PRESETS)


@pytest.mark.parametrize(
    ("name", "nearest"), [("resnet5O", "resnet50"), ("RESNET18", "resnet18"), ("pcaa", "pca")]
)
def test_unknown_encoder_names_the_nearest(name, nearest):
    message = refused(options={"embed.encoder": name})
    assert repr(name) in message and repr(nearest) in message


# Disagreement


def test_an_option_and_a_set_may_agree_but_not_disagree():
    options = {"selection.budget": 40}
    assert load(options=options, assignments=["selection.budget=40"])[0].selection.budget == 40
    message = refused(options=options, assignments=["selection.budget=41"])
    assert "selection.budget" in message and "40" in message and "41" in message


def test_two_sets_may_agree_but_not_disagree():
    assert load(assignments=["density.k=30", "density.k=30"])[0].density.k == 30
    message = refused(assignments=["density.k=30", "seed=1", "density.k=31"])
    assert "density.k" in message and "30" in message and "31" in message


def test_an_option_that_was_not_given_disagrees_with_nothing():
    assert load(options={"seed": None}, assignments=["seed=3"])[0].seed == 3


# Values


@pytest.mark.parametrize(
    "assignment",
    [
        "density.k=0",
        "density.k=1.5",
        "density.k=[20]",
        "density.floor=0",
        "density.mode=lists",
        "density.estimator=median",
        "density.include_self=perhaps",
        "cluster.iterations=0",
        "cluster.tolerance=-0.1",
        "cluster.init=k-means++",
        "selection.budget=0",
        "selection.budget=-3",
        "selection.budget=many",
        "selection.rounds=0",
        "selection.weight=-1",
        "selection.weight=nan",
        "selection.weight=inf",
        "selection.momentum=1",
        "selection.alpha=0",
        "selection.horizon_picks=-1",
        "selection.scale=mean",
        "embed.dtype=float64",
        "embed.image_size=0",
        "embed.batch=0",
        "resources.workers=0",
        "resources.shard_rows=0",
        "resources.stall_seconds=0",
        "seed=-1",
        "seed=4294967296",
    ],
)
def test_values_out_of_range_are_one_sentence_that_names_the_key(assignment):
    key, _, value = assignment.partition("=")
    message = refused(assignments=[assignment])
    assert message.startswith(f"{key} = ") and value.strip("[]") in message
    assert "input should be" in message


def test_k_of_one_with_self_is_refused_and_without_self_is_fine():
    assert "density.k" in refused(assignments=["density.k=1"])
    settings, _ = load(assignments=["density.k=1", "density.include_self=false"])
    assert settings.density.k == 1


@pytest.mark.parametrize(
    ("assignment", "key", "value"),
    [
        ("density.k=30", "density.k", 30),
        (" density.k = 30 ", "density.k", 30),
        ("selection.weight=5e-1", "selection.weight", 0.5),
        ("selection.weight=1", "selection.weight", 1.0),
        ("density.include_self=false", "density.include_self", False),
        ("embed.encoder=resnet18", "embed.encoder", "resnet18"),
        ('embed.encoder="resnet18"', "embed.encoder", "resnet18"),
        ("embed.checkpoint=s3://bucket/a=b.pth", "embed.checkpoint", "s3://bucket/a=b.pth"),
        ("embed.checkpoint=/path/with space.pth", "embed.checkpoint", "/path/with space.pth"),
        ("embed.image_size=none", "embed.image_size", None),
        ("resources.workers=None", "resources.workers", None),
        ("selection.scale=none", "selection.scale", "none"),
        ('selection.scale="none"', "selection.scale", "none"),
    ],
)
def test_values_of_set_are_numbers_booleans_and_words(assignment, key, value):
    settings, asked = load(assignments=[assignment])
    section, _, name = key.partition(".")
    found = getattr(getattr(settings, section), name)
    assert found == value and type(found) is type(value)
    assert asked == {key}


@pytest.mark.parametrize("assignment", ["density.k", "", "=5", "  = 5"])
def test_a_set_that_is_no_assignment_is_refused(assignment):
    assert "section.key=value" in refused(assignments=[assignment])


def test_none_puts_a_key_of_the_file_back_to_not_given(toml):
    file = toml("[resources]\nworkers = 3\n")
    assert load(file=file)[0].resources.workers == 3
    assert load(file=file, assignments=["resources.workers=none"])[0].resources.workers is None


# Files


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    missing = str(tmp_path / "nope.toml")
    assert missing in refused(file=missing) and "does not exist" in refused(file=missing)
    assert str(tmp_path) in refused(file=str(tmp_path))


def test_a_file_that_is_no_toml_is_refused_with_the_place(toml, tmp_path):
    assert "line 2" in refused(file=toml("seed = 1\n[density\nk = 3\n"))
    (tmp_path / "binary.toml").write_bytes(b"seed = \xff")
    assert "cannot be read" in refused(file=str(tmp_path / "binary.toml"))


def test_dotted_keys_and_sections_mean_the_same(toml):
    dotted, _ = load(file=toml("density.k = 30\nseed = 2"))
    assert dotted == load(file=toml("seed = 2\n[density]\nk = 30"))[0]


# Presets

# reference/usl.md 1.6, by hand: k, Lloyd iterations, T, lambda, beta, alpha, D2 horizon, h nearest, and
# whether the own cluster is excluded.
PUBLISHED = {
    "usl-cifar10": (400, 200, 10, 0.5, 0.9, 0.5, 4.0, 0, True),
    "usl-cifar100": (400, 200, 10, 1.0, 0.9, 1.0, 1.0, 0, True),
    "usl-imagenet-moco": (20, 100, 2, 1.5, 0.0, 0.5, 0.0, 128, False),
    "usl-imagenet-clip": (20, 100, 2, 0.05, 0.0, 1.0, 0.0, 32, True),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_carry_the_published_constants(name):
    settings, _ = load(preset=name)
    density, cluster, selection = settings.density, settings.cluster, settings.selection
    assert PUBLISHED[name] == (
        density.k,
        cluster.iterations,
        selection.rounds,
        selection.weight,
        selection.momentum,
        selection.alpha,
        selection.horizon_sq_dist,
        selection.horizon_picks,
        selection.exclude_own_cluster,
    )
    # The mean of k squared distances, the image itself included; no test of convergence, and labels that lag
    # one update; density and repulsion in plain units.
    assert (density.include_self, density.estimator, density.floor) == (True, "mean", 1e-12)
    assert (cluster.tolerance, cluster.init, cluster.final_assignment) == (0.0, "random", False)
    assert (selection.scale, selection.budget) == ("none", None)


# reference/usl.md 3.1 and 3.2, by hand: network, steps, labeled images, ratio, weight and threshold of
# pseudo-labels, their teacher, average, whether its statistics are averaged, rate, schedule, decay.
TRAINED = {
    "fixmatch-cifar10": ("wrn-28-2", 2**20, 64, 7, 1, 0.95, "network", 0.999, False, 0.03, "cosine", 5e-4),
    "fixmatch-cifar100": ("wrn-28-8", 2**20, 64, 7, 1, 0.95, "network", 0.999, False, 0.03, "cosine", 1e-3),
    "fixmatch-imagenet-eman": (
        *("resnet50", 100 * 4004, 64, 5, 10, 0.7, "average", 0.999, True, 0.03, "steps", 1e-4),
    ),
}


@pytest.mark.parametrize("name", TRAINED)
def test_presets_of_training_carry_the_published_constants(name):
    train = load(preset=name)[0].train
    assert TRAINED[name] == (
        *(train.network, train.steps, train.batch, train.unlabeled_ratio, train.unlabeled_weight),
        *(train.threshold, train.teacher, train.average, train.average_statistics),
        *(train.lr, train.schedule, train.weight_decay),
    )
    assert train.momentum == 0.9 and train.warmup == (20_020 if name == "fixmatch-imagenet-eman" else 0)


# Steps are epochs of whole batches: 50,000 or 1,281,167 images by the batch.
LEARNED = {
    "simclr-cifar10": ("simclr", "cifar-resnet18", 500 * (50_000 // 512), 512, 0.1, 0.4, 1e-4, 0.0),
    "moco-v2-imagenet": ("moco", "resnet50", 200 * (1_281_167 // 256), 256, 0.2, 0.03, 1e-4, 0.5),
    "cld-cifar10": ("cld", "cifar-resnet18", 200 * (50_000 // 256), 256, 0.07, 0.06, 8e-4, 0.5),
    "cld-cifar100": ("cld", "cifar-resnet18", 200 * (50_000 // 128), 128, 0.07, 0.03, 7e-4, 0.0),
}


@pytest.mark.parametrize("name", LEARNED)
def test_learning_presets_carry_the_published_constants(name):
    how = load(preset=name)[0].pretrain
    assert LEARNED[name] == (
        *(how.method, how.network, how.steps, how.batch),
        *(how.recipe()["temperature"], how.recipe()["lr"], how.weight_decay, how.blur),
    )
    assert how.warmup == {"cld-cifar10": 5 * 195, "cld-cifar100": 5 * 390}.get(name, 0)


CLUSTERED = {
    "usl-t-cifar10": ("trained", "linear", None, 200 * 48, 1024, 0.95, 5.0, 5.0, 0.25, "count", False, None),
    "usl-t-cifar100": ("trained", "linear", None, 200 * 48, 1024, 0.95, 5.0, 5.0, 0.25, "count", True, None),
    "usl-t-imagenet100": ("frozen", "cosine", None, 100 * 61, 2048, 0, 0.5, 2.5, 0.5, "renorm", True, 124),
    "usl-t-imagenet": ("frozen", "cosine", 3_000, 10 * 625, 2048, 0, 0.5, 2.5, 0.5, "none", True, 1250),
}


@pytest.mark.parametrize("name", CLUSTERED)
def test_presets_of_trained_clusters_carry_the_published_constants(name):
    settings = load(preset=name)[0]
    how = settings.usl_t
    assert settings.selection.method == "usl-t" and settings.density.keep_neighbors
    assert CLUSTERED[name] == (
        *(how.network, how.heads, how.clusters, how.steps, how.batch, how.threshold, how.local_weight),
        *(how.adjustment, how.temperature, how.reweight, how.mean_of_all, how.repair_after),
    )
    assert (how.pick, how.confidence_of_all) == {
        "usl-t-cifar10": ("confidence", True),
        "usl-t-cifar100": ("confidence", False),
    }.get(name, ("density", True))


def test_these_are_all_presets():
    assert set(PRESETS) == set(PUBLISHED) | set(TRAINED) | set(LEARNED) | set(CLUSTERED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_with_own_embeddings_the_embed_section_of_a_preset_is_ignored(name):
    images, asked = load(preset=name)
    own, asked_own = load(preset=name, own_embeddings=True)
    assert own.embed == Config().embed
    assert asked - asked_own == {"embed.encoder"} and asked_own < asked
    assert own.model_dump(exclude={"embed"}) == images.model_dump(exclude={"embed"})


def test_with_own_embeddings_only_the_preset_loses_its_embed_section(toml):
    file = toml('[embed]\ndtype = "float16"\n')
    settings, asked = load(preset="usl-cifar10", file=file, own_embeddings=True)
    assert settings.embed.dtype == "float16" and "embed.dtype" in asked


def test_who_asks_for_what_only_usl_has_asks_for_usl():
    assert Config().selection.method == load()[0].selection.method == "prototypes"
    for asked in ({"assignments": ["selection.weight=1"]}, {"options": {"selection.rounds": 3}}):
        assert load(**asked)[0].selection.method == "usl"
    for preset in PRESETS:
        if preset.startswith("usl-") and not preset.startswith("usl-t-"):
            assert load(preset=preset)[0].selection.method == "usl"
    other = load(options={"selection.method": "prototypes", "selection.weight": 1.0})
    assert other[0].selection.method == "prototypes"


@pytest.mark.parametrize("key", ["lists", "probes"])
def test_lists_without_a_search_by_lists_are_refused(key):
    with pytest.raises(UsageError, match=r"mean nothing with density\.mode = exact"):
        config.load(options={"density.mode": "exact", f"density.{key}": 5})
    assert config.load(options={f"density.{key}": 5})[0].density.mode == "auto"
