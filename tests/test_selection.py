"""The regularized selection: against the oracle, its laws, and close calls that products cannot decide."""

import numpy as np
import oracle
import pytest
from conftest import unit
from hypothesis import given, settings
from hypothesis import strategies as st

from selective_ray import assignment, density, distances, kmeans, nearest_picks, selection
from selective_ray.repulsion import PickedVectors, Repulsion, direct_repulsion, repulsion_unit
from selective_ray.schema import Picks
from selective_ray.selection import Candidates

# The variants of the published code, as the oracle takes them.
VARIANTS = {
    "noreg": {"rounds": 1, "weight": 0.0, "momentum": 0.0, "alpha": 1.0},
    "cifar10": {"rounds": 10, "weight": 0.5, "momentum": 0.9, "alpha": 0.5, "horizon_sq_dist": 4.0},
    "cifar100": {"rounds": 10, "weight": 1.0, "momentum": 0.9, "alpha": 1.0, "horizon_sq_dist": 1.0},
    "moco": {
        "rounds": 2,
        "weight": 1.5,
        "momentum": 0.0,
        "alpha": 0.5,
        "horizon_picks": 4,
        "exclude_own_cluster": False,
    },
    "clip": {"rounds": 2, "weight": 0.05, "momentum": 0.0, "alpha": 1.0, "horizon_picks": 4},
}


def run(x, labels, utility, parts=1, *, rounds, weight, momentum, prune=True, **repulsion):
    """Select among rows that are spread over `parts` processes."""
    held = hold(x, labels, utility, parts, momentum=momentum, prune=prune, **repulsion)
    return select(x, held, rounds=rounds, weight=weight)


def hold(x, labels, utility, parts=1, *, momentum, prune=True, **repulsion):
    return [
        Candidates(
            x[rows],
            rows,
            labels[rows].astype(np.int32),
            utility[rows],
            momentum=momentum,
            parameters=Repulsion(**repulsion),
            prune=prune,
        )
        for rows in np.array_split(np.arange(len(x)), parts)
        if len(rows)
    ]


def select(x, held, *, rounds, weight):
    def nominate(weight):
        bar, picks = Picks.none(), Picks.none()
        for candidates in held:
            bar = bar.merge(candidates.bar(weight))
        for candidates in held:
            picks = picks.merge(candidates.nominate(weight, bar))
        return picks

    def repel(picked):
        for candidates in held:
            candidates.repel(picked)

    return selection.rounds(
        nominate,
        lambda picks: PickedVectors(picks.cluster_ids, picks.image_ids, x[picks.image_ids]),
        repel,
        n_rounds=rounds,
        weight=weight,
    )


def world(seed, n=150, m=9, d=6, copies=0):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(m, d))
    x = unit(centers[rng.integers(0, m, n)] + 0.4 * rng.normal(size=(n, d)))
    x[n - copies :] = x[:copies]
    clustering = kmeans.lloyd(
        kmeans.Rows(x, np.arange(n), n).step,
        x[kmeans.initial_rows(n, m, seed)],
        n=n,
        iterations=10,
        tolerance=0.0,
        final_assignment=True,
    )
    labels = assignment.assign(x, clustering.assigned_by)
    return x, labels, 1 / oracle.mean_sq_dist(x, 10)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_oracle(variant, seed):
    x, labels, utility = world(seed)
    expected = oracle.select(x, labels, utility, **VARIANTS[variant])
    assert run(x, labels, utility, **VARIANTS[variant]).image_ids.tolist() == expected.tolist()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("parts", [2, 7, 150])
def test_same_picks_and_utilities_for_any_split_and_block(variant, parts, monkeypatch):
    x, labels, utility = world(1)
    expected = run(x, labels, utility, **VARIANTS[variant])
    monkeypatch.setattr(distances, "BLOCK_PRODUCTS", 64)
    found = run(x, labels, utility, parts, **VARIANTS[variant])
    assert found.image_ids.tolist() == expected.image_ids.tolist()
    assert found.utilities.tolist() == expected.utilities.tolist()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_laws(seed):
    x, labels, utility = world(seed, n=60, m=5)
    plain = run(x, labels, utility, **VARIANTS["noreg"]).image_ids.tolist()
    cifar = VARIANTS["cifar10"]
    assert run(x, labels, utility, **{**cifar, "weight": 0.0}).image_ids.tolist() == plain
    assert run(x, labels, utility, **{**cifar, "rounds": 1}).image_ids.tolist() == plain
    # No two unit vectors are farther apart than 4.
    unlimited = run(x, labels, utility, **{**cifar, "horizon_sq_dist": 0.0})
    assert run(x, labels, utility, **{**cifar, "horizon_sq_dist": 4.0 + 1e-5}).image_ids.tolist() == (
        unlimited.image_ids.tolist()
    )
    # A window of all picks is no window.
    assert run(x, labels, utility, **{**cifar, "horizon_picks": 5}).image_ids.tolist() == (
        run(x, labels, utility, **cifar).image_ids.tolist()
    )
    # Rows in another order give the same picks.
    order = np.random.default_rng(seed).permutation(60)
    shuffled = run(x[order], labels[order], utility[order], **cifar)
    assert order[shuffled.image_ids].tolist() == run(x, labels, utility, **cifar).image_ids.tolist()


