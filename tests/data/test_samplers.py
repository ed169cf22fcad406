"""The training stream and the test shards."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from nasfcos.config import ConfigError
from nasfcos.data.samplers import EvalBatchSampler, TrainBatchSampler, augmentation_rng

GROUPS = [0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]


def take(sampler, count):
    return list(islice(sampler, count))


@pytest.mark.parametrize("groups", [GROUPS, [0] * 9, [1] * 3, [0], [0, 0, 1]])
def test_entering_the_stream_anywhere(groups):
    stream = take(TrainBatchSampler(groups, 4, seed=3), 60)
    for start in range(0, 55, 3):
        later = TrainBatchSampler(groups, 4, seed=3, start_iteration=start)
        assert take(later, 5) == stream[start : start + 5]


def test_entering_late_is_cheap():
    sampler = TrainBatchSampler([0, 1] * 50, 16, seed=0, start_iteration=10**9)
    (batch,) = take(sampler, 1)
    assert batch[0][1] == 16 * 10**9


def test_processes_share_the_same_global_batches():
    one = take(TrainBatchSampler(GROUPS, 4, seed=3), 40)
    halves = [take(TrainBatchSampler(GROUPS, 4, 3, rank=r, world_size=2), 40) for r in (0, 1)]
    assert one == [first + second for first, second in zip(*halves, strict=True)]


def test_positions_number_the_stream():
    stream = take(TrainBatchSampler(GROUPS, 4, seed=3), 30)
    assert [position for batch in stream for _, position in batch] == list(range(120))


def test_batches_are_of_one_orientation_and_nothing_is_lost():
    batches = take(TrainBatchSampler(GROUPS, 4, seed=3), 13 * 25)  # 100 epochs
    for batch in batches:
        assert len({GROUPS[index] for index, _ in batch}) == 1
    seen = Counter(index for batch in batches for index, _ in batch)
    assert set(seen) == set(range(13))
    assert all(abs(count - 100) <= 2 for count in seen.values())


def test_order_changes_with_epoch_and_seed():
    batches = take(TrainBatchSampler([0] * 8, 8, seed=3), 2)
    other = take(TrainBatchSampler([0] * 8, 8, seed=4), 1)
    orders = [[index for index, _ in batch] for batch in batches + other]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert orders[0] != orders[1] and orders[0] != orders[2]


def test_a_set_smaller_than_the_batch_repeats():
    (batch,) = take(TrainBatchSampler([0, 0, 0], 8, seed=0), 1)
    assert sorted(Counter(index for index, _ in batch).values()) == [2, 3, 3]


def test_indivisible_batches_name_the_key():
    with pytest.raises(ConfigError, match=r"SOLVER\.IMS_PER_BATCH = 6"):
        TrainBatchSampler(GROUPS, 6, seed=0, world_size=2, accumulate=2)


def test_augmentation_differs_by_seed_and_position():
    draws = [augmentation_rng(*key).random() for key in ((0, 1), (0, 2), (1, 1), (0, 1))]
    assert len(set(draws)) == 3 and draws[0] == draws[3]


@pytest.mark.parametrize("world_size", [1, 2, 3, 20])
def test_test_shards_have_no_duplicates_or_gaps(world_size):
    shards = [EvalBatchSampler(GROUPS, 2, rank, world_size) for rank in range(world_size)]
    assert sum(len(shard) for shard in shards) == 7
    seen = [index for shard in shards for batch in shard for index in batch]
    assert sorted(seen) == list(range(13))
    lengths = [len(shard) for shard in shards]
    assert max(lengths) - min(lengths) <= 1


def test_test_batches_keep_orientations_together():
    batches = list(EvalBatchSampler(GROUPS, 4))
    orders = [np.array(GROUPS)[batch] for batch in batches]
    assert sum(len(set(order)) > 1 for order in orders) <= 1
