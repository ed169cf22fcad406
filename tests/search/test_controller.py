import math
import random
from collections import Counter

import pytest
import torch

from nasfcos.search.controller import Controller, policy_loss
from nasfcos.search.space import FPNSpace, HeadSpace
from tests.known import PUBLISHED
from tests.strategies import ppo

FPN = FPNSpace(3, ["skip_connect"], ["psum"])
HEAD = HeadSpace(PUBLISHED.cells, 2, ["def_conv_3x3", "skip_connect", "conv1x1"])
SPACES = pytest.mark.parametrize("space", [FPN, HEAD], ids=["fpn", "head"])


def controller(space, scale=10.0):
    """A controller with larger weights: with fresh ones, choices are almost equally likely."""
    controller = Controller(space, 8, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in controller.parameters():
            parameter *= scale
    return controller


def enumerated(controller):
    """All sequences, their log-probabilities, and the entropies along each: [N], [N], [N, T]."""
    sequences = list(controller.space)
    with torch.no_grad():
        log_probs, entropies = controller(controller.encode(sequences))
    return sequences, log_probs.sum(1), entropies


@SPACES
def test_probabilities_of_all_valid_sequences_sum_to_one(space):
    sequences, log_probs, _ = enumerated(controller(space))
    assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert log_probs.exp().max() > 2 / len(sequences)  # not merely uniform


@SPACES
def test_entropy_is_that_of_the_enumerated_distribution(space):
    _, log_probs, entropies = enumerated(controller(space))
    probabilities = log_probs.exp()
    expected = -(probabilities * log_probs).sum()
    assert (probabilities * entropies.sum(1)).sum().item() == pytest.approx(expected.item())


def test_samples_follow_the_probabilities():
    policy = controller(HEAD)
    sequences, log_probs, _ = enumerated(policy)
    drawn = Counter(policy.sample(5000, torch.Generator().manual_seed(1)))
    assert drawn.keys() <= set(sequences)
    chi2 = freedom = 0
    for sequence, p in zip(sequences, log_probs.exp().tolist(), strict=True):
        if 5000 * p > 5:
            chi2 += (drawn[sequence] - 5000 * p) ** 2 / (5000 * p)
            freedom += 1
    assert freedom > 5
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations


def test_samples_of_a_large_space_are_valid():
    space = FPNSpace(7)
    for sequence in controller(space).sample(50, torch.Generator().manual_seed(0)):
        space.genotype(sequence)  # raises if it is invalid


def test_hot_samples_are_even():
    policy = controller(HEAD)
    drawn = Counter(policy.sample(3600, torch.Generator().manual_seed(1), temperature=1e6))
    assert len(drawn) == 27 and min(drawn.values()) > 90 and max(drawn.values()) < 180
    for sequence in controller(FPN).sample(100, torch.Generator().manual_seed(0), 1e6):
        FPN.genotype(sequence)


def test_masked_choices_have_no_share():
    """After C2 for all inputs of the first cell, three cells must not take N4 or N5."""
    policy = controller(FPN)
    start = torch.zeros(1, 15, dtype=torch.int64)
    choices, masks = policy.encode([tuple(start[0].tolist())])
    assert masks[0, 5].tolist() == [True] * 4 + [False] * 2
    assert masks[0, 10].tolist() == [True] * 4 + [False] * 2
    features = torch.randn(1, 8, dtype=torch.double)
    probabilities = policy._log_probs(features, 10, masks[:, 10]).exp()
    assert (probabilities[0, 4:] == 0).all()
    assert probabilities.sum().item() == pytest.approx(1)
    # Decisions with a single choice (operations and aggregations) have no entropy.
    log_probs, entropy = policy((choices, masks))
    assert (entropy[0, 2:5] == 0).all() and (log_probs[0, 2:5] == 0).all()
    assert 0 < entropy[0, 10] <= math.log(4)
    (log_probs.sum() + entropy.sum()).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_gradient_of_the_loss():
    policy = controller(HEAD, scale=3.0)
    encoded = policy.encode([(0, 0, 1), (2, 1, 2), (1, 2, 2)])
    old = policy(encoded)[0].detach() + 0.05 * torch.tensor([[1.0], [-1.0], [9.0]])
    advantages = torch.tensor([1.0, -0.5, 2.0], dtype=torch.double)

    def loss():
        log_probs, entropy = policy(encoded)
        return policy_loss(log_probs, old, advantages, 0.2) - 0.1 * entropy.mean()

    loss().backward()
    rng = random.Random(0)
    for parameter in policy.parameters():
        i = rng.randrange(parameter.numel())
        analytic = parameter.grad.flatten()[i].item()
        with torch.no_grad():
            flat = parameter.data.view(-1)
            centre = flat[i].item()
            flat[i] = centre + 1e-6
            above = loss().item()
            flat[i] = centre - 1e-6
            below = loss().item()
            flat[i] = centre
        assert analytic == pytest.approx((above - below) / 2e-6, rel=1e-4, abs=1e-8)


def test_clipped_objective_by_hand():
    ratios = torch.tensor([[1.5, 0.5], [1.5, 0.5], [1.1, 0.9]], dtype=torch.double)
    old = torch.full_like(ratios, -1.0)
    log_probs = (old + ratios.log()).requires_grad_()
    advantages = torch.tensor([1.0, -2.0, 3.0], dtype=torch.double)
    loss = policy_loss(log_probs, old, advantages, 0.2)
    # min(1.5, 1.2), min(0.5, 0.8); min(-3, -2.4), min(-1, -1.6); 3.3, 2.7
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 3.0 - 1.6 + 3.3 + 2.7) / 6)
    loss.backward()
    # No gradient where the ratio has moved beyond the clip in the direction of the advantage.
    assert (log_probs.grad == 0).tolist() == [[True, False], [False, True], [False, False]]