@given(
    st.integers(0, 2**32 - 1),
    st.fixed_dictionaries(
        {
            "rounds": st.integers(1, 6),
            "weight": st.sampled_from([1e-3, 0.05, 0.5, 3.0]),
            "momentum": st.sampled_from([0.0, 0.5, 0.9]),
            "alpha": st.sampled_from([0.5, 1.0, 1.7]),
            "horizon_sq_dist": st.sampled_from([0.0, 0.3, 1.0, 4.0]),
            "horizon_picks": st.sampled_from([0, 1, 2, 5, 30]),
            "exclude_own_cluster": st.booleans(),
        }
    ),
    st.sampled_from([2, 64]),
    st.sampled_from([0, 1, 8]),
)
@settings(max_examples=100, deadline=None)
def test_pruning_changes_nothing(seed, options, glimpsed, spare):
    """Against the oracle and against meeting all picks in every round; a fifth of the rows are copies."""
    x, labels, utility = world(seed, n=70, m=7, copies=14)
    expected = oracle.select(x, labels, utility, **options)
    with pytest.MonkeyPatch.context() as patch:
        # So few that rows look at some picks first, and often know too few.
        patch.setattr(selection, "GLIMPSED_PICKS", glimpsed)
        patch.setattr(nearest_picks, "SPARE_PICKS", spare)
        found = run(x, labels, utility, **options)
    assert found.image_ids.tolist() == expected.tolist()
    everything = run(x, labels, utility, prune=False, **options)
    assert found.image_ids.tolist() == everything.image_ids.tolist()
    assert found.utilities.tolist() == everything.utilities.tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_that_are_read_again_meet_all_rounds_so_far(variant):
    """After every round one of three processes begins anew, with nothing but the picks of all rounds."""
    x, labels, utility = world(3)
    options = {key: value for key, value in VARIANTS[variant].items() if key not in ("rounds", "weight")}
    how = {key: VARIANTS[variant][key] for key in ("rounds", "weight")}
    expected = select(x, hold(x, labels, utility, 3, **options), **how)
    held, history = hold(x, labels, utility, 3, **options), []

    class Reborn:
        def __getattr__(self, name):
            return getattr(held[1], name)

        def repel(self, picked):
            history.append(picked)
            held[1] = hold(x, labels, utility, 3, **options)[1]
            for earlier in history:
                held[1].repel(earlier)

    found = select(x, [held[0], Reborn(), held[2]], **how)
    assert found.image_ids.tolist() == expected.image_ids.tolist()
    assert found.utilities.tolist() == expected.utilities.tolist()


@pytest.mark.parametrize("variant", ["cifar100", "clip"])
def test_pruning_compares_few(variant):
    x, labels, utility = world(0, n=4000, m=20, d=16)
    options = {key: value for key, value in VARIANTS[variant].items() if key not in ("rounds", "weight")}
    compared = {}
    for prune in (True, False):
        (held,) = hold(x, labels, utility, prune=prune, **options)
        select(x, [held], rounds=4, weight=VARIANTS[variant]["weight"])
        compared[prune] = held.compared
    assert compared[False] >= 3 * 4000 * 20
    assert compared[True] < compared[False] / 10


def test_moving_average_reaches_one_minus_momentum_to_the_power():
    x, labels, utility = world(0)
    candidates = Candidates(
        x, np.arange(len(x)), labels, utility, momentum=0.9, parameters=Repulsion(0.5, 0, 0, True)
    )
    picks = candidates.nominate(0.0)
    picked = PickedVectors(picks.cluster_ids, picks.image_ids, x[picks.image_ids])
    candidates.repel(picked)
    everything = np.arange(len(x))
    once = candidates.exact_repulsion(everything)
    for _ in range(8):
        candidates.repel(picked)
    assert np.allclose(candidates.exact_repulsion(everything), once / 0.1 * (1 - 0.9**9))


def test_more_weight_pushes_picks_apart():
    def spread(weight):
        distances_ = []
        for seed in range(8):
            x, labels, utility = world(seed)
            ids = run(x, labels, utility, **{**VARIANTS["cifar100"], "weight": weight}).image_ids
            pairs = oracle.sq_dists(x[ids], x[ids]) + 10 * np.eye(len(ids))
            distances_.append(pairs.min(axis=1).mean())
        return np.mean(distances_)

    assert spread(3.0) > spread(0.0)


