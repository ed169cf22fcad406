import math
import random
import statistics

import pytest

from nasfcos.config import get_defaults
from nasfcos.search.controller import PPO
from nasfcos.search.records import COMPLETE, TrialResult
from nasfcos.search.simulate import (
    SyntheticRewards,
    first_hit,
    first_hits,
    stopped_hit,
    uniform_hits,
)
from nasfcos.search.space import FPNSpace, HeadSpace
from nasfcos.search.stage import Pruning
from nasfcos.search.strategies import Evolution, RandomSearch, build_strategy
from tests.known import PUBLISHED
from tests.strategies import evolution, ppo

OPS = ["conv1x1", "conv3x3", "sep_conv_3x3", "skip_connect", "def_conv_3x3"]
HEAD = HeadSpace(PUBLISHED.cells, 3, OPS)
TINY = HeadSpace(PUBLISHED.cells, 1, ["conv1x1", "skip_connect"])  # 4 sequences, 3 graphs
STRATEGIES = {
    "random": lambda space, seed: RandomSearch(space, seed),
    "evolution": lambda space, seed: evolution(space, seed, population=8, tournament=4),
    "ppo": ppo,
}
each = pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)


def reward(choices):
    return -sum((c - 2) ** 2 for c in choices) / 10


@each
@pytest.mark.parametrize("space", [HEAD, FPNSpace(5)], ids=["head", "fpn"])
def test_replaying_its_lessons_gives_the_same_strategy(make, space):
    strategy, journal = make(space, 3), []
    for _ in range(5):
        batch = strategy.propose(6)
        assert strategy.propose(6) == batch  # until the next learn
        rewards = [reward(choices) for choices in batch]
        journal.append((batch, rewards, strategy.learn(batch, rewards)))
    random.seed(99)
    resumed = make(space, 3)
    for batch, rewards, figures in journal:
        assert resumed.learn(batch, rewards) == figures
    assert resumed.propose(6) == strategy.propose(6)
    assert make(space, 4).propose(6) != make(space, 3).propose(6)


@each
def test_proposals_are_new_graphs(make):
    strategy, tried = make(HEAD, 0), set()
    for _ in range(12):
        batch = strategy.propose(10)
        new = {HEAD.key(choices) for choices in batch}
        assert len(new) == 10 and not new & tried
        tried |= new
        strategy.learn(batch, [reward(choices) for choices in batch])


@each
def test_an_exhausted_space_is_proposed_again(make):
    strategy = make(TINY, 0)
    for _ in range(4):
        batch = strategy.propose(3)
        assert len(batch) == 3
        strategy.learn(batch, [reward(choices) for choices in batch])
    assert len({TINY.key(c) for c in make(TINY, 0).propose(3)}) == 3


def test_random_search_is_uniform_over_sequences():
    drawn = [RandomSearch(TINY, seed).propose(1)[0] for seed in range(400)]
    assert {c: drawn.count(c) > 70 for c in TINY} == dict.fromkeys(TINY, True)


def test_evolution_starts_at_random_then_changes_one_decision_of_the_best():
    strategy = evolution(HEAD, 0, population=4, tournament=4)
    first = strategy.propose(4)
    assert first == RandomSearch(HEAD, 0).propose(4)
    strategy.learn(first, [0.1, 0.2, 0.4, 0.3])
    for child in strategy.propose(10):
        assert sum(map(int.__ne__, child, first[2])) == 1


def test_evolution_breeds_from_what_it_starts_from():
    cfg = get_defaults()
    cfg.SEARCH.STRATEGY = "evolution"
    cfg.SEARCH.EVOLUTION.POPULATION = cfg.SEARCH.EVOLUTION.TOURNAMENT = 3
    start = (2, 1, 1, 1)
    strategy = build_strategy(cfg, HEAD, 0, start)
    first = strategy.propose(6)
    assert all(sum(map(int.__ne__, child, start)) == 1 for child in first)
    assert len({HEAD.key(child) for child in first}) == 6
    strategy.learn([start, *first[:1]], [0.5, 0.1])  # not full yet
    assert sum(map(int.__ne__, strategy.propose(1)[0], start)) == 1
    strategy.learn([(0, 4, 4, 4)], [0.9])
    assert sum(map(int.__ne__, strategy.propose(1)[0], (0, 4, 4, 4))) == 1


def test_evolution_forgets_the_oldest():
    strategy = evolution(HEAD, 0, population=3, tournament=3)
    best = (0, 0, 0, 0)
    strategy.learn([best, (1, 1, 1, 1)], [9.0, 1.0])
    strategy.learn([(2, 2, 2, 2)], [2.0])
    assert sum(map(int.__ne__, strategy.propose(1)[0], best)) == 1
    figures = strategy.learn([(3, 4, 4, 4)], [3.0])
    assert figures == {"population_mean": 2.0, "population_best": 3.0}
    assert sum(map(int.__ne__, strategy.propose(1)[0], (3, 4, 4, 4))) == 1


def test_evolution_ignores_rewards_that_are_not_finite():
    strategy = evolution(HEAD, 0, population=2, tournament=2)
    assert strategy.learn([(0, 0, 0, 0)], [math.nan]) == {}
    strategy.learn([(1, 1, 1, 1), (2, 2, 2, 2)], [-math.inf, -1.0])
    assert [choices for _, choices in strategy.population] == [(2, 2, 2, 2)]