def test_advantages_are_measured_from_the_moving_baseline():
    policy = ppo(HEAD, 0, baseline_decay=0.5)
    first = policy._update_baseline(torch.tensor([1.0, 3.0], dtype=torch.double))
    # Half of a normal distribution is within 0.6745 deviations; then decay 0.5.
    spread = (0.6745**-2 + 1) / 2
    assert first.tolist() == pytest.approx([-(spread**-0.5), spread**-0.5])
    assert policy.baseline == 2
    second = policy._update_baseline(torch.tensor([4.0, 4.0], dtype=torch.double))
    assert policy.baseline == 3
    # Positive advantages, although the rewards are equal.
    spread = (spread + 4) / 2
    assert second.tolist() == pytest.approx([2 * spread**-0.5] * 2)
    third = policy._update_baseline(torch.tensor([3.0, -1e9], dtype=torch.double))
    farthest = 5 * spread**0.5
    assert policy.baseline == pytest.approx(3 - farthest / 4)
    spread = (spread + farthest**2 / 2) / 2
    assert third.tolist() == pytest.approx([0, -farthest * spread**-0.5])


def lessons(policy, batches=4, count=6):
    for _ in range(batches):
        batch = policy.propose(count)
        figures = policy.learn(batch, [float(sum(choices)) for choices in batch])
    return policy.propose(count), figures


def test_a_strategy_of_its_seed_and_its_lessons_alone():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    proposals, figures = lessons(ppo(HEAD, 7))
    assert torch.equal(torch.random.get_rng_state(), before)  # the global generator is untouched
    torch.manual_seed(2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        policy = ppo(HEAD, 7)
        policy.propose(11)  # proposing does not change the state
        assert lessons(policy) == (proposals, figures)
    finally:
        torch.set_num_threads(threads)
    assert lessons(ppo(HEAD, 8))[0] != proposals


def test_no_graph_twice_while_there_are_others():
    """27 sequences of two weighted operations and skips in two layers: 1 + 2 * 2 + 4 * 3 graphs."""
    policy = ppo(HEAD, 0)
    graphs = {HEAD.key(choices) for choices in HEAD}
    assert len(graphs) == 17
    tried = set()
    while tried != graphs:
        batch = policy.propose(4)
        new = {HEAD.key(choices) for choices in batch} - tried
        assert len(batch) == 4 and len(new) == min(4, len(graphs) - len(tried))
        tried |= new
        policy.learn(batch, [0.0] * 4)
    assert len(policy.propose(4)) == 4  # the space is exhausted: duplicates


def test_it_learns_the_best_choice():
    """The policy learns to prefer an operation that is better in every position."""
    space = HeadSpace(PUBLISHED.cells, 6)
    policy = ppo(space, 0)
    for _ in range(25):
        batch = policy.propose(10)
        figures = policy.learn(batch, [choices[1:].count(5) for choices in batch])
    share = sum(c[1:].count(5) for c in policy.controller.sample(100, torch.Generator())) / 600
    assert share > 0.6  # of 1/6 at first
    assert figures["entropy"] < 1.2  # of log 6 = 1.79 at first
    assert figures.keys() == {"policy_loss", "entropy", "kl", "clipped", "baseline"}
    assert all(math.isfinite(value) for value in figures.values())


@pytest.mark.parametrize("when, failed", [(0, 0), (2, 0), (0, 6)])
def test_one_reward_beyond_all_others_does_not_end_the_learning(when, failed):
    space = HeadSpace(PUBLISHED.cells, 6)
    policy = ppo(space, 0)
    for number in range(25):
        batch = policy.propose(10)
        rewards = [float(choices[1:].count(5)) for choices in batch]
        if number == when:
            rewards[3] = -1e6
            rewards[10 - failed :] = [math.nan] * failed
        policy.learn(batch, rewards)
    share = sum(c[1:].count(5) for c in policy.controller.sample(100, torch.Generator())) / 600
    assert share > 0.6  # of 1/6 at first


def test_a_failed_trial_counts_as_the_worst_so_far():
    batches = [[(0, 0, 0), (0, 1, 0), (1, 2, 2)], [(0, 2, 0), (1, 1, 2)]]
    policy, other = ppo(HEAD, 0), ppo(HEAD, 0)
    for one in (policy, other):
        assert one.learn(one.propose(2), [math.nan, -math.inf]) == {}  # none is finite
        # The median of the finite ones, then a tenth of the way to the mean of all.
        assert one.learn(batches[0], [1.0, math.nan, 4.0])["baseline"] == pytest.approx(2.45)
    policy.learn(batches[1], [-math.inf, 3.0])
    other.learn(batches[1], [1.0, 3.0])
    for a, b in zip(policy.controller.parameters(), other.controller.parameters(), strict=True):
        assert torch.equal(a, b)


def test_without_a_limit_gradients_are_not_clipped():
    weights = []
    for limit in (0.0, 1e9, 1e-9):
        policy = ppo(HEAD, 0)
        policy.clip_grad_norm = limit
        policy.learn([(0, 0, 0), (0, 1, 0), (1, 2, 2)], [1.0, 2.0, 3.0])
        weights.append(torch.cat([p.flatten() for p in policy.controller.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
