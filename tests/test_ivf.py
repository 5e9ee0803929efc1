"""Inverted lists: partition, probes, groups and join against brute force; the certificate by hand."""

import argparse
import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import oracle
import pytest
from conftest import unit
from hypothesis import given, settings
from hypothesis import strategies as st

from selective_ray import certificate, ivf, joining
from selective_ray.errors import UserError
from selective_ray.neighbors import Nearest, neighbors


def scattered(n, d=12, blobs=9, seed=0):
    rng = np.random.default_rng(seed)
    return unit(rng.normal(size=(blobs, d))[rng.integers(0, blobs, n)] + 0.4 * rng.normal(size=(n, d)))


def joined(
    x,
    centroids,
    reach,
    *,
    k=6,
    group_rows=40,
    image_ids=None,
    parts=1,
    collapse=False,
    probes=None,
    kernel=Nearest,
):
    """Join all groups in this process, the rows split among some holders; returns Neighbors and cells."""
    image_ids = np.arange(len(x)) if image_ids is None else image_ids
    assigned = [
        ivf.assign(x[p], centroids, reach=reach, probes=probes)
        for p in np.array_split(np.arange(len(x)), parts)
    ]
    sizes = sum(np.bincount(a.lists, minlength=len(centroids)) for a in assigned)
    cells = joining.cells(sizes, group_rows)
    slices = []
    for rows, assignment in zip(np.array_split(np.arange(len(x)), parts), assigned, strict=True):
        keys = joining.hashes(x[rows]) if collapse else image_ids[rows]
        mine = cells.of(assignment.lists, keys)
        counts, probed = cells.probed(assignment)
        weights = np.ones(len(rows), np.int64) if collapse else None
        wanted = np.ones(len(rows), bool)
        whole = joining.Block(image_ids[rows], x[rows], mine, wanted, counts, probed, weights)
        per_group = []
        for group in range(cells.groups):
            some = np.flatnonzero(cells.group_of(mine) == group)
            probes_of = whole.probing(some)[1]
            part = (
                whole.image_ids[some],
                whole.x[some],
                mine[some],
                whole.wanted[some],
                counts[some],
                probes_of,
                weights[some] if collapse else None,
            )
            per_group.append(joining.Block(*part))
        slices.append(per_group)
    blocks = [joining.gather([part[group] for part in slices], collapse) for group in range(cells.groups)]
    sq_dists, ids = np.empty((len(x), k)), np.empty((len(x), k), np.int64)
    for group, block in enumerate(blocks):
        found, _ = joining.join(block, lambda groups: (blocks[g] for g in groups), cells, group, k, kernel)
        row = np.searchsorted(image_ids, block.image_ids)
        sq_dists[row], ids[row] = found.sq_dists, found.image_ids
    return sq_dists, ids, cells, blocks


@pytest.fixture(scope="module")
def world():
    x = scattered(500)
    return x, ivf.train(x, 16, 0)


def test_list_of_a_row_is_its_nearest_centroid_and_probes_are_within_reach(world):
    x, centroids = world
    distances = oracle.sq_dists(x, centroids)
    nearest = distances.argmin(axis=1)
    for reach in (0.0, 0.1, 0.5, 4.0):
        assignment = ivf.assign(x, centroids, reach=reach)
        assert np.array_equal(assignment.lists, nearest)
        ends = np.cumsum(assignment.counts)
        for i, (start, end) in enumerate(zip(ends - assignment.counts, ends, strict=True)):
            within = np.flatnonzero(distances[i] - distances[i].min() <= reach)
            assert sorted(assignment.probes[start:end]) == within.tolist()


@pytest.mark.parametrize("probes", [1, 3, 16, 99])
def test_as_many_probes_as_told_are_the_nearest(world, probes):
    x, centroids = world
    assignment = ivf.assign(x, centroids, probes=probes)
    distances = oracle.sq_dists(x, centroids)
    want = np.sort(np.argsort(distances, axis=1)[:, : min(probes, 16)], axis=1)
    assert np.array_equal(np.sort(assignment.probes.reshape(len(x), -1), axis=1), want)
    assert np.array_equal(assignment.lists, distances.argmin(axis=1))


def test_rows_between_equal_centroids_go_to_the_first():
    centroids = np.array([[0, 1], [1, 0], [1, 0], [0, 1]], np.float32)
    assignment = ivf.assign(unit(np.array([[1.0, 1.0], [1.0, 0.0]])), centroids, reach=0.0)
    assert assignment.lists.tolist() == [0, 1]
    assert assignment.counts.tolist() == [4, 2]