def test_build_strategy():
    cfg = get_defaults()
    kinds = {"random": RandomSearch, "evolution": Evolution, "ppo": PPO}
    cfg.SEARCH.EVOLUTION.POPULATION = 7
    cfg.SEARCH.EVOLUTION.TOURNAMENT = 2
    cfg.SEARCH.PPO.HIDDEN = 12
    for name, kind in kinds.items():
        cfg.SEARCH.STRATEGY = name
        strategy = build_strategy(cfg, HEAD, 5)
        assert type(strategy) is kind and strategy.seed == 5
        if name == "evolution":
            assert (strategy.population.maxlen, strategy.tournament) == (7, 2)
        if name == "ppo":
            assert strategy.controller.lstm.hidden_size == 12


def synthetic_table(space, seed):
    """Rewards that add up over decisions, with interactions of pairs, and noise (30%)."""
    rng = random.Random(seed)
    weights = {}

    def weight(*what, scale):
        return weights.setdefault(what, scale * rng.gauss(0, 1))

    rewards = {}
    for choices in space:
        key = space.key(choices)
        if key in rewards:
            continue
        total = sum(weight(i, c, scale=1) for i, c in enumerate(choices))
        for i, a in enumerate(choices):
            total += sum(weight(i, a, j, b, scale=0.25) for j, b in enumerate(choices[:i]))
        rewards[key] = total
    deviation = statistics.pstdev(rewards.values())
    return {key: r + 0.3 * deviation * rng.gauss(0, 1) for key, r in rewards.items()}


def test_ppo_and_evolution_find_the_best_before_random_does():
    table = synthetic_table(HEAD, 0)
    assert len(table) == 313

    def median(build):
        return statistics.median(first_hits(HEAD, table, build, range(12), 0.01, 10, 313))

    by_chance = median(lambda seed: RandomSearch(HEAD, seed))
    assert 40 < by_chance < 120  # of 313 graphs, three of which are to be found
    by_chance = min(by_chance, statistics.median(uniform_hits(313, 3, 100)))
    assert median(lambda seed: evolution(HEAD, seed)) < by_chance
    assert median(lambda seed: ppo(HEAD, seed)) < by_chance


def test_first_hits_counts_graphs():
    class Scripted:
        """Proposes all of `TINY` in order, everything twice, from number `seed` on."""

        def __init__(self, seed):
            self.left = [choices for choices in TINY for _ in (0, 1)][seed:]

        def propose(self, count):
            return (self.left + self.left[-1:] * count)[:count]

        def learn(self, batch, rewards):
            assert rewards == [table[TINY.key(choices)] for choices in batch]
            self.left = self.left[len(batch) :] or self.left[-1:]

    a, b, c, d = (TINY.key(choices) for choices in TINY)  # split, operation: 00, 01, 10, 11
    assert len({a, b, c}) == 3 and d == b
    table = {a: 0.0, b: 1.0, c: 2.0}

    def hits(seeds, max_trials, top=0.34):
        return first_hits(TINY, table, Scripted, seeds, top, batch=3, max_trials=max_trials)

    assert hits([0, 2, 4], max_trials=10) == [3, 2, 1]
    assert hits([0, 2, 4], max_trials=2) == [3, 2, 1]
    assert hits([0, 2, 4], max_trials=1) == [2, 2, 1]
    assert hits([0], max_trials=10, top=0.0) == [3]  # the best at least
    assert hits([0], max_trials=10, top=0.7) == [2]
    assert hits([6], max_trials=10) == [11]  # never gets there, and stalls


@pytest.mark.parametrize("goal, spent", [(-1.0, 2.25), (-3.0, 1.0), (0.0, 4.0)])
def test_what_a_search_with_early_stopping_spends(goal, spent):
    learnt = []

    class InOrder:
        def propose(self, count):
            return [tuple(TINY)[min(len(learnt), 2)]]

        def learn(self, batch, rewards):
            learnt.extend(rewards)

    ends, rungs = (-3.0, -2.0, -1.0), (-4.0, -6.0, -5.0)
    trials = {
        TINY.key(choices): TrialResult(COMPLETE, end, curve=((10, rung),))
        for choices, end, rung in zip(TINY, ends, rungs, strict=False)
    }
    # The first sets the threshold, the second is stopped at it, the third lies at the median of
    # both: 40 + 10 + 40 iterations.
    pruning = Pruning((10,), keep=0.5, startup=1)
    assert stopped_hit(TINY, trials, InOrder(), goal, pruning, 40, batch=1) == spent
    assert learnt[:2] == [-3.0, -6.0 + 1.0][: len(learnt)]


def test_synthetic_rewards():
    space = FPNSpace(7)
    rewards, other = SyntheticRewards(space, 0), SyntheticRewards(space, 1)
    rng = random.Random(0)
    drawn = [space.sample(rng) for _ in range(1000)]
    values = [rewards(choices) for choices in drawn]
    assert [SyntheticRewards(space, 0)(choices) for choices in drawn[::-1]] == values[::-1]
    assert abs(statistics.correlation(values, [other(choices) for choices in drawn])) < 0.2
    goal = rewards.best(0.1)
    assert 0.07 < sum(value >= goal for value in values) / len(values) < 0.13
    assert first_hit(space, rewards, RandomSearch(space, 0), goal, 10, 100) <= 100


def test_uniform_hits_are_quantiles_of_the_exact_distribution():
    # One best of five: it comes first to fifth with equal probability.
    assert uniform_hits(5, 1, 5) == [1, 2, 3, 4, 5]
    # Two of four: first with 1/2, second with 1/3, third with 1/6.
    assert uniform_hits(4, 2, 6) == [1, 1, 1, 2, 2, 3]