def test_duplicates_of_a_pick_are_not_pushed_by_it():
    """In MoCo's mode only a pick at distance zero is left out: the pick itself and its exact duplicates."""
    x = unit(np.array([[1, 0.0], [1, 0.0], [0.9, 0.1], [0, 1.0]]))
    candidates = Candidates(
        x,
        np.arange(4),
        np.array([0, 0, 0, 1], np.int32),
        np.ones(4),
        momentum=0.0,
        parameters=Repulsion(0.5, 0, 0, False),
    )
    candidates.repel(PickedVectors(np.array([0, 1], np.int32), np.array([0, 3]), x[[0, 3]]))
    repulsion = candidates.exact_repulsion(np.arange(4))
    assert repulsion[0] == repulsion[1] == pytest.approx(1 / np.sqrt(2))
    assert repulsion[2] > 5


def test_window_is_taken_before_the_own_cluster_is_left_out():
    x = np.float32([[0.3], [-0.4], [0.6]])
    picked = PickedVectors(np.arange(3, dtype=np.int32), np.arange(3), x)
    push = direct_repulsion(np.zeros((1, 1), np.float32), np.int32([0]), picked, Repulsion(1.0, 0.0, 2))
    assert push[0] == pytest.approx(1 / 0.16)


def test_near_duplicates_of_picks_are_judged_by_direct_differences():
    """Candidates a millionth apart: their utilities differ by less than float64 products can tell."""
    rng = np.random.default_rng(3)
    base = unit(rng.normal(size=(4, 16)))
    x = unit(np.repeat(base, 25, axis=0) + 1e-6 * rng.normal(size=(100, 16)))
    labels = np.repeat(np.arange(4), 25)
    utility = np.ones(100)
    options = VARIANTS["cifar100"] | {"weight": 1e-3, "horizon_sq_dist": 0.0, "exclude_own_cluster": False}
    expected = run(x, labels, utility, **options)
    for parts in (3, 100):
        found = run(x, labels, utility, parts, **options)
        assert found.image_ids.tolist() == expected.image_ids.tolist()
        assert found.utilities.tolist() == expected.utilities.tolist()


def test_scaled_weight_is_in_units_of_what_picks_feel():
    x, labels, _ = world(2)
    parameters = Repulsion(0.5, 0, 0, True)
    picks = np.array([np.flatnonzero(labels == c)[0] for c in range(9)])
    picked = PickedVectors(np.arange(9, dtype=np.int32), picks, x[picks])
    pairs = oracle.sq_dists(x[picks], x[picks])
    np.fill_diagonal(pairs, np.inf)
    assert repulsion_unit(picked, parameters) == pytest.approx(np.median((pairs**-0.5).sum(axis=1)))
    alone = PickedVectors(np.zeros(1, np.int32), np.zeros(1, np.int64), x[:1])
    assert repulsion_unit(alone, parameters) == 1.0


def test_relative_density_has_median_one():
    sq_dists = np.array([0.1, 0.2, 0.4], np.float32)
    relative = density.relative(sq_dists, unit=float(np.float32(0.2)), floor=1e-6)
    assert relative.tolist() == pytest.approx([2.0, 1.0, 0.5])


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("exclude_own", [True, False])
def test_nearest_picks_of_rounds_that_change(keep, exclude_own):
    """Rows that meet the picks now and then, against direct differences with all; bounds are never above."""
    rng = np.random.default_rng(5)
    x, labels, _ = world(5, n=300, m=12)
    x[200:] = x[:100]
    labels[200:] = labels[:100]
    labels = labels.astype(np.int32)
    parameters = Repulsion(1.0, 0.0, 3, exclude_own)
    sq_norms = np.einsum("nd,nd->n", x, x) if keep else None
    found = nearest_picks.NearestPicks(x, labels, 3, parameters, sq_norms=sq_norms)
    chosen = np.array([rng.choice(np.flatnonzero(labels == c)) for c in range(12)])
    near = np.array([np.roll(np.arange(12), -c)[:5] for c in range(12)])
    seen, pushed = np.zeros(300, int), []
    for number in range(12):
        for c in rng.choice(12, 3, replace=False):
            chosen[c] = rng.choice(np.flatnonzero(labels == c))
        picked = PickedVectors(np.arange(12, dtype=np.int32), chosen.copy(), x[chosen])
        found.add(picked)
        pushed.append(direct_repulsion(x, labels, picked, parameters))
        rows, least = found.least()
        assert (least <= pushed[-1][rows] * (1 + 1e-12)).all()
        if keep and number % 2:
            rows = np.sort(rng.choice(300, 60, replace=False))
            rows = rows[np.argsort(labels[rows], kind="stable")]
            for since in np.unique(seen[rows]):
                some = rows[seen[rows] == since]
                for offset, least in enumerate(found.glimpse(some, labels[some], near, since)):
                    assert (least <= pushed[since + offset][some] * (1 + 1e-12)).all()
        rows = rng.choice(300, 40, replace=False)
        for since in np.unique(seen[rows]):
            some = rows[seen[rows] == since]
            for offset, new in enumerate(found.pushes(some, since)):
                assert new.tolist() == pushed[since + offset][some].tolist()
        seen[rows] = number + 1
    assert found.compared < 12 * 12 * 300