@pytest.mark.parametrize("rows", [1, 7, 499])
def test_assignment_does_not_depend_on_the_rows_it_comes_with(world, rows):
    x, centroids = world
    whole = ivf.assign(x, centroids, reach=0.2)
    parts = [ivf.assign(x[i : i + rows], centroids, reach=0.2) for i in range(0, len(x), rows)]
    for name in ("lists", "counts", "probes"):
        assert np.array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(whole, name))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_reach_of_the_whole_sphere_is_brute_force(seed):
    """Whatever the lists, groups and holders, duplicates and near-duplicates included."""
    rng = np.random.default_rng(seed)
    x = scattered(int(rng.integers(30, 150)), seed=seed % 1000)
    x[rng.integers(0, len(x), 20)] = x[0]
    x[1] = unit(x[:1] + 1e-7)[0]
    centroids = x[rng.choice(len(x), 5, replace=False)]
    k = int(rng.integers(2, 12))
    ids = np.cumsum(rng.integers(1, 4, len(x)))
    exact = np.sort(oracle.sq_dists(x, x), axis=1)[:, :k]
    group_rows, parts = int(rng.integers(3, 60)), int(rng.integers(1, 5))
    options = {"k": k, "group_rows": group_rows, "parts": parts, "image_ids": ids}
    found, names, *_ = joined(x, centroids, ivf.WHOLE_SPHERE, **options)
    assert np.allclose(found, exact, rtol=1e-12, atol=0)
    row = np.searchsorted(ids, names)
    assert np.allclose(oracle.sq_dists(x, x)[np.arange(len(x))[:, None], row], found, rtol=1e-12, atol=0)
    assert np.array_equal(found, neighbors(x, [(ids, x)], k).sq_dists)


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_same_for_any_holders(world, parts):
    x, centroids = world
    one = joined(x, centroids, 0.15)
    many = joined(x, centroids, 0.15, parts=parts)
    assert np.array_equal(one[0], many[0])
    assert np.array_equal(one[1], many[1])
    for a, b in zip(one[3], many[3], strict=True):
        for name in ("image_ids", "x", "cells", "counts", "probes"):
            assert np.array_equal(getattr(a, name), getattr(b, name))


def test_a_row_finds_what_lies_in_the_lists_it_probes_and_no_more(world):
    x, centroids = world
    found, *_ = joined(x, centroids, 0.1, k=4, group_rows=10_000)
    assignment = ivf.assign(x, centroids, reach=0.1)
    ends = np.cumsum(assignment.counts)
    distances = oracle.sq_dists(x, x)
    for i in range(len(x)):
        probed = assignment.probes[ends[i] - assignment.counts[i] : ends[i]]
        there = np.flatnonzero(np.isin(assignment.lists, probed))
        if len(there) < 4:
            there = np.arange(len(x))
        assert np.allclose(found[i], np.sort(distances[i, there])[:4], rtol=1e-12)


def test_row_with_too_few_in_its_lists_is_compared_with_all():
    x = np.concatenate([scattered(60), unit(np.array([[5.0, *[-1.0] * 11]]))])
    centroids = np.concatenate([x[:3], x[-1:]])
    found, *_ = joined(x, centroids, 0.0, k=5)
    assert np.allclose(found[-1], np.sort(oracle.sq_dists(x[-1:], x)[0])[:5], rtol=1e-12)


def test_large_lists_are_split_and_every_part_is_probed():
    x = scattered(400, blobs=1)
    found, _, cells, blocks = joined(x, x[:1], 0.0, group_rows=30)
    assert cells.first_cell.tolist() == [0, 14]
    assert max(len(block.image_ids) for block in blocks) <= 31
    assert np.allclose(found, np.sort(oracle.sq_dists(x, x), axis=1)[:, :6], rtol=1e-12)


def test_cells_gather_small_lists_and_split_large_ones():
    cells = joining.cells(np.array([5, 3, 25, 1, 9]), 10)
    assert cells.first_cell.tolist() == [0, 1, 2, 5, 6, 7]
    assert cells.first_of_group.tolist() == [0, 2, 3, 4, 6, 7]
    assert cells.of(np.array([2, 2, 2, 4]), np.array([0, 1, 5, 7])).tolist() == [2, 3, 4, 6]
    counts, probed = cells.probed(ivf.Assignment(np.array([0, 2]), np.array([2, 1]), np.array([0, 2, 4])))
    assert counts.tolist() == [4, 1]
    assert probed.tolist() == [0, 2, 3, 4, 6]
    assert cells.group_of(np.array([0, 1, 2, 5, 6])).tolist() == [0, 0, 1, 3, 4]


