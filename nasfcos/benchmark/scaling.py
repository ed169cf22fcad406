"""One process of a job under torchrun: takes training steps with the others and times them.

Arguments: device, config (of `detectors.OURS`), height, width, and the file that rank 0 writes.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

from ..engine import distributed
from .detectors import our_training, training_call
from .inputs import random_target, smooth_image
from .measure import synchronize
from .memory import bytes_in_use, peak_bytes

WARMUPS, STEPS = 2, 7


def main(device_name: str, name: str, height: str, width: str, result: str) -> None:
    """Run the steps; see the module for the arguments."""
    size = int(height), int(width)
    with distributed.session(device_name) as device:
        torch.set_num_threads(1)
        at_first = bytes_in_use(device)
        images = [smooth_image(*size, seed=distributed.rank()).to(device)]
        targets = [random_target(*size, seed=distributed.rank(), device=device)]
        model: nn.Module
        model, optimizer = our_training(name, size, device)
        model = distributed.parallel(model)
        step = training_call(model, optimizer, images, targets)
        seconds = []
        for number in range(WARMUPS + STEPS):
            distributed.barrier()
            started = time.perf_counter()
            step()
            synchronize(device)
            distributed.barrier()
            if number >= WARMUPS:
                seconds.append(time.perf_counter() - started)
        kept = bytes_in_use(device)
        memory = peak_bytes(step, device)
        if memory is not None:  # model, optimizer state and gradient buckets
            memory += kept - at_first
        # Each process has its own images, so these agree only if gradients were averaged.
        momenta = [state["momentum_buffer"].double().sum() for state in optimizer.state.values()]
        everyones = distributed.all_gather(torch.stack(momenta).tolist())
        found = {
            "processes": distributed.world_size(),
            "agree": all(own == everyones[0] for own in everyones),
            "seconds": seconds,
            "memory_bytes": memory,
        }
        if distributed.rank() == 0:
            Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
