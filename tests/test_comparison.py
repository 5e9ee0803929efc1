"""Comparing methods: intervals and budgets by hand, rounds of active learning, and the command end to end."""

import json

import numpy as np
import oracle
import pyarrow.parquet as pq
import pytest
from conftest import unit
from scipy.special import softmax
from test_cli import ask, refused
from test_report import make

import selective_ray
from selective_ray import active, comparison, evaluation, paired
from selective_ray.paired import difference, equal_budget

# Statistics


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for seeds, least in ((5, 0.83), (10, 0.89), (30, 0.91)):
        held = 0
        for _ in range(300):
            found = difference(rng.normal(1.0, 2.0, seeds), np.zeros(seeds))
            held += found.low <= 1.0 <= found.high
        assert least <= held / 300 <= 0.985


def test_differences_by_hand():
    found = difference(np.array([3.0, 5.0, 1.0, 4.0]), np.array([1.0, 2.0, 1.0, 5.0]))
    assert (found.mean, found.wins, found.losses) == (1.0, 2, 1)
    # Every drawing of four of 2, 3, 0, -1: the widened mean of the lowest is far below 0.
    assert found.noise and found.low < 0 < found.high
    sure = difference(np.full(4, 2.0), np.full(4, 1.5))
    assert (sure.low, sure.high, sure.noise) == (0.5, 0.5, False)
    two = difference(np.array([2.0, 3.0]), np.zeros(2))
    assert two.low is None and two.noise
    assert difference(np.ones(3), np.ones(3)).noise


def test_the_budget_that_random_needs_by_hand():
    budgets = np.array([10.0, 20.0, 40.0])
    random = np.repeat([[0.4], [0.6], [0.8]], 3, axis=1)
    for ours, expected in ((0.5, 10 * 2**0.5), (0.6, 20), (0.7, 20 * 2**0.5), (0.8, 40)):
        found = equal_budget(np.full(3, ours), budgets, random)
        assert [found.budget, found.low, found.high] == pytest.approx([expected] * 3)
    assert equal_budget(np.full(3, 0.9), budgets, random).budget == np.inf
    assert equal_budget(np.full(3, 0.3), budgets, random).budget == 10
    # Where more labels did worse, the best so far counts.
    dip = np.repeat([[0.5], [0.4], [0.8]], 3, axis=1)
    assert equal_budget(np.full(3, 0.65), budgets, dip).budget == pytest.approx(20 * 2**0.5)
    noisy = equal_budget(np.array([0.55, 0.65, 0.75]), budgets, random)
    assert 10 < noisy.low < noisy.budget < noisy.high < 40
    assert equal_budget(np.array([0.5]), budgets, random[:, :1]).low is None


# Active learning


@pytest.fixture(scope="module")
def world():
    """240 vectors of 4 classes."""
    rng = np.random.default_rng(1)
    labels = rng.choice(4, 240, p=[0.1, 0.2, 0.3, 0.4])
    x = unit(rng.normal(size=(4, 12))[labels] + 0.8 * rng.normal(size=(240, 12)))
    return x, labels


def test_rounds_share_the_budget():
    assert active.batches(11, 4) == [3, 3, 3, 2]
    assert active.batches(3, 3) == [1, 1, 1]


@pytest.mark.parametrize("method", ["entropy", "margin"])
def test_a_round_buys_what_the_head_is_least_sure_of(method, world):
    x, labels = world
    z = evaluation.standard(x)
    bought = active.picks(method, x, z, labels, budget=20, rounds=2, seed=3)
    head = evaluation.fit_probe(z[bought[:10]], labels[bought[:10]])
    p = softmax(head.scores(z).astype(np.float64), axis=1)
    if method == "entropy":
        unsure = -(p * np.log(p)).sum(axis=1)
    else:
        unsure = np.sort(p, axis=1)[:, -2] - p.max(axis=1)
    unsure[bought[:10]] = -np.inf
    assert set(bought[10:].tolist()) == set(np.argsort(-unsure)[:10].tolist())


