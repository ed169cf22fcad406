"""Which image goes into which batch, on which process.

Training sees one endless stream of global batches that depends on the seed alone; every process
takes its share of each. So the same images make up step t under any number of processes, and
the stream can be entered at any step.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from ..config import ConfigError


def share_of_batch(batch_size: int, world_size: int, accumulate: int = 1) -> int:
    """Images of one process in each optimizer step.

    Raises:
        ConfigError: the batch does not divide evenly.
    """
    if batch_size % (world_size * accumulate):
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH = {batch_size} must be a multiple of processes * "
            f"SOLVER.ACCUMULATE = {world_size} * {accumulate} = {world_size * accumulate}"
        )
    return batch_size // world_size


def augmentation_rng(seed: int, position: int) -> np.random.Generator:
    """The generator of the random choices for one place of the training stream."""
    return np.random.default_rng([seed, 1, position])


class TrainBatchSampler(Sampler):
    """Endless batches of (image index, position in the stream).

    Each epoch is a new shuffle of all images. An image joins the open batch of its group; a
    batch is emitted once it is full. What is open at the end of an epoch is filled by the next,
    so over the run no image is lost or preferred, and sets smaller than a batch repeat in it.
    """

    def __init__(
        self,
        groups: Sequence[int],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        start_iteration: int = 0,
    ):
        """
        Args:
            groups: the group (0, 1, ...) of each image; a batch has images of one group.
            batch_size: of the global batch.
            seed: of the order.
            rank, world_size: this process takes the rank-th part of each batch.
            accumulate: parts of an optimizer step; the batch must divide by it too.
            start_iteration: number of global batches to pass over.
        """
        self.share = share_of_batch(batch_size, world_size, accumulate)
        self.groups = np.asarray(groups, dtype=np.int64)
        if not len(self.groups):
            raise ValueError("no images to sample from")
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.start_iteration = start_iteration
        self._counts = np.bincount(self.groups)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.rank * self.share
        for iteration, batch in enumerate(
            self.global_batches(self.start_iteration), self.start_iteration
        ):
            position = iteration * self.batch_size + first
            share = batch[first : first + self.share]
            yield [(index, position + i) for i, index in enumerate(share)]

    def global_batches(self, start: int = 0) -> Iterator[list[int]]:
        """The image indices of global batches `start`, `start` + 1, ... without end."""
        # Batches that end in an epoch are known from the counts, so whole epochs are skipped.
        epoch = start * self.batch_size // len(self.groups)
        while self._batches_before(epoch + 1) <= start:
            epoch += 1
        skip = start - self._batches_before(epoch)
        pools = [self._left_over(group, epoch) for group in range(len(self._counts))]
        while True:
            for index in self._shuffle(epoch):
                pool = pools[self.groups[index]]
                pool.append(int(index))
                if len(pool) == self.batch_size:
                    if skip:
                        skip -= 1
                    else:
                        yield list(pool)
                    pool.clear()
            epoch += 1

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.groups))

    def _batches_before(self, epoch: int) -> int:
        return sum(epoch * int(count) // self.batch_size for count in self._counts)

    def _left_over(self, group: int, epoch: int) -> list[int]:
        """The images of a group's open batch at the start of an epoch."""
        count = epoch * int(self._counts[group]) % self.batch_size
        left: list[int] = []
        while len(left) < count:
            epoch -= 1
            order = self._shuffle(epoch)
            left = order[self.groups[order] == group].tolist() + left
        return left[len(left) - count :]


class EvalBatchSampler(Sampler):
    """Each image once: batches in order, group after group, dealt out to the processes."""

    def __init__(self, groups: Sequence[int], batch_size: int, rank: int = 0, world_size: int = 1):
        """
        Args:
            groups: the group of each image; like ones are put together.
            batch_size: images of one batch of one process.
            rank, world_size: this process takes batches rank, rank + world_size, ...
        """
        order = np.argsort(np.asarray(groups, dtype=np.int64), kind="stable").tolist()
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        self._batches = batches[rank::world_size]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)
