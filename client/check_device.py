"""Will a base model and its training fit the memory of this machine's GPU, or of the machine itself?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # ships no types
from rich.filesize import decimal

from client.check_line import CheckLine, failed, passed, warned
from client.check_model import sizes_of
from client.model_size import ModelSize, Workload
from client.site_config import SiteConfig
from common.config import RunConfig

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Memory:
    """What a device can hold. float_bytes: of a parameter that is not quantised, by default there."""

    device: str
    free_bytes: int
    float_bytes: int


def check_device(config: SiteConfig) -> Iterator[CheckLine]:
    """Find the device that site.toml names, and compare its memory with each allowed model."""
    wanted = config.device.name
    try:
        import torch
    except (ImportError, OSError) as error:
        yield failed(
            "device",
            f"torch cannot be loaded ({type(error).__name__})",
            "install it again, in the build for this machine's GPU driver: pip install -c constraints.txt .",
        )
        return
    if wanted.startswith("cuda") or (wanted == "auto" and torch.cuda.is_available()):
        device = torch.device("cuda" if wanted == "auto" else wanted)
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            yield failed(
                "device",
                f"device.name = {wanted!r}, and torch {torch.__version__} sees {count} GPUs",
                "mend driver or torch build (nvidia-smi shows the driver), or correct [device] name",
            )
            return
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        yield passed("device", f"{name}, {decimal(free)} of {decimal(total)} free")
        memory = Memory(name, free, float_bytes=2)
    elif wanted in ("auto", "cpu"):
        yield _cpu_line(wanted)
        memory = Memory("this machine", free_memory_bytes(), float_bytes=4)
    else:
        yield warned(
            "device",
            f"device.name = {wanted!r} is none that this check knows",
            'take "auto", "cpu" or "cuda", unless torch has that device here',
        )
        return
    for model, size in sizes_of(config).items():
        yield memory_line(model, size, memory)


def memory_line(model: str, size: ModelSize, memory: Memory) -> CheckLine:
    """Compare one model, quantised, and training by RUN.toml's defaults with a device's memory."""
    defaults = RunConfig.parse({})
    work = Workload(
        rank=defaults.lora.rank,
        records=defaults.train.micro_batch_size,
        tokens=defaults.data.max_length,
    )
    base = size.base_bytes(float_bytes=memory.float_bytes)
    training = size.training_bytes(work, float_bytes=memory.float_bytes)
    name = f"memory for {model}"
    detail = (
        f"about {decimal(base)} in nf4 and {decimal(training)} to train (rank {work.rank}, {work.records} "
        f"records of {work.tokens} tokens at once); {memory.device} has {decimal(memory.free_bytes)} free"
    )
    if base > memory.free_bytes:
        return failed(name, detail, "allow a smaller model, or take a device with more memory")
    if base + training > memory.free_bytes:
        return warned(
            name,
            detail,
            "end what else runs on it, or ask the coordinator for train.gradient-checkpointing = true or a "
            "smaller train.micro-batch-size",
        )
    return passed(name, detail)


def free_memory_bytes(cgroup: Path = _CGROUP) -> int:
    """Return the memory that a new process may have here: the machine's, or a container's if that is less."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        counts = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        # Pages of files that nobody reads are counted as used, and given up as soon as memory is asked for.
        used -= int(counts.get("inactive_file", 0))
    except (OSError, ValueError):
        # No container, or one without a limit ("max").
        return free
    return min(free, max(limit - used, 0))


def _cpu_line(wanted: str) -> CheckLine:
    detail = f"the CPU, {os.cpu_count()} cores"
    if wanted == "cpu":
        return passed("device", detail)
    if _NVIDIA_DRIVER.exists():
        return warned(
            "device",
            f"{detail}: there is an NVIDIA driver, and torch sees no GPU",
            "install torch in the build for that driver (nvidia-smi shows it)",
        )
    return warned(
        "device",
        f"{detail}: no GPU was found, and training on a CPU is slow beyond a hundred million parameters",
        'if that is meant, say name = "cpu" in [device] of site.toml',
    )