def test_only_bought_labels_are_looked_at(world):
    """The last round's labels, and all that are never bought, make no difference."""
    x, labels = world
    z = evaluation.standard(x)
    for method in active.METHODS:
        options = {"budget": 24, "rounds": 3, "seed": 5}
        bought = active.picks(method, x, z, labels, **options)
        assert len(set(bought.tolist())) == 24
        hidden = np.full(240, 3)
        hidden[bought[:16]] = labels[bought[:16]]
        assert np.array_equal(active.picks(method, x, z, hidden, **options), bought)


def test_gradients_are_spread_as_if_written_out():
    rng = np.random.default_rng(2)
    p, z = softmax(rng.normal(size=(50, 3)), axis=1), rng.normal(size=(50, 4))
    numbers = np.arange(50, dtype=np.uint64)
    found = active.spread_gradients(p, z, 8, np.random.default_rng(7), numbers)
    a = p - np.eye(3)[p.argmax(axis=1)]
    gradients = (a[:, :, None] * z[:, None, :]).reshape(50, 12)
    draws, chosen = np.random.default_rng(7), [int((gradients**2).sum(axis=1).argmax())]
    while len(chosen) < 8:
        nearest = oracle.sq_dists(gradients, gradients[chosen]).min(axis=1)
        nearest[chosen] = 0
        chosen.append(int(draws.choice(50, p=nearest / nearest.sum())))
    assert found.tolist() == chosen
    # A head that knows one class is sure of everything: the drawn numbers decide.
    assert active.spread_gradients(np.ones((50, 1)), z, 3, draws, numbers[::-1]).tolist() == [49, 48, 47]


def test_core_set_is_the_farthest_from_what_is_bought(world):
    x, labels = world
    bought = active.picks("core-set", x, x, labels, budget=12, rounds=2, seed=0)
    for number in range(6, 12):
        far = oracle.sq_dists(x, x[bought[:number]]).min(axis=1)
        assert far[bought[number]] == pytest.approx(far.max())


