"""Which images a step sees: a shuffle without memory, and random numbers that belong to slots."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from selective_ray import batches
from selective_ray.batches import Plan


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 50))
def test_every_epoch_holds_everything_once(n, seed, epoch):
    order = batches.stream(np.arange(epoch * n, (epoch + 1) * n), n, seed, batches.UNLABELED)
    assert np.array_equal(np.sort(order), np.arange(n))


def test_epochs_seeds_and_purposes_are_in_other_orders():
    def order(epoch, seed, purpose):
        return batches.stream(np.arange(1000) + 1000 * epoch, 1000, seed, purpose)

    first = order(0, 0, batches.LABELED)
    for other in (order(1, 0, batches.LABELED), order(0, 1, batches.LABELED), order(0, 0, batches.UNLABELED)):
        # Of two unrelated orders one place in a thousand agrees.
        assert (first == other).sum() < 10


def test_an_order_is_uniform():
    # Where the first of 16 things comes to lie, over 4,000 seeds: chi-square of 15 degrees, 0.999 quantile.
    places = [int(batches.stream(np.zeros(1, np.int64), 16, seed, 0)[0]) for seed in range(4000)]
    counts = np.bincount(places, minlength=16)
    assert ((counts - 250) ** 2 / 250).sum() < 37.7


def test_positions_do_not_depend_on_what_is_asked_with_them():
    whole = batches.stream(np.arange(5000), 777, 3, 1)
    parts = [batches.stream(np.arange(i, i + 50), 777, 3, 1) for i in range(0, 5000, 50)]
    assert np.array_equal(np.concatenate(parts), whole)


@given(left_out=st.sets(st.integers(0, 60), max_size=50))
def test_ids_without_those_left_out(left_out):
    ids = [i for i in range(200) if i not in left_out]
    gone = np.array(sorted(left_out), np.int64)
    assert batches.nth_left(np.arange(len(ids)), gone).tolist() == ids


def test_a_step_is_labeled_images_and_then_all_that_can_be_read():
    plan = Plan(np.array([3, 5, 8]), images=20, rejected=np.array([0, 19]), labeled=4, unlabeled=9, seed=1)
    steps = np.stack([plan.step(t) for t in range(18)])
    assert steps.shape == (18, 13)
    labeled, unlabeled = np.split(steps, [4], axis=1)
    # 72 labeled slots are 24 times each of the three; 162 others are 9 times each of 18.
    assert np.unique(labeled, return_counts=True)[1].tolist() == [24, 24, 24]
    assert np.unique(unlabeled).tolist() == list(range(1, 19))
    assert set(np.unique(unlabeled, return_counts=True)[1]) == {9}


def test_random_numbers_of_a_slot_do_not_depend_on_how_many_there_are():
    few, many = (batches.draws(0, 7, slots, 5, batches.WEAK) for slots in (64, 512))
    assert np.array_equal(few, many[:64])
    several = [batches.draws(*key, 64, 5, purpose) for key in ((0, 7), (0, 8), (1, 7)) for purpose in (2, 3)]
    assert len({values.tobytes() for values in several}) == 6