def test_collapsed_duplicates_count_once_and_share_the_distance_of_the_first(world):
    x, centroids = world
    x = np.concatenate([x[:80], np.repeat(x[:1], 40, axis=0), x[80:81], x[3:4]])
    distinct, inverse = np.unique(x, axis=0, return_inverse=True)
    exact = np.sort(oracle.sq_dists(distinct, distinct), axis=1)[:, :6]
    for parts in (1, 3):
        found, names, *_ = joined(x, centroids, ivf.WHOLE_SPHERE, parts=parts, collapse=True, group_rows=25)
        assert np.allclose(found, exact[inverse.ravel()], rtol=1e-12)
        assert not np.isin(names, np.arange(81, 120)).any()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_distinct_rows_and_their_places(seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 3, (int(rng.integers(1, 60)), 2)).astype(np.float32)
    firsts, place = joining.distinct(x)
    assert np.array_equal(x[firsts][place], x)
    assert np.array_equal(firsts, np.sort(np.unique(x, axis=0, return_index=True)[1]))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_nearest_distinct_rows_of_holders_merge(seed):
    """Of copies that lie with different holders one is left, the one with the smallest id."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 3, (40, 3)).astype(np.float32)
    merged = None
    for held in np.array_split(np.arange(40), int(rng.integers(1, 5))):
        rows = held[joining.distinct(x[held])[0]]
        found = neighbors(x[:5], [(rows, x[rows])], 8)
        keys = joining.hashes(x[found.image_ids.ravel()]).reshape(found.image_ids.shape)
        merged = (found, keys) if merged is None else joining.merge_distinct(merged, (found, keys))
    distinct = np.sort(np.unique(x, axis=0, return_index=True)[1])
    exact = neighbors(x[:5], [(distinct, x[distinct])], 8)
    assert np.array_equal(merged[0].sq_dists, exact.sq_dists)
    assert np.isin(merged[0].image_ids, [-1, *distinct]).all()
    assert np.array_equal(merged[0].image_ids[:, 0], exact.image_ids[:, 0])


def test_hashes_of_equal_rows_are_equal():
    x = scattered(200)
    again = x[::-1].copy()[::-1]
    again[again == 0] = -0.0
    assert np.array_equal(joining.hashes(x), joining.hashes(again))
    assert len(np.unique(joining.hashes(x))) == 200


@pytest.mark.parametrize("lists", [1, 2, 30, 500])
def test_training_gives_as_many_centroids_as_asked(lists):
    x = scattered(500)
    centroids = ivf.train(x, lists, 3)
    assert centroids.shape == (lists, 12)
    assert centroids.dtype == np.float32
    assert np.isfinite(centroids).all()
    assert np.array_equal(centroids, ivf.train(x, lists, 3))


def test_trained_lists_hold_neighbors_together(world):
    """A row's own list holds most of its neighbors, far more than a random list of that size."""
    x, centroids = world
    lists = ivf.assign(x, centroids).lists
    nearest = np.argsort(oracle.sq_dists(x, x), axis=1)[:, 1:6]
    assert (lists[nearest] == lists[:, None]).mean() > 0.5


def test_excess_and_ranks_by_hand():
    centroids = np.array([[1, 0], [0, 1], [-1, 0]], np.float32)
    x = np.array([[1, 0], [0.6, 0.8]], np.float32)
    targets = np.array([[0, 1, 2], [1, 0, 2]])
    assert np.allclose(ivf.excess(x, centroids, targets), [[0, 2, 4], [0, 0.4, 2.8]], atol=1e-6)
    assert ivf.ranks(x, centroids, targets).tolist() == [[0, 1, 2], [0, 1, 2]]


def test_reach_leaves_out_the_share_that_is_planned_for():
    excesses = np.arange(1000.0) / 1000
    assert ivf.reach_for(excesses, 0.9) == pytest.approx(0.94, abs=0.002)
    assert ivf.reach_for(excesses * 100, 1.0) == ivf.WHOLE_SPHERE


