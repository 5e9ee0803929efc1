"""Baselines of selection: each against a plain version written out, laws, and any split of the rows."""

from collections import Counter

import numpy as np
import oracle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import unit
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import ask, line_of

import selective_ray
from selective_ray import (
    config,
    greedy,
    max_herding,
    methods,
    page,
    probcover,
    random_picks,
    rdss,
    stratified,
    truth,
    typiclust,
)
from selective_ray.actors.picking import Asked
from selective_ray.actors.pool import Pool
from selective_ray.actors.selection import METHODS
from selective_ray.actors.session import Session
from selective_ray.config import METHOD_KEYS, Resources
from selective_ray.errors import UsageError, UserError
from selective_ray.methods import Terms
from selective_ray.store import Run

GREEDY_TERMS = {
    "k-center": Terms("k-center", 12, 3, 1.0),
    "rdss": Terms("rdss", 12, 3, 0.7, 2048),
    "probcover": Terms("probcover", 12, 3, 0.3),
    "max-herding": Terms("max-herding", 12, 3, 0.4),
}
K = 6


def blobs(seed, n=120, d=5, centers=6):
    rng = np.random.default_rng(seed)
    return unit(rng.normal(size=(centers, d))[rng.integers(0, centers, n)] + 0.3 * rng.normal(size=(n, d)))


def lists_of(x, ids):
    """The K nearest of every row, itself among them, as the density stage keeps them."""
    distances = oracle.sq_dists(x, x)
    order = np.lexsort((np.broadcast_to(ids, distances.shape), distances), axis=1)[:, :K]
    return ids, ids[order], np.take_along_axis(distances, order, axis=1).astype(np.float32)


def picked(terms, x, ids, parts=1, fixed=(), count=12, dies=None):
    """Run the loop over rows that are spread over `parts` processes; one may die after some steps."""
    lists = [lists_of(x, ids)]
    if terms.method == "rdss":
        sums = [terms.random_features(x.shape[1]).sums(part, len(x)) for part in np.array_split(x, parts)]
        mean = rdss.mean_of(np.sum(sums, axis=0), len(x))
        terms = Terms(terms.method, terms.budget, terms.seed, terms.radius, terms.features, mean)
    split = np.array_split(np.arange(len(x)), parts)
    held = [greedy.Met(methods.rows_of(terms, x[rows], ids[rows], lists, rows[0])) for rows in split]
    steps = 0

    def step(since, news):
        nonlocal steps
        steps += 1
        if steps == dies:
            held[0] = greedy.Met(methods.rows_of(terms, x[split[0]], ids[split[0]], lists))
        best = [met.best(since, news) for met in held]
        if None in best:
            return None
        first, *rest = best
        for other in rest:
            first = first.merge(other)
        return first

    rows = {
        int(ids[row]): (met, at) for met, part in zip(held, split, strict=True) for at, row in enumerate(part)
    }
    begun = [rows[i][0].rows.pick_of(rows[i][1]) for i in fixed]
    return [pick.image_id for pick in greedy.picks(step, begun, count)]


# Plain versions


def plain_k_center(x, terms, count):
    picks = [int(random_picks.hashed(np.arange(len(x)), terms.seed).argmin())]
    distances = oracle.sq_dists(x, x)
    while len(picks) < count:
        nearest = distances[:, picks].min(axis=1)
        nearest[picks] = -1
        picks.append(int(nearest.argmax()))
    return picks


def plain_herding(x, terms, count):
    """With the mean kernel by the same random features, and the sums written out."""
    kernel, z = (
        np.exp(-oracle.sq_dists(x, x) / (2 * terms.radius**2)),
        terms.random_features(x.shape[1]).of(x),
    )
    mu = z @ z.mean(axis=0)
    a, picks = 1 - 1 / np.sqrt(terms.budget), [int(mu.argmax())]
    while len(picks) < count:
        score = a * mu - kernel[:, picks].mean(axis=1)
        score[picks] = -np.inf
        picks.append(int(score.argmax()))
    return picks


def plain_cover(x, terms, count):
    """The value of every candidate set, summed anew."""
    _, near, _ = lists_of(x, np.arange(len(x)))
    distances, linked = oracle.sq_dists(x, x), np.eye(len(x), dtype=bool)
    linked[np.arange(len(x))[:, None], near] = True
    linked |= linked.T
    gauss = np.exp(-distances / (2 * terms.radius**2))
    inside = distances <= terms.radius**2
    kernel = np.where(linked, gauss if terms.method == "max-herding" else inside + gauss / 2**16, 0)
    picks = []
    while len(picks) < count:
        have = kernel[:, picks].max(axis=1, initial=0)
        value = np.maximum(kernel, have[:, None]).sum(axis=0)
        value[picks] = -1
        picks.append(int(value.argmax()))
    return picks


