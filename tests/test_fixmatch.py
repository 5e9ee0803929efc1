"""The loss, the average and the schedule of FixMatch, against their equations; workers that share a step."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import distributed, nn

from selective_ray import augment, batch_norm, batches, classifiers, fixmatch, optimization
from selective_ray.fixmatch import Learner, Recipe


def logits(seed, n, c=5, scale=3.0):
    return torch.randn((n, c), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def test_the_loss_is_that_of_the_paper():
    labeled, weak, strong = logits(0, 6), logits(1, 14), logits(2, 14)
    targets = torch.tensor([0, 1, 2, 3, 4, 0])
    found = fixmatch.losses(labeled, targets, weak, strong, threshold=0.9, unlabeled_weight=2.5)
    # Equation 3: 1/B Σ H(p_b, p(y | a(x_b))).
    supervised = 0.0
    for row, target in zip(labeled.tolist(), targets.tolist(), strict=True):
        supervised -= math.log(math.exp(row[target]) / sum(map(math.exp, row)))
    # Equation 4: 1/(μB) Σ 1(max q_b ≥ τ) H(argmax q_b, p(y | A(u_b))).
    unsupervised, confident = 0.0, 0
    for seen, hard in zip(weak.tolist(), strong.tolist(), strict=True):
        q = [math.exp(value) / sum(map(math.exp, seen)) for value in seen]
        if max(q) >= 0.9:
            confident += 1
            best = q.index(max(q))
            unsupervised -= math.log(math.exp(hard[best]) / sum(map(math.exp, hard)))
    assert 0 < confident < 14
    assert found.confident.sum() == confident
    assert float(found.loss) == pytest.approx(supervised / 6 + 2.5 * unsupervised / 14, rel=1e-12)


def test_gradients_flow_into_labeled_and_strong_views_only():
    labeled, weak, strong = (logits(i, 8).requires_grad_() for i in range(3))
    targets = torch.arange(8) % 5
    found = fixmatch.losses(labeled, targets, weak, strong, threshold=0.9, unlabeled_weight=1.0)
    found.loss.backward()
    assert weak.grad is None
    assert (labeled.grad.abs().sum(1) > 0).all()
    # Only where the weak view was confident.
    assert torch.equal(strong.grad.abs().sum(1) > 0, found.confident)


def test_with_a_threshold_above_one_it_is_supervised_training():
    labeled, weak, strong = (logits(i, 8).requires_grad_() for i in range(3))
    targets = torch.arange(8) % 5
    fixmatch.losses(labeled, targets, weak, strong, threshold=1.01, unlabeled_weight=1.0).loss.backward()
    alone = labeled.detach().clone().requires_grad_()
    nn.functional.cross_entropy(alone, targets).backward()
    assert not strong.grad.any()
    assert torch.allclose(labeled.grad, alone.grad, atol=1e-15)


def test_parts_of_a_step_add_up_to_its_loss():
    labeled, weak, strong = logits(0, 6), logits(1, 14), logits(2, 14)
    targets = torch.tensor([0, 1, 2, 3, 4, 0])
    how = {"threshold": 0.9, "unlabeled_weight": 1.0, "sizes": (6, 14)}
    parts = [
        fixmatch.losses(labeled[r::3], targets[r::3], weak[r::3], strong[r::3], **how).loss for r in range(3)
    ]
    assert float(sum(parts)) == pytest.approx(
        float(fixmatch.losses(labeled, targets, weak, strong, **how).loss), rel=1e-12
    )


def test_the_average_follows_its_closed_form():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    average = copy.deepcopy(network)
    first = [p.detach().clone() for p in (*network.parameters(), network[1].running_mean)]
    seen = []
    for step in range(6):
        with torch.no_grad():
            for p in (*network.parameters(), network[1].running_mean):
                p.copy_(torch.full_like(p, float(step)) + p.numel())
        seen.append([p.detach().clone() for p in (*network.parameters(), network[1].running_mean)])
        optimization.follow(average, network, 0.9, statistics=True)
    for i, mine in enumerate((*average.parameters(), average[1].running_mean)):
        expected = 0.9**6 * first[i] + sum(0.1 * 0.9 ** (5 - j) * seen[j][i] for j in range(6))
        assert torch.allclose(mine, expected, atol=1e-14)
    optimization.follow(average, network, 0.9, statistics=False)
    assert torch.equal(average[1].running_mean, network[1].running_mean)


def test_the_published_schedule():
    recipe = Recipe()
    assert optimization.learning_rate(recipe, 0) == 0.03
    for step in (1, 1000, 2**19, 2**20 - 1):
        expected = 0.03 * math.cos(7 * math.pi * step / (16 * 2**20))
        assert optimization.learning_rate(recipe, step) == pytest.approx(expected, rel=1e-12)
    steps = Recipe(steps=100, warmup=5, schedule="steps", lr=1.0)
    rates = [optimization.learning_rate(steps, step) for step in range(100)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert (rates[59], rates[60], rates[80]) == pytest.approx((1.0, 0.1, 0.01))


def test_biases_and_norms_do_not_decay():
    network = classifiers.build("wrn-10-1", 4)
    decayed, spared = optimization.optimizer(network, Recipe()).param_groups
    assert decayed["weight_decay"] == 5e-4 and spared["weight_decay"] == 0
    shapes = {tuple(p.shape) for p in network.parameters() if p.ndim == 1}
    assert {tuple(p.shape) for p in spared["params"]} == shapes
    assert decayed["nesterov"] and decayed["momentum"] == 0.9


@pytest.mark.parametrize(
    ("name", "parameters"),
    # Of the published WRN-28-2 and WRN-28-8 for 10 and 100 classes, by counting layers.
    [("wrn-28-2", 1_467_610), ("wrn-28-8", 23_354_842 + 512 * 90 + 90)],
)
def test_networks_have_the_published_size(name, parameters):
    classes = 10 if name == "wrn-28-2" else 100
    assert sum(p.numel() for p in classifiers.build(name, classes).parameters()) == parameters


def inputs(step, b=6, u=10, size=16):
    rng = np.random.default_rng(step)
    return {
        "labeled": rng.integers(0, 256, (b, size, size, 3), np.uint8),
        "targets": np.arange(b) % 3,
        "unlabeled": rng.integers(0, 256, (u, size, size, 3), np.uint8),
        "weak": batches.draws(0, step, b + u, augment.WEAK_DRAWS, batches.WEAK),
        "strong": batches.draws(0, step, u, augment.STRONG_DRAWS, batches.STRONG),
    }


def take(learner, t, rank=0, workers=1):
    some = inputs(t)
    b = len(some["labeled"])
    weak = np.concatenate([some["weak"][:b][rank::workers], some["weak"][b:][rank::workers]])
    return learner.step(
        t,
        *(some[name][rank::workers] for name in ("labeled", "targets", "unlabeled")),
        (weak, some["strong"][rank::workers]),
        (b, len(some["unlabeled"])),
    )


def learner(**options):
    torch.manual_seed(0)
    network = classifiers.build("wrn-10-1", 3).double()
    return Learner(network, Recipe(steps=20, threshold=0.34, **options), precision="float64")


def test_a_step_lowers_the_loss_of_its_labeled_images():
    one = learner(lr=0.1)
    losses = [float(take(one, 0)["supervised"]) for _ in range(15)]
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    ("name", "precision"), [("resnet18", "float32"), ("resnet50", "float32"), ("wrn-10-1", "bfloat16")]
)
def test_every_network_takes_a_step(name, precision):
    torch.manual_seed(0)
    one = Learner(classifiers.build(name, 3), Recipe(steps=20), precision=precision)
    before = copy.deepcopy(one.network.state_dict())
    assert math.isfinite(float(take(one, 0)["supervised"]))
    assert all(not torch.equal(p, before[key]) for key, p in one.network.named_parameters() if p.dim() > 1)


def test_a_learner_continues_from_its_state_to_the_bit():
    whole = learner()
    for t in range(4):
        take(whole, t)
    half = learner()
    for t in range(2):
        take(half, t)
    rest = learner()
    rest.load(copy.deepcopy(half.state()))
    for t in range(2, 4):
        take(rest, t)
    for mine, theirs in ((rest.network, whole.network), (rest.average, whole.average)):
        for name, value in mine.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name


def test_the_teacher_can_be_the_average():
    own, taught = learner(), learner(teacher="average")
    with torch.no_grad():
        for one in (own, taught):
            for p in one.average.parameters():
                p.zero_()
            one.average.classifier.bias[1] = 5
    assert take(taught, 0)["pseudo_labels"].tolist() == [0, 10, 0]
    assert take(own, 0)["pseudo_labels"].tolist() != [0, 10, 0]


def _share(rank, workers, place, out):
    distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=workers)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = classifiers.build("wrn-10-1", 3).double()
    average = copy.deepcopy(network)
    network = batch_norm.synchronized(network, "cpu")
    one = Learner(network, Recipe(steps=20, threshold=0.34), precision="float64", average=average)
    for t in range(20):
        take(one, t, rank, workers)
    if rank == 0:
        torch.save([one.network.state_dict(), one.average.state_dict()], out)
    distributed.destroy_process_group()


def test_two_workers_take_the_steps_of_one(tmp_path):
    """With batch statistics of the whole batch: 20 steps in float64 agree to 1e-6."""
    alone = learner()
    for t in range(20):
        take(alone, t)
    out = tmp_path / "two.pt"
    torch.multiprocessing.spawn(_share, (2, tmp_path / "rendezvous", out), nprocs=2)
    for mine, theirs in zip((alone.network, alone.average), torch.load(out), strict=True):
        for name, value in mine.state_dict().items():
            assert torch.allclose(value, theirs[name], rtol=0, atol=1e-6), name
    both = zip(alone.network.parameters(), learner().network.parameters(), strict=True)
    # They did learn something by which they could differ.
    assert max(float((p - q).abs().max()) for p, q in both) > 1e-2


def test_judged_by_hand():
    probabilities = np.array([[0.95, 0.05], [0.85, 0.15], [0.3, 0.7], [0.25, 0.75]], np.float32)
    true = np.array([0, 1, 1, 1])
    found = fixmatch.judge([(probabilities[:3], true[:3]), (probabilities[3:], true[3:])], 3)
    assert found.confusion.tolist() == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
    assert found.accuracy == 0.75
    assert found.by_class[:2].tolist() == [1.0, pytest.approx(2 / 3)] and np.isnan(found.by_class[2])
    # Ranges of 0.9, 0.8 and 0.7: |1 - .95|, |0 - .85|, |2 - 1.45|, over four images.
    assert found.calibration_error == pytest.approx((0.05 + 0.85 + 0.55) / 4)


def test_slow_batch_statistics_begin_as_the_mean_of_all_batches():
    """WRN's momentum of 0.001 would leave them near their start for thousands of steps."""
    torch.manual_seed(0)
    learner = Learner(classifiers.build("wrn-10-1", 3), Recipe(steps=10))
    norm, seen = learner.network.blocks[0].norm1, []
    norm.register_forward_pre_hook(lambda layer, given: seen.append(given[0].detach().mean((0, 2, 3))))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    for t in range(5):
        weak, strong = rng.random((12, augment.WEAK_DRAWS)), rng.random((8, augment.STRONG_DRAWS))
        learner.step(t, pixels[:4], np.array([0, 1, 2, 0]), pixels[4:], (weak, strong), (4, 8))
    assert torch.allclose(norm.running_mean, torch.stack(seen).mean(0), atol=1e-5)
    learner.step(5000, pixels[:4], np.array([0, 1, 2, 0]), pixels[4:], (weak, strong), (4, 8))
    assert norm.momentum == 0.001