def test_plan_chooses_brute_force_for_few_rows_many_neighbors_and_full_recall():
    assert ivf.plan(2_000, 128, 20).exact
    assert ivf.plan(50_000, 128, 400).exact
    assert ivf.plan(10**7, 128, 20, recall=1.0).exact
    assert ivf.plan(10**7, 128, 20, mode="exact").exact
    assert ivf.plan(10**6, 128, 20).lists == 2048
    assert ivf.plan(5 * 10**7, 512, 20).lists == 16_384
    assert ivf.plan(1000, 8, 20, lists=30).lists == 30
    assert not ivf.plan(1000, 8, 20, mode="ivf").exact
    with pytest.raises(UserError, match=r"density\.lists = 30 exceeds the 20 embeddings"):
        ivf.plan(20, 8, 5, lists=30)


def test_groups_are_a_share_of_the_rows_as_large_as_memory_allows():
    plan = ivf.plan(10**6, 128, 20)
    assert (plan.group_rows, plan.groups) == (31_250, 32)
    assert dataclasses.replace(plan, workers=64).groups == 256
    assert ivf.plan(1000, 8, 5, mode="ivf").group_rows == ivf.LEAST_GROUP_ROWS
    assert ivf.plan(10**9, 512, 20).group_rows * 512 * 4 == ivf.GROUP_BYTES


def test_plan_states_what_is_held_moved_and_compared():
    """By hand: 1,000 rows of 4 numbers by 10 lists, 5 neighbors, two workers."""
    plan = dataclasses.replace(ivf.plan(1000, 4, 5, mode="ivf", lists=10), workers=2)
    assert plan.compared == 1000, "few rows: all of them"
    assert plan.probes == 10, "and so all lists"
    assert plan.moved_bytes(2) == 1000 * (2 * 4 + 24 + 4 * 10)
    assert plan.fetched_bytes(2) == plan.moved_bytes(2) * (1 + plan.groups)
    held, group = 500 * (16 + 8), 256 * (2 * 16 + 16 * 2 * 5 + 32 * 10)
    assert plan.holder_bytes(500, 2) == held + 500 * 4 * 10 + 2 * group + 320 * 2 * 16 + 2**28 + 2**27
    kept = dataclasses.replace(plan, kept=500)
    assert kept.holder_bytes(500, 2) == held + 500 * 2 * 12 * 500 + 2**28 + 2**27, "they are read in the end"
    assert dataclasses.replace(plan, asked_probes=3).probes == 3
    assert plan.products == 1000 * (1000 + 10 + 2 * plan.sample)
    exact = ivf.plan(1000, 4, 5)
    assert exact.exact
    assert exact.products == 1000 * 1000


def test_the_page_shows_the_plan_of_the_functions(capsys):
    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location("density", root / "benchmarks" / "density.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    how = {"kind": "512", "rows": [50_000_000, 1_000_000_000], "workers": [8, 64]}
    module.plan(argparse.Namespace(**how, rate=3e10, network=1.25e9), root)
    shown = (root / "docs" / "density.md").read_text()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + 4
    assert [line for line in printed if line not in shown] == []
    for n in (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000):
        plan = ivf.plan(n, 128, 20)
        assert f"| {n:,} | {plan.lists:,} | {plan.compared:,.0f} |" in shown


def test_draw_is_seeded_and_takes_each_row_once():
    plan = ivf.plan(3_000, 8, 5, mode="ivf")
    training, both = ivf.draw(plan, 1)
    assert len(both) == 2 * plan.sample == len(set(both.tolist()))
    assert len(training) == plan.training_rows == len(set(training.tolist()))
    assert np.array_equal(both, ivf.draw(plan, 1)[1])
    assert not np.array_equal(both, ivf.draw(plan, 2)[1])


def test_certificate_by_hand():
    exact = np.array([[0, 1.0, 2.0], [0, 1.0, 1.0]])
    found = np.array([[0, 1.0, 3.0], [0, 1.0, 1.0]])
    made = certificate.certify(found, exact)
    assert made.recall == pytest.approx(3 / 4)
    assert made.mean_relative_error == pytest.approx((1 / 3) / 2)
    assert made.largest_relative_error == pytest.approx(1 / 3)
    assert made.rank_correlation == pytest.approx(1.0)
    assert made.recall_low < 0.75 < made.recall_high
    whole = certificate.certify(np.tile(exact, (50, 1)), np.tile(exact, (50, 1)))
    assert (whole.recall, whole.recall_high, whole.mean_relative_error) == (1, 1, 0)
    assert whole.recall_low == pytest.approx(1 - 3 / 100)


def test_rank_correlation_of_reversed_order():
    exact = np.array([[0.0, i] for i in range(1, 9)])
    found = np.array([[0.0, 20 - i] for i in range(1, 9)])
    assert certificate.certify(found, exact).rank_correlation == pytest.approx(-1)
