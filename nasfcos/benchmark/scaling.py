"""One process of a job that torchrun started: training steps together with the others, timed.

Arguments: device, config (of `detectors.OURS`), height, width, and the file that process 0 writes.
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
        if memory is not None:  # the model, the optimizer's state, and the buckets of gradients
            memory += kept - at_first
        # Of images of their own: the same only if the gradients were the means of all.
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
