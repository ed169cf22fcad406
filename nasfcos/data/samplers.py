"""Batch samplers: which image goes into which batch of which process.

Training uses one endless stream of global batches that depends on the seed alone; each process
takes its share of every batch. So step t has the same images for any number of processes, and
training can resume at any step.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from ..config import ConfigError


def share_of_batch(batch_size: int, world_size: int, accumulate: int = 1) -> int:
    """Number of images per process and optimizer step.

    Args:
        batch_size: images per optimizer step, over all processes.
        world_size: number of processes.
        accumulate: parts into which each process splits its share.

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
    """The random generator for the augmentation of one position in the training stream."""
    return np.random.default_rng([seed, 1, position])


class TrainBatchSampler(Sampler):
    """Endless batches of (image index, position in the stream).

    Each epoch is a new shuffle of all images. An image joins the open batch of its group, and a
    full batch is emitted. A batch that is open at the end of an epoch is filled in the next one, so
    no image is lost or preferred over a run, and a set smaller than a batch repeats within it.
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
            groups: group (0, 1, ...) of each image; a batch has images of one group only.
            batch_size: images in a global batch.
            seed: seed of the shuffles.
            rank: rank of this process, which takes the rank-th part of each batch.
            world_size: number of processes.
            accumulate: parts of an optimizer step; each share must be divisible by it.
            start_iteration: number of global batches to skip.

        Raises:
            ConfigError: the batch does not divide evenly.
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
        """The image indices of global batches `start`, `start` + 1, ..., without end."""
        # How many batches are full by the end of an epoch follows from the sizes of the groups, so
        # whole epochs can be skipped.
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
        """Number of batches that are full before an epoch starts."""
        return sum(epoch * int(count) // self.batch_size for count in self._counts)

    def _left_over(self, group: int, epoch: int) -> list[int]:
        """The images in the open batch of a group at the start of an epoch."""
        count = epoch * int(self._counts[group]) % self.batch_size
        left: list[int] = []
        while len(left) < count:
            epoch -= 1
            order = self._shuffle(epoch)
            left = order[self.groups[order] == group].tolist() + left
        return left[len(left) - count :]


class EvalBatchSampler(Sampler):
    """Batches with each image once, in order and group by group, dealt out to the processes."""

    def __init__(self, groups: Sequence[int], batch_size: int, rank: int = 0, world_size: int = 1):
        """
        Args:
            groups: group of each image; images of a group are batched together.
            batch_size: images in a batch of one process.
            rank: rank of this process, which takes batches rank, rank + world_size, ...
            world_size: number of processes.
        """
        order = np.argsort(np.asarray(groups, dtype=np.int64), kind="stable").tolist()
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        self._batches = batches[rank::world_size]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)
