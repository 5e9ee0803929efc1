"""USL-T: its losses by hand, its clusters and picks through the command, and labels that are passed on."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from test_pretrain import alone
from test_training import paint
from torch import distributed, nn
from torch.nn import functional as F

from selective_ray import config, learned, propagation, usl_t
from selective_ray.actors import pipeline
from selective_ray.actors.usl_t import NAME
from selective_ray.actors.usl_t_worker import Pairs
from selective_ray.errors import UsageError, UserError
from selective_ray.heads import Trained
from selective_ray.progress import Reporter
from selective_ray.store import Run
from selective_ray.training import Training
from selective_ray.usl_t import Heads, Learner, Recipe


def softmax(row):
    total = sum(math.exp(value) for value in row)
    return [math.exp(value) / total for value in row]


def test_the_masked_loss_by_hand():
    weak = torch.tensor([[[3.0, 0, 0], [0, 3, 0], [0.1, 0, 0], [3, 0, 0]]])
    strong = torch.tensor([[[1.0, 0, 2], [0, 1, 0], [0, 0, 5], [2, 1, 0]]])
    told = usl_t.seen(weak, 0.8)
    assert told.clusters.tolist() == [[0, 1, 0, 0]] and told.confident.tolist() == [[True, True, False, True]]
    assert told.counts.tolist() == [[2, 1, 0]]
    ce = [-math.log(softmax(strong[0, i].tolist())[c]) for i, c in ((0, 0), (1, 1), (3, 0))]
    # Three are confident: two of the first cluster, one of the second.
    expected = {
        ("none", True): (ce[0] + ce[1] + ce[2]) / 4,
        ("none", False): (ce[0] + ce[1] + ce[2]) / 3,
        ("count", True): (1.5 * ce[0] + 3 * ce[1] + 1.5 * ce[2]) / 4,
        ("count", False): (1.5 * ce[0] + 3 * ce[1] + 1.5 * ce[2]) / 6,
        ("renorm", True): (0.75 * ce[0] + 1.5 * ce[1] + 0.75 * ce[2]) / 4,
    }
    for (reweight, mean_of_all), value in expected.items():
        how = {"reweight": reweight, "mean_of_all": mean_of_all, "batch": 4}
        found = usl_t.global_loss(told, strong, told.counts, **how)
        assert float(found) == pytest.approx(value, rel=1e-6), (reweight, mean_of_all)
    none = usl_t.seen(weak, 0.999)
    how = {"reweight": "count", "mean_of_all": False, "batch": 4}
    assert float(usl_t.global_loss(none, strong, none.counts, **how)) == 0


def test_the_adjusted_target_by_hand():
    neighbor, prior = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[0.2, 0.8]])
    q = softmax([1 - 2 * math.log(0.2), 2 - 2 * math.log(0.8)])
    sharp = [value**2 / sum(v**2 for v in q) for value in q]
    found = usl_t.adjusted(neighbor, prior, 2.0, 0.5)
    assert found[0, 0].tolist() == pytest.approx(sharp, rel=1e-6)
    strong = torch.tensor([[[0.5, 0.1]]])
    divergence = sum(t * math.log(t / p) for t, p in zip(sharp, softmax([0.5, 0.1]), strict=True))
    assert float(usl_t.local_loss(found, strong, 1)) == pytest.approx(divergence, rel=1e-5)
    moved = usl_t.next_prior(prior, torch.tensor([[0.6, 0.4]]))
    assert moved[0].tolist() == pytest.approx([0.4, 0.6])


def test_a_small_cluster_takes_half_of_the_largest():
    heads = Heads(torch.arange(12.0).view(1, 4, 3), None, 40.0)
    sizes, noise = torch.tensor([[900.0, 40, 300, 5]]), torch.ones((1, 3))
    assert usl_t.repair(heads, sizes, 4, 800, noise) == []
    assert usl_t.repair(heads, sizes, 50, 950, noise) == []
    assert usl_t.repair(heads, sizes, 50, 800, noise) == [0]
    assert sizes.tolist() == [[450, 40, 300, 450]]
    assert torch.allclose(heads.weight[0, 3], heads.weight[0, 0], atol=1e-5)


def test_heads_say_the_same_in_both_halves():
    """In torch while they are trained, and in numpy for all images."""
    rng = np.random.default_rng(0)
    weight, bias = (
        rng.standard_normal((3, 5, 4), dtype=np.float32),
        rng.standard_normal((3, 5), dtype=np.float32),
    )
    x = rng.standard_normal((50, 4), dtype=np.float32)
    for given, scale in ((None, 7.0), (bias, 1.0)):
        heads = Heads(torch.from_numpy(weight), None if given is None else torch.from_numpy(given), scale)
        sure, said = torch.softmax(heads(torch.from_numpy(x)), 2).max(2)
        for of_all in (True, False):
            clusters, confidence, sq_dists = Trained(weight, given, scale, of_all).judge(x)
            assert clusters.tolist() == said[0].tolist()
            expected = sure.mean(0) if of_all else sure[0]
            assert np.allclose(confidence, expected.detach().numpy(), atol=1e-5)
        unit, to = F.normalize(torch.from_numpy(x)), F.normalize(torch.from_numpy(weight[0]))[clusters]
        assert np.allclose(sq_dists, (unit - to).square().sum(1).numpy(), atol=1e-5)
    kept = Trained.from_bytes(Trained(weight, bias, 1.0, True).to_bytes())
    assert np.array_equal(kept.weight, weight) and np.array_equal(kept.bias, bias) and kept.of_all


def learner(trained):
    torch.manual_seed(0)
    recipe = Recipe(threshold=0.2, repair_after=4, repair_below=40, repair_above=60)
    rng = np.random.default_rng(5)
    start = torch.from_numpy(rng.standard_normal((2, 4, 12)))
    trunk = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )

    def encode(pixels):
        x = pixels.reshape(len(pixels), -1)[:, :12].astype(np.float64)
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1)

    return Learner(
        recipe,
        clusters=4,
        count=2,
        start=None if trained else start,
        scale=10.0,
        encode=None if trained else encode,
        trunk=trunk.double() if trained else None,
        colors=((0.5,) * 3, (0.25,) * 3),
        strong="randaugment",
        lr=1e-2,
        weight_decay=1e-4,
        images=200,
        image_size=8,
    )


def take(one, t, rank=0, workers=1, batch=10):
    rng = np.random.default_rng(t)
    pixels = rng.integers(1, 256, (2, batch, 8, 8, 3), dtype=np.uint8)
    draws = [rng.random((batch, one.draws)) for _ in range(2)]
    mine = slice(rank, None, workers)
    return one.step(t, pixels[0][mine], pixels[1][mine], [part[mine] for part in draws], batch, 0)


def _share(rank, workers, where, out):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=workers)
    kept = []
    for trained in (False, True):
        one = learner(trained)
        for t in range(8):
            take(one, t, rank, workers)
        kept.append(one.state())
    if rank == 0:
        torch.save(kept, out)
    distributed.destroy_process_group()


def test_two_workers_take_the_steps_of_one(tmp_path):
    out = tmp_path / "two.pt"
    torch.multiprocessing.spawn(_share, (2, tmp_path / "rendezvous", out), nprocs=2)
    for trained, together in zip((False, True), torch.load(out), strict=True):
        alone, begun = learner(trained), learner(trained)
        for t in range(8):
            take(alone, t)
        for name, value in alone.learning.state_dict().items():
            assert torch.allclose(value, together["learning"][name], rtol=0, atol=1e-6), name
        assert (
            torch.allclose(alone.sizes, together["sizes"], atol=1e-6)
            and alone.repaired == together["repaired"]
        )
        assert torch.allclose(alone.prior, together["prior"], atol=1e-6)
        assert (alone.heads.weight - begun.heads.weight).abs().max() > 1e-2


@pytest.mark.parametrize("trained", [False, True])
def test_a_learner_continues_from_its_state_to_the_bit(trained):
    one, other = learner(trained), learner(trained)
    for t in range(5):
        take(one, t)
    other.load(copy.deepcopy(one.state()))
    for t in range(5, 8):
        assert [float(v) for v in take(one, t)] == [float(v) for v in take(other, t)]
    for name, value in one.learning.state_dict().items():
        assert torch.equal(value, other.learning.state_dict()[name]), name
    assert torch.equal(one.prior, other.prior) and torch.equal(one.sizes, other.sizes)


# Through the stages

SMALL = {
    "embed.encoder": "pca",
    "embed.image_size": 8,
    "density.k": 6,
    "selection.method": "usl-t",
    "selection.budget": 5,
    "usl_t.steps": 12,
    "usl_t.batch": 16,
    "usl_t.neighbors": 5,
    "usl_t.lr": 0.01,
    "usl_t.checkpoint_every": 6,
    "resources.shard_rows": 32,
    "resources.workers": 1,
}


def selected(images, place, upto="selection", **options):
    settings, asked = config.load(options={**SMALL, **options})
    run = Run(str(place))
    pipeline.advance(run, pipeline.Source(str(images)), settings, asked, Reporter(quiet=True), upto=upto)
    return run


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = paint(tmp_path_factory.mktemp("usl-t") / "images", 90, 0)
    (folder / "blue" / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def run(two_cpus, images, tmp_path_factory):
    return selected(images, tmp_path_factory.mktemp("usl-t-run") / "run")


def columns(run, table):
    shards = range(len(run.manifest(table).shards))
    parts = [run.read_shard(table, shard).to_pydict() for shard in shards]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def test_the_densest_of_each_trained_cluster_is_picked(run):
    picks, clusters, density = (columns(run, table) for table in ("selection", "clusters", "density"))
    assert len(picks["image_id"]) == 5 == len(set(picks["image_id"]))
    assert clusters["image_id"].tolist() == density["image_id"].tolist() and len(clusters["image_id"]) == 90
    for cluster in set(clusters["cluster_id"]):
        here = clusters["cluster_id"] == cluster
        best = density["image_id"][here][np.argmin(density["mean_sq_dist"][here])]
        assert best in picks["image_id"]
    heads = Trained.from_bytes(run.read_bytes("training", NAME, "heads.npz"))
    x = np.concatenate([run.read_embeddings(shard)[1] for shard in range(3)])
    assert np.array_equal(heads.judge(x)[0], clusters["cluster_id"])
    told = [line for line in Training(run, NAME).metrics() if "loss" in line]
    assert told[-1]["step"] == 12 and 0 < told[-1]["clusters_used"] <= 5


def test_any_shards_give_the_same_picks(run, images, tmp_path):
    """Embeddings differ in the last bits by their place in a batch, and so do the heads begun from them."""
    other = selected(images, tmp_path / "run", **{"resources.shard_rows": 13, "resources.workers": 2})
    for table in ("clusters", "selection"):
        mine, theirs = columns(run, table), columns(other, table)
        assert all(np.array_equal(mine[key], theirs[key]) for key in ("image_id", "cluster_id"))
    losses = [[line["loss"] for line in Training(one, NAME).metrics()] for one in (run, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_trained_network_and_picks_by_confidence(two_cpus, images, tmp_path):
    """Linear heads on a network that learns and then sees all images; exactly the budget."""
    encoder = alone(tmp_path / "encoder", "simclr", "wrn-10-1")[0].run
    options = {
        "embed.encoder": encoder.root,
        "embed.image_size": None,
        "selection.budget": 12,
        "usl_t.network": "trained",
        "usl_t.heads": "linear",
        "usl_t.pick": "confidence",
        "usl_t.strong": "randaugment",
        "usl_t.threshold": 0.1,
        "usl_t.reweight": "count",
    }
    run = selected(images, tmp_path / "run", **options)
    picks, clusters = columns(run, "selection"), columns(run, "clusters")
    assert len(set(picks["image_id"])) == 12
    used = run.manifest("clusters").summary["clusters"] - run.manifest("clusters").summary["empty_clusters"]
    assert run.manifest("selection").summary["second_picks"] == 12 - min(12, used)
    of = dict(zip(clusters["image_id"].tolist(), clusters["confidence"].tolist(), strict=True))
    for cluster in set(picks["cluster_id"].tolist()):
        mine, all_ids = picks["cluster_id"] == cluster, clusters["cluster_id"] == cluster
        chosen = [of[i] for i in picks["image_id"][mine].tolist()]
        all_of = sorted((of[i] for i in clusters["image_id"][all_ids].tolist()), reverse=True)
        assert sorted(chosen, reverse=True) == all_of[: len(chosen)]
    assert picks["utility"].tolist() == pytest.approx([of[i] for i in picks["image_id"].tolist()])
    # The network did learn.
    start = learned.load(encoder.root, 8).state_dict()
    after = torch.load(io.BytesIO(run.read_bytes("training", NAME, "trunk.pt")), weights_only=True)
    assert any(not torch.equal(start[key], after[key]) for key in start if start[key].is_floating_point())


def test_pairs_are_of_neighbors(run):
    plan = Pairs(run, 91, np.array([30]), 40, 5, 3)
    near = columns(run, "neighbors")
    of = dict(zip(near["image_id"].tolist(), near["neighbors"].tolist(), strict=True))
    seen = 0
    for t in range(6):
        ids, neighbors = np.split(plan.step(t), 2)
        assert 30 not in ids
        for image, neighbor in zip(ids.tolist(), neighbors.tolist(), strict=True):
            others = [i for i in of[image] if i != image][:5]
            assert neighbor == image or neighbor in others
            seen += neighbor == image
    # One of six is the image itself.
    assert 15 < seen < 70


def test_labels_are_passed_on_to_the_densest_of_a_cluster(run):
    picks, clusters, density = (columns(run, table) for table in ("selection", "clusters", "density"))
    given = {int(picks["image_id"][0]): "a", int(picks["image_id"][1]): "b"}
    found = propagation.propagated(run, given, 4)
    for pick, label in given.items():
        cluster = clusters["cluster_id"][clusters["image_id"] == pick][0]
        here = clusters["cluster_id"] == cluster
        order = np.lexsort((density["image_id"][here], density["mean_sq_dist"][here]))
        densest = density["image_id"][here][order][:4].tolist()
        assert all(found[image] == label for image in densest)
    assert len(found) <= 8 and found.items() >= given.items()


def test_bad_input(run, images, tmp_path):
    with pytest.raises(UsageError, match="trained for one budget"):
        config.load(options={"selection.method": "usl-t", "selection.budgets": [2, 5]})
    with pytest.raises(UserError, match="are fewer than the 5 that the budget"):
        selected(images, tmp_path / "run", **{"usl_t.clusters": 4})
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32))
    settings, asked = config.load(options={**SMALL, "embed.encoder": None}, own_embeddings=True)
    with pytest.raises(UserError, match="without images to make views of"):
        pipeline.advance(
            Run(str(tmp_path / "own")),
            pipeline.Source(embeddings=str(tmp_path / "x.npy")),
            settings,
            asked,
            Reporter(quiet=True),
            upto="selection",
        )