PLAIN = {
    "k-center": plain_k_center,
    "rdss": plain_herding,
    "probcover": plain_cover,
    "max-herding": plain_cover,
}


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("seed", range(4))
def test_picks_are_those_of_the_plain_version(method, seed):
    x, terms = blobs(seed), GREEDY_TERMS[method]
    assert picked(terms, x, np.arange(120)) == PLAIN[method](x, terms, 12)


def test_herding_is_nearer_to_all_rows_than_chance():
    """By the discrepancy of the kernel itself, of which only an estimate is used."""
    for seed in range(4):
        x, terms = blobs(seed), GREEDY_TERMS["rdss"]
        kernel = np.exp(-oracle.sq_dists(x, x) / (2 * terms.radius**2))

        def discrepancy(rows, kernel=kernel):
            return kernel[np.ix_(rows, rows)].mean() - 2 * kernel[rows].mean() + kernel.mean()

        drawn = [discrepancy(np.random.default_rng(i).choice(120, 12, replace=False)) for i in range(50)]
        assert discrepancy(picked(terms, x, np.arange(120))) < 0.5 * np.mean(drawn)


def test_random_features_estimate_the_kernel():
    x = blobs(0)
    features = rdss.Features(5, 8192, 0.7, 1)
    z = features.of(x)
    kernel = np.exp(-oracle.sq_dists(x, x) / (2 * 0.7**2))
    assert np.abs(z @ z.T - kernel).max() < 0.08
    whole = features.sums(x, 120)
    assert np.array_equal(whole, features.sums(x[:50], 120) + features.sums(x[50:], 120))
    assert np.allclose(rdss.mean_of(whole, 120), z.mean(axis=0), atol=1e-12)


@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(PLAIN)), st.integers(0, 3), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_any_split_and_any_death_give_the_same_picks(seed, method, fixed, dies):
    x, terms = blobs(seed, n=60), GREEDY_TERMS[method]
    # Copies, so that there are ties; image ids are not row numbers.
    x[40:50] = x[:10]
    ids = 3 * np.arange(60) + 1
    fixed = ids[[7, 33, 59]][:fixed].tolist()
    once = picked(terms, x, ids, fixed=fixed)
    assert len({*once, *fixed}) == 12 + len(fixed)
    for parts in (2, 7):
        assert picked(terms, x, ids, parts, fixed, dies=dies) == once


def test_picks_go_on_to_the_last_row():
    x = blobs(1, n=30)
    for terms in GREEDY_TERMS.values():
        assert sorted(picked(terms, x, np.arange(30), 2, count=30)) == list(range(30))


def test_covering_forgets_nothing():
    """What rows would add after some picks equals what it is when summed anew."""
    x, ids = blobs(2), np.arange(120)
    pairs = max_herding.graph(ids, [lists_of(x, ids)])
    rows = max_herding.Covering(ids, pairs, lambda sq_dists: probcover.top_hat(sq_dists, 0.3))
    for _ in range(10):
        rows.take(rows.best())
    most = np.zeros(120, np.int64)
    most[rows.targets] = rows.most
    again = np.zeros(120, np.int64)
    np.add.at(again, pairs.row, np.maximum(probcover.top_hat(pairs.sq_dists, 0.3) - most[pairs.target], 0))
    open_ = rows.gains >= 0
    assert np.count_nonzero(open_) == 110
    assert np.array_equal(rows.gains[open_], again[open_])


