"""Contrastive losses against their equations, views against torchvision, and workers that share a step."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import distributed
from torch.nn import functional as F
from torchvision.transforms import functional as published

from selective_ray import batch_norm, batches, classifiers, contrastive, views
from selective_ray.contrastive import Learner, Recipe
from selective_ray.views import Views


def rows(seed, n, d=6):
    x = torch.randn((n, d), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x, dim=1)


def log_share(own, others):
    """Logarithm of exp(own) among all of them."""
    return own - math.log(sum(map(math.exp, [own, *others])))


def dot(a, b):
    return sum(p * q for p, q in zip(a.tolist(), b.tolist(), strict=True))


def test_nt_xent_is_equation_1_of_simclr():
    first, second = rows(0, 5), rows(1, 5)
    z = torch.cat([first, second])
    expected, found = 0.0, 0
    for i in range(10):
        j = (i + 5) % 10
        others = [dot(z[i], z[k]) / 0.2 for k in range(10) if k not in (i, j)]
        expected -= log_share(dot(z[i], z[j]) / 0.2, others) / 10
    for i in range(5):
        found += all(
            dot(first[i], second[i]) >= max(dot(own, z[k]) for k in range(10) if k % 5 != i)
            for own in (first[i], second[i])
        )
    loss = contrastive.nt_xent(first, second, 0.2, 5)
    assert float(loss.loss) == pytest.approx(expected, rel=1e-12)
    assert int(loss.found) == found


def test_info_nce_is_equation_1_of_moco_and_moves_queries_only():
    queries, keys, queue = (rows(i, n).requires_grad_() for i, n in ((0, 4), (1, 4), (2, 7)))
    loss = contrastive.info_nce(queries, keys, queue, 0.2, 4)
    expected = -sum(
        log_share(dot(q, k) / 0.2, [dot(q, other) / 0.2 for other in queue.detach()])
        for q, k in zip(queries, keys, strict=True)
    )
    assert float(loss.loss.detach()) == pytest.approx(expected / 4, rel=1e-12)
    loss.loss.backward()
    assert keys.grad is None and queue.grad is None and queries.grad.any()


def test_groups_by_hand():
    x = torch.tensor([[1.0, 0], [0, 1], [0.9, 0.1], [0.1, 0.9], [1, 0.2]])
    assert contrastive.groups(x, 2, 3).tolist() == [0, 1, 0, 1, 0]
    centers = contrastive.means(x, torch.tensor([0, 1, 0, 1, 0]), 3)
    assert torch.allclose(centers, torch.tensor([[2.9 / 3, 0.1], [0.05, 0.95], [0, 0]]))


def test_a_view_finds_the_group_of_the_other():
    first, second = rows(0, 8).requires_grad_(), rows(1, 8)
    labels = [contrastive.groups(x.detach(), 3, 5) for x in (first, second)]
    expected = 0.0
    for x, other, of in ((first, second, labels[1]), (second, first, labels[0])):
        centers = [other[of == c].mean(0) if (of == c).any() else torch.zeros(6) for c in range(3)]
        for row, label in zip(x, of.tolist(), strict=True):
            logits = [dot(row, center) / 0.5 for center in centers]
            expected -= log_share(logits[label], [*logits[:label], *logits[label + 1 :]]) / 16
    loss = contrastive.group_loss(first, second, 3, 5, 0.5, 8)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)
    loss.backward()
    assert first.grad.any()


def test_rank_alignment_and_uniformity_by_hand():
    axes = torch.cat([torch.eye(4), -torch.eye(4)])
    assert contrastive.effective_rank(axes) == pytest.approx(4)
    assert contrastive.effective_rank(torch.outer(torch.arange(5.0), torch.ones(3))) == pytest.approx(1)
    assert contrastive.effective_rank(torch.ones(5, 3)) == 1
    assert contrastive.alignment(axes, axes.roll(1, 0)) == pytest.approx((6 * 2 + 2 * 2) / 8)
    # Of 28 pairs 4 are opposite, at a squared distance of 4, the others at 2.
    expected = math.log((4 * math.exp(-8) + 24 * math.exp(-4)) / 28)
    assert contrastive.uniformity(axes) == pytest.approx(expected, rel=1e-5)


# Views


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.integers(0, 256, (6, 3, 5, 5), dtype=np.uint8)).float()
    return F.interpolate(coarse, (20, 24), mode="bilinear").to(torch.uint8)


def test_a_box_is_what_torchvision_cuts(pictures):
    """Boxes of whole pixels, upright and mirrored."""
    x = pictures.float() / 255
    top, left, tall, wide = 4, 6, 10, 12
    area = tall * wide / (20 * 24)
    shape = math.log(wide / tall) - math.log(3 / 4)
    draws = torch.tensor(
        [
            *((area - 0.2) / 0.8, shape / math.log(16 / 9)),
            *(left / (24 - wide), top / (20 - tall), 0.7),
        ]
    ).repeat(6, 1)
    draws[3:, 4] = 0.2
    found = views.boxed(x, draws, 0.2)
    expected = published.resized_crop(x, top, left, tall, wide, [20, 24], antialias=False)
    expected[3:] = expected[3:].flip(3)
    # At the sides of the box torchvision repeats its outermost pixels, and this looks at those beside it.
    assert torch.allclose(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1e-4)


def test_colors_change_as_torchvision_changes_them(pictures):
    x = pictures.float() / 255
    draws = torch.rand((6, 4), generator=torch.Generator().manual_seed(0))
    found = views.recolored(x, draws, Views())
    for image, row, mine in zip(x, draws.tolist(), found, strict=True):
        image = published.adjust_brightness(image, 1 + 0.4 * (2 * row[0] - 1))
        image = published.adjust_contrast(image, 1 + 0.4 * (2 * row[1] - 1))
        image = published.adjust_saturation(image, 1 + 0.4 * (2 * row[2] - 1))
        image = published.adjust_hue(image, 0.1 * (2 * row[3] - 1))
        assert torch.allclose(mine, image, atol=2e-3)


def test_blur_is_a_gaussian_of_its_own_for_each_image(pictures):
    x = pictures.float() / 255
    sigma = torch.linspace(0.2, 2, 6)
    found = views.blurred(x, sigma)
    for image, width, mine in zip(x, sigma.tolist(), found, strict=True):
        expected = published.gaussian_blur(image, [13, 13], [width, width])
        assert torch.allclose(mine[..., 6:-6, 6:-6], expected[..., 6:-6, 6:-6], atol=1e-5)


def test_a_view_depends_on_its_own_draws_only(pictures):
    how, draws = Views(blur=0.5), np.random.default_rng(1).random((6, views.DRAWS))
    found = views.view(pictures, draws, how)
    assert found.shape == pictures.shape and found.min() >= 0 and found.max() <= 1
    for i in range(6):
        assert torch.allclose(views.view(pictures[i : i + 1], draws[i : i + 1], how)[0], found[i], atol=1e-6)
    assert not torch.allclose(views.view(pictures, draws[::-1].copy(), how), found, atol=1e-2)


def test_chances_of_views_are_those_asked_for():
    gray_box = torch.full((400, 3, 4, 4), 100, dtype=torch.uint8)
    gray_box[:, 0] = 180
    draws = np.random.default_rng(2).random((400, views.DRAWS))
    found = views.view(gray_box, draws, Views(colors=0.0, gray=0.2))
    gray = (found[:, 0] - found[:, 1]).abs().amax((1, 2)) < 1e-6
    assert gray.tolist() == (draws[:, 10] < 0.2).tolist() and 50 < gray.sum() < 110
    colored = views.view(gray_box, draws, Views(colors=0.8, gray=0.0))
    changed = (colored - gray_box / 255).abs().amax((1, 2, 3)) > 1e-3
    assert changed.sum() == pytest.approx(320, abs=30)


# Learners


def learner(method, **options):
    torch.manual_seed(0)
    trunk, width = classifiers.trunk("wrn-10-1", 8)
    network = contrastive.projected(method, trunk, width).double()
    average = copy.deepcopy(network)
    if distributed.is_initialized():
        network = batch_norm.synchronized(network, "cpu")
    recipe = Recipe(
        method=method, steps=40, queue=24, groups=3, lr=0.05, keep=0.9, temperature=0.2, **options
    )
    return Learner(network, recipe, Views(), average=average)


def take(one, t, rank=0, workers=1, batch=9):
    pixels = np.random.default_rng(t).integers(0, 256, (batch, 8, 8, 3), dtype=np.uint8)
    drawn = [batches.draws(0, t, batch, views.DRAWS, batches.VIEWS + i) for i in range(3)]
    mine = slice(rank, None, workers)
    some = drawn[: contrastive.VIEWS[one.recipe.method]]
    return one.step(t, pixels[mine], [part[mine] for part in some], batch)


def test_keys_take_the_places_of_the_oldest_and_the_average_follows():
    one = learner("moco")
    before = copy.deepcopy(one.average.state_dict())
    queue = one.queue.clone()
    seen = []
    one.average.register_forward_hook(lambda module, given, out: seen.append(out[0].clone()))
    for t in range(3):
        take(one, t)
        weights = one.average.state_dict()
        learned = dict(one.network.named_parameters())
        for name, value in one.network.state_dict().items():
            expected = 0.9 * before[name] + 0.1 * value if name in learned else value
            assert torch.allclose(weights[name], expected, atol=1e-12), name
        before = copy.deepcopy(weights)
    # 24 places, three times 9 keys: the last three came around.
    assert one.place == 3 and torch.equal(one.queue[:3], seen[2][6:])
    assert torch.equal(one.queue[3:9], seen[0][3:]) and torch.equal(one.queue[9:18], seen[1])
    assert not torch.equal(one.queue[:3], queue[:3])


@pytest.mark.parametrize(("batch", "count"), [(9, 2), (40, 2), (80, 5), (150, 8)])
def test_keys_have_the_batch_statistics_of_groups_of_images(batch, count):
    one = learner("moco")
    trunk = copy.deepcopy(learner("moco").network).train()
    seen = []
    one.average.register_forward_hook(lambda module, given, out: seen.append((given[0], out[0])))
    take(one, 0, batch=batch)
    (x, keys), of = seen[0], torch.arange(batch) % count
    with torch.no_grad():
        for group in range(count):
            assert torch.allclose(trunk(x[of == group])[0], keys[of == group], atol=1e-9)


@pytest.mark.parametrize("method", list(contrastive.VIEWS))
def test_a_learner_continues_from_its_state_to_the_bit(method):
    one, other = learner(method), learner(method)
    for t in range(3):
        take(one, t)
    other.load(copy.deepcopy(one.state()))
    for t in range(3, 6):
        losses = [float(take(each, t)["instance"]) for each in (one, other)]
        assert losses[0] == losses[1]
    for name, value in one.network.state_dict().items():
        assert torch.equal(value, other.network.state_dict()[name]), name


def _share(rank, workers, where, out):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=workers)
    kept = {}
    for method in contrastive.VIEWS:
        one = learner(method)
        for t in range(12):
            take(one, t, rank, workers)
        kept[method] = one.state()
    if rank == 0:
        torch.save(kept, out)
    distributed.destroy_process_group()


def test_two_workers_take_the_steps_of_one(tmp_path):
    """Negatives, keys and groups of both, with batch statistics of the whole batch."""
    out = tmp_path / "two.pt"
    torch.multiprocessing.spawn(_share, (2, tmp_path / "rendezvous", out), nprocs=2)
    together = torch.load(out)
    for method in contrastive.VIEWS:
        alone, begun = learner(method), learner(method)
        for t in range(12):
            take(alone, t)
        for name, value in alone.network.state_dict().items():
            assert torch.allclose(value, together[method]["network"][name], rtol=0, atol=1e-6), name
        if alone.queue is not None:
            assert torch.allclose(alone.queue, together[method]["queue"], rtol=0, atol=1e-6)
        both = zip(alone.network.parameters(), begun.network.parameters(), strict=True)
        assert max(float((p - q).abs().max()) for p, q in both) > 1e-2


def test_features_of_a_learner_are_its_trunks():
    one = learner("simclr")
    take(one, 0)
    x = torch.rand((4, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    found = one.features(x)
    one.network.eval()
    mean, std = (torch.tensor(part)[:, None, None] for part in (contrastive.MEAN, contrastive.STD))
    expected = one.network.trunk(((x - mean) / std).double())
    assert torch.allclose(found, F.normalize(expected, dim=1).float(), atol=1e-6)


def test_trunks_are_networks_without_their_last_layer():
    x = torch.rand((2, 3, 32, 32))
    for name, width in (("small-resnet", 160), ("wrn-10-1", 64), ("cifar-resnet18", 512), ("resnet18", 512)):
        trunk, wide = classifiers.trunk(name, 32)
        assert wide == width and trunk.eval()(x).shape == (2, width), name


def test_the_small_network_takes_under_twenty_million_multiply_adds():
    from torch.utils.flop_counter import FlopCounterMode

    trunk, _ = classifiers.trunk("small-resnet", 32)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        trunk.eval()(torch.rand((1, 3, 32, 32)))
    assert counted.get_total_flops() / 2 < 20e6
