"""Description of the machine and the software that were measured."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
import torchvision

from ..engine.distributed import available_cores
from ..ops.library import OPERATORS, has_compiled

ROOT = Path(__file__).parents[2]
SAME_FOR_COMPARISON = (
    "cpu", "cores", "threads", "gpu", "torch", "torchvision", "python", "compiled_operators",
)  # fmt: skip
"""Entries of `describe` that affect absolute times."""


def describe(device: torch.device) -> dict[str, object]:
    """Machine, libraries, commit (in a checkout), command and date."""
    cuda = device.type == "cuda"
    return {
        "cpu": _cpu_model(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "compiled_operators": [name for name in OPERATORS if has_compiled(name, device.type)],
        "commit": _commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _commit() -> str | None:
    """The commit of the checkout, followed by + if files were modified; None: no checkout."""
    if not (ROOT / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        # Whatever the user's settings, git must not wait for a lock or rewrite its index.
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments],
            capture_output=True, text=True, check=True, env=environment,
        )  # fmt: skip
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