def test_the_most_typical_of_each_cluster():
    x, rng = blobs(3), np.random.default_rng(0)
    clusters = rng.integers(0, 7, 120).astype(np.int32)
    clusters[clusters == 5] = 4
    clusters[17] = 5
    found = typiclust.picks(x, 2 * np.arange(120), clusters)
    for c, image_id, utility in zip(found.cluster_ids, found.image_ids, found.utilities, strict=True):
        members = np.flatnonzero(clusters == c)
        k = min(20, len(members) // 2)
        near = np.sort(oracle.sq_dists(x[members], x[members]), axis=1)[:, 1 : k + 1]
        typical = 1 / (near.mean(axis=1) + 1e-5) if k else np.zeros(1)
        assert image_id == 2 * members[typical.argmax()]
        assert utility == pytest.approx(typical.max(), rel=1e-9)
    assert found.cluster_ids.tolist() == list(range(7))


def test_random_draws_are_uniform_and_contain_each_other():
    ids, nothing = np.arange(40), np.empty(0, np.int64)
    counts = Counter(
        i for seed in range(2000) for i in random_picks.draw(ids, ids, 10, seed, nothing).image_ids.tolist()
    )
    # 2,000 draws of a quarter: 500 each, standard deviation 19.4.
    assert max(abs(counts[i] - 500) for i in range(40)) < 90
    large = random_picks.draw(ids, ids, 20, 5, np.array([3, 4])).image_ids
    assert set(random_picks.draw(ids, ids, 8, 5, np.array([3, 4])).image_ids) < set(large)
    assert not {3, 4} & set(large.tolist())
    halves = [random_picks.draw(part, part, 20, 5, np.array([3, 4])) for part in np.array_split(ids, 3)]
    assert np.array_equal(halves[2].merge(halves[0], 20).merge(halves[1], 20).image_ids, large)


def test_stratified_is_as_even_as_can_be():
    codes = np.repeat([0, 1, 2, 3, -1], [50, 50, 2, 30, 9])
    ids = np.arange(len(codes))
    counts = np.bincount(codes[stratified.picks(ids, codes, 21, 0, np.empty(0, np.int64))])
    assert counts[2] == 2 and sorted(np.delete(counts, 2).tolist()) == [6, 6, 7]
    # What is there already counts, and is not picked again.
    fixed = np.arange(6)
    more = stratified.picks(ids, codes, 18, 0, fixed)
    assert np.bincount(codes[more]).tolist() in ([1, 7, 2, 8], [1, 8, 2, 7], [2, 7, 2, 7])
    assert len(set(more.tolist())) == 18 and not set(fixed.tolist()) & set(more.tolist())
    with pytest.raises(UserError, match=r"there are 132 of them, and 133 to pick"):
        stratified.picks(ids, codes, 133, 0, np.empty(0, np.int64))


def test_in_memory_every_method_gives_the_budget():
    x = blobs(4, n=200)
    labels = list("abcd" * 50)
    found = {}
    # The clusters of usl-t are trained on images.
    for method in METHOD_KEYS.keys() - {"usl-t"}:
        options = {"selection.method": method, "density.k": 5}
        given = labels if method == "stratified" else None
        rows = selective_ray.select(x, 9, settings=options, labels=given).rows
        assert len(set(rows.tolist())) == 9
        found[method] = rows
    assert sorted(Counter(labels[i] for i in found["stratified"]).values()) == [2, 2, 2, 3]
    # At most twice the smallest radius that any picks reach (Gonzalez, 1985).
    sq_radius = {method: oracle.sq_dists(x, x[rows]).min(axis=1).max() for method, rows in found.items()}
    assert sq_radius["k-center"] <= 4 * min(sq_radius.values())
    with pytest.raises(UsageError, match="one for each"):
        selective_ray.select(x, 9, settings={"selection.method": "stratified"}, labels=labels[:5])


def test_the_page_has_words_for_every_method():
    assert METHOD_KEYS.keys() == page.METHODS.keys() | page.OF_CLUSTERS.keys() == page.UTILITIES.keys()
    assert METHOD_KEYS.keys() == METHODS.keys()


# On Ray


def read(run, table):
    return pq.read_table(next((run / table).glob("*.parquet")))


def told(*words):
    result = ask(*words)
    assert result.exit_code == 0, result.stderr or result.exception
    return result.stdout


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    x = blobs(9, n=300, d=8, centers=15)
    np.save(folder / "x.npy", x)
    lines = ["image_id,label", *(f"{i},{'abcde'[i % 5]}" for i in range(300))]
    (folder / "labels.csv").write_text("\n".join(lines))
    return folder


KEPT = "--set", "density.k=5", "--set", "density.keep_neighbors=true"


@pytest.fixture(scope="module")
def base(vectors, two_cpus, tmp_path_factory):
    """A run of seven shards, selected by max-herding through the command."""
    run = tmp_path_factory.mktemp("base") / "run"
    words = "--budget", 12, "--method", "max-herding", "--set", "resources.shard_rows=43", *KEPT
    told("select", "--embeddings", vectors / "x.npy", "--run", run, *words)
    return run


def expected(vectors, method, budget=12):
    labels = ["abcde"[i % 5] for i in range(300)] if method == "stratified" else None
    settings = {"selection.method": method, "density.k": 5}
    return selective_ray.select(np.load(vectors / "x.npy"), budget, settings=settings, labels=labels)


def test_the_command_picks_what_the_library_picks(vectors, base):
    library, table = expected(vectors, "max-herding"), read(base, "selection")
    assert table["image_id"].to_pylist() == library.rows.tolist()
    assert table["utility"].to_numpy() == pytest.approx(library.utilities, rel=1e-6)
    words = (base / "report" / "index.html").read_text()
    assert "brought most others nearer" in words and "oracle" not in words


@pytest.mark.parametrize("workers", [1, 3])
def test_all_methods_pick_what_the_library_picks_on_any_actors(workers, vectors, base):
    """On the shards of one run; with three actors, one is killed after every few picks."""
    run = Run(str(base))
    clusters = pa.concat_tables(run.read_shard("clusters", shard) for shard in range(7))
    sizes = np.bincount(clusters["cluster_id"].to_numpy(), minlength=12)
    nothing = np.empty(0, np.int64)
    pool = Pool(run, Resources(workers=workers), Session())
    pool.start()
    for method in ("typiclust", "random", "stratified", *methods.GREEDY):
        labels = str(vectors / "labels.csv") if method == "stratified" else None
        options = {"selection.method": method, "selection.labels": labels, "density.k": 5}
        settings = config.load(options=options)[0]
        asked = Asked(
            *(settings, "clusters", "mean_sq_dist", nothing, np.empty(0, np.int32), sizes, 12, None, method),
            truth=truth.read([run], labels) if labels else None,
        )
        picked = 0

        def watch(_, method=method):
            nonlocal picked
            picked += 1
            if workers == 3 and method in ("max-herding", "rdss") and picked == 5:
                ray.kill(pool.actors[1], no_restart=False)

        chosen = METHODS[method].pick(pool, asked, watch)
        library = expected(vectors, method)
        assert sorted(chosen.image_ids.tolist()) == sorted(library.rows.tolist()), method
        _, utilities = chosen.judge(library.rows, library.sq_dists)
        assert utilities == pytest.approx(library.utilities, rel=1e-6)
    pool.stop()


def test_budgets_that_contain_each_other_and_labeled_images(vectors, base, tmp_path):
    marked = tmp_path / "marked.csv"
    marked.write_text("image_id\n3\n200\n")
    for method in ("k-center", "stratified"):
        run = tmp_path / method
        given = ("--set", f"selection.labels={vectors / 'labels.csv'}") if method == "stratified" else ()
        words = "--budgets", "6,12", "--method", method, "--labeled", marked, *given, *KEPT
        told("select", "--embeddings", base, "--run", run, *words)
        small, large = (set(read(run, name)["image_id"].to_pylist()) for name in ("selection-6", "selection"))
        assert small < large and len(small) == 6 and len(large) == 12
        assert not {3, 200} & large
        assert "nothing to do" in told("select", "--embeddings", base, "--run", run, *words)
    # 3 and 200 are of the classes d and a, and count.
    assert np.bincount(np.array([*large, 3, 200]) % 5).max() == 3
    assert "oracle" in (run / "report" / "index.html").read_text()
    assert "oracle" in told("evaluate", "--run", run, "--labels", vectors / "labels.csv", "--draws", 2)


def test_what_is_not_possible(vectors, two_cpus, tmp_path):
    words = ("select", "--embeddings", vectors / "x.npy", "--run", tmp_path / "run", "--budget", 5)
    said = line_of(ask(*words, "--method", "probcover"), 2)
    assert "add --set density.keep_neighbors=true" in said
    assert "oracle" in line_of(ask(*words, "--method", "stratified"), 2)
    labels = "--set", f"selection.labels={vectors / 'labels.csv'}"
    assert "select without labels" in line_of(ask(*words, *labels), 2)
    gone = "--method", "stratified", "--set", "selection.labels=/nowhere.csv"
    assert "there is no file /nowhere.csv" in line_of(ask(*words, *gone), 1)
    assert not (tmp_path / "run").exists()
    few = tmp_path / "few.csv"
    few.write_text("image_id,label\n1,a\n2,b\n")
    given = "--method", "stratified", "--set", f"selection.labels={few}", "--set", "density.k=5"
    assert "there are 2 of them, and 5 to pick" in line_of(ask(*words, *given), 1)