# The command


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A finished run of three shards, whose image ids are not the numbers of rows, and labels."""
    x, labels = world
    folder = tmp_path_factory.mktemp("compare")
    uris = [f"/data/{i}.png" for i in range(240)]
    make(folder / "run", x, 12, uris, settings={"density.k": 6, "selection.weight": 0.5})
    lines = ["image_id,label", *(f"{2 * i + 1},class {c}" for i, c in enumerate(labels))]
    (folder / "labels.csv").write_text("\n".join(lines))
    return folder


def compare(run, *words):
    result = ask("compare", "--run", run / "run", "--labels", run / "labels.csv", *words, "--json")
    assert result.exit_code == 0, result.stderr or result.exception
    return json.loads(result.stdout)


def test_all_methods_end_to_end(run, world, monkeypatch):
    _, labels = world
    made = []
    judge = evaluation.judge
    monkeypatch.setattr(evaluation, "judge", lambda *asked: made.append(asked[1]) or judge(*asked))
    words = "--budgets", "8,16", "--seeds", 3, "--rounds", 2
    first = compare(run, *words, "--methods", "typiclust")
    # Three methods at two budgets, and random picks at 32; 64 is more than a quarter of all.
    assert len(made) == 3 * (3 * 2 + 1)
    found = compare(run, *words)
    methods = len(comparison.METHODS)
    assert len(made) == 3 * (2 * methods + 1)
    assert {(one["method"], one["budget"]) for one in found["methods"]} == {
        (method, budget) for method in comparison.METHODS for budget in (8, 16)
    }
    both = {(one["method"], one["budget"]): one for one in found["methods"]}
    for one in first["methods"]:
        assert both[one["method"], one["budget"]] == one
    assert {one["method"] for one in found["methods"] if one["sees_labels"]} == {
        "stratified",
        *active.METHODS,
    }
    # Figures, differences and intervals follow from the single values, which are in the run.
    table = pq.read_table(next((run / "run" / "comparison").glob("*.parquet"))).to_pylist()
    assert len(table) == 3 * (2 * methods + 1) * 8
    values = {(r["method"], r["budget"], r["seed"], r["figure"]): r["value"] for r in table}
    for (method, budget), one in both.items():
        for figure, by_seed in one["figures"].items():
            assert by_seed == [values[method, budget, seed, figure] for seed in range(3)]
        for other, by_figure in one["difference"].items():
            apart = np.subtract(*(both[m, budget]["figures"]["linear_probe"] for m in (method, other)))
            told = by_figure["linear_probe"]
            assert told["mean"] == pytest.approx(apart.mean())
            assert (told["wins"], told["losses"]) == ((apart > 0).sum(), (apart < 0).sum())
            assert told["noise"] == (told["low"] <= 0 <= told["high"])
    # Every selection is of exactly the budget, and random ones differ by seed.
    cells = [json.loads(path.read_text()) for path in (run / "run/comparison/cells").glob("*.json")]
    assert all(len(set(cell["image_ids"])) == cell["budget"] for cell in cells)
    drawn = {tuple(cell["image_ids"]) for cell in cells if (cell["method"], cell["budget"]) == ("random", 8)}
    assert len(drawn) == 3
    (even,) = [c for c in cells if (c["method"], c["budget"], c["seed"]) == ("stratified", 8, 0)]
    assert np.bincount(labels[np.array(even["image_ids"]) // 2]).tolist() == [2, 2, 2, 2]
    page = (run / "run/comparison/index.html").read_text()
    for method in both:
        assert method[0] in page
    assert "<script" not in page and "nan" not in page and page.count("<svg") == 2 * (methods - 1)
    assert paired.LEVEL == 0.95 and "95 % interval" in page
    said = ask("compare", "--run", run / "run", "--labels", run / "labels.csv", *words).stdout
    assert "linear probe, 8 labels" in said and "random needs" in said
    assert len(made) == 3 * (2 * methods + 1)


def test_picks_are_those_of_select(run, world):
    """With the settings that the run was made with."""
    compare(
        run, "--budgets", "8,16", "--seeds", 3, "--methods", "prototypes,k-center,rdss,max-herding,typiclust"
    )
    cells = [json.loads(path.read_text()) for path in (run / "run/comparison/cells").glob("*.json")]
    for method in ("usl", "random", "k-center", "rdss", "max-herding", "typiclust"):
        settings = {"selection.method": method, "density.k": 6, "selection.weight": 0.5}
        rows = selective_ray.select(world[0], 8, seed=1, settings=settings).rows
        mine = [c for c in cells if (c["method"], c["budget"], c["seed"]) == (method, 8, 1)]
        assert any(sorted(cell["image_ids"]) == sorted((2 * rows + 1).tolist()) for cell in mine)


def test_other_settings_and_few_labels_are_other_cells(run, tmp_path):
    few = tmp_path / "few.csv"
    few.write_text("\n".join((run / "labels.csv").read_text().splitlines()[:151]))
    words = "--budgets", "8", "--seeds", 1, "--methods", "usl"
    result = ask("compare", "--run", run / "run", "--labels", few, *words, "--json")
    told = json.loads(result.stdout)
    assert told["compared"] == 150 and "150 of 240 images have a label" in told["warnings"][0]
    # One seed: no interval.
    (usl,) = (one for one in told["methods"] if one["method"] == "usl")
    assert usl["difference"]["random"]["linear_probe"]["low"] is None
    plain, weighted = (
        compare(run, *words, *more)["methods"] for more in ((), ("--set", "selection.weight=5"))
    )
    values = [
        [one["figures"]["coverage"] for one in methods if one["method"] == "usl"]
        for methods in (plain, weighted)
    ]
    assert values[0] != values[1]


def test_what_is_not_possible(run, tmp_path):
    words = "compare", "--run", run / "run", "--labels", run / "labels.csv"
    assert "no method 'usk'" in refused(2, *words, "--budgets", "8", "--methods", "usk")
    assert "must increase" in refused(2, *words, "--budgets", "8,8")
    assert "no whole numbers" in refused(2, *words, "--budgets", "8,x")
    said = refused(2, *words, "--budgets", "4,9", "--rounds", 5, "--methods", "badge")
    assert "5 rounds cannot share a budget of 4" in said
    assert "leaves none of the 240" in refused(1, *words, "--budgets", "240")
    assert "does not take" in refused(2, *words, "--budgets", "8", "--set", "embed.encoder=pca")
    alike = tmp_path / "alike.csv"
    alike.write_text("image_id,label\n1,a\n2,a\n")
    said = refused(1, "compare", "--run", run / "run", "--labels", alike, "--budgets", "8")
    assert "cannot tell one selection from another" in said
