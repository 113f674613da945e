"""What `make bench-aggregation` times: merges of a whole adapter from disk, and of one module by itself."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]  # ships no types
from rich.console import Console
from rich.progress import track

from common.adapter import AdapterShape, AdapterState, LoraPair
from common.adapter_file import AdapterFile, open_adapter_file, write_adapter_file
from server.aggregation import (
    MergedModule,
    MergeRules,
    SiteUpdate,
    merge_modules,
    update_shares,
)

SEED = 0
RANK = 16
SITES = 10
MANY_SITES = 100
# Hidden size, size of the MLP, layers: those of Llama 2 7B.
HIDDEN, MLP, LAYERS = 4096, 11_008, 32
SCALING = 2.0


@dataclass(frozen=True, slots=True)
class WholeMerge:
    """One merge of all modules. seconds: from the first read to the last write, of each repeat.

    bytes_above: peak resident memory above what the process held before. layer_bytes: the largest decoder
    layer's inputs of all sites.
    """

    method: str
    modules: int
    seconds: tuple[float, ...]
    bytes_above: int
    layer_bytes: int


@dataclass(frozen=True, slots=True)
class OneLayer:
    """Seconds for one HIDDEN x HIDDEN module, in turns: ours by svd, the mean of factors, PEFT's svd.

    peft: () where it was not run. error: how much farther from M ours is than the best of its rank, over
    |M|, against a dense float64 SVD; None where that was not made.
    """

    sites: int
    stack: str
    ours: tuple[float, ...]
    mean: tuple[float, ...]
    peft: tuple[float, ...]
    error: float | None


def llama_shape(*, layers: int = LAYERS) -> AdapterShape:
    """Return the shape of a rank-16 adapter on every linear module of a Llama 2 7B."""
    sides = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    sides |= {"mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN)}
    sides["mlp.down_proj"] = (HIDDEN, MLP)
    modules = {f"model.layers.{i}.{n}": side for i in range(layers) for n, side in sides.items()}
    return AdapterShape(modules, RANK, SCALING)


def random_pairs(shape: AdapterShape, seed: int) -> Iterator[tuple[str, LoraPair]]:
    """Yield normally distributed factors of every module."""
    random = np.random.default_rng(seed)
    for name, (d_out, d_in) in shape.modules.items():
        a = random.standard_normal((shape.rank, d_in), dtype=np.float32)
        yield name, LoraPair(a, random.standard_normal((d_out, shape.rank), dtype=np.float32))


def write_round(folder: Path, shape: AdapterShape, *, sites: int) -> None:
    """Write the global adapter and what each site returned."""
    numbers = range(sites + 1)
    for number in track(numbers, "adapters on disk", console=Console(stderr=True), transient=True):
        name = "current" if number == 0 else f"site-{number:03d}"
        pairs = random_pairs(shape, SEED + number)
        write_adapter_file(folder / f"{name}.safetensors", pairs, shape=shape, fsync=False)


def open_round(folder: Path, shape: AdapterShape) -> tuple[AdapterFile, list[SiteUpdate]]:
    """Return the global adapter and the sites' updates, in files."""
    updates = [
        SiteUpdate(path.stem, 1.0, open_adapter_file(path, shape=shape))
        for path in sorted(folder.glob("site-*.safetensors"))
    ]
    return open_adapter_file(folder / "current.safetensors", shape=shape), updates


def merge_from_disk(folder: Path, shape: AdapterShape, *, method: str, repeats: int) -> WholeMerge:
    """Merge all modules, one at a time from disk to disk, and return what it took."""
    current, updates = open_round(folder, shape)
    rules = MergeRules(method)
    shares = update_shares(current, updates, rules=rules)
    idle = psutil.Process().memory_info().rss
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        merged = merge_modules(current, updates, shares=shares, rules=rules)
        pairs = ((module.name, module.pair) for module in merged)
        write_adapter_file(folder / "merged.safetensors", pairs, shape=shape)
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    layer = sum(
        4 * shape.rank * (d_out + d_in)
        for name, (d_out, d_in) in shape.modules.items()
        if ".layers.0." in name
    )
    return WholeMerge(method, len(shape.modules), tuple(seconds), peak - idle, layer * len(updates))


def one_layer(*, sites: int, stack: str, pairs: int, with_peft: bool, reference: bool) -> OneLayer:
    """Time one module in turns, our way first.

    stack: "random", or "ill-conditioned": columns that fall by eight decades, sites that nearly agree.
    """
    current, returned = _layer(sites, stack)
    updates = [SiteUpdate(f"site-{i}", 1.0, state) for i, state in enumerate(returned)]
    shares = [1 / sites] * sites
    mean = partial(_factor_mean, returned)
    peft = _peft_svd(returned) if with_peft else None

    def ours() -> MergedModule:
        return next(merge_modules(current, updates, shares=shares, rules=MergeRules("svd")))

    taken: dict[str, list[float]] = {"ours": [], "mean": [], "peft": []}
    arms: dict[str, Callable[[], object]] = {"ours": ours, "mean": mean}
    if peft is not None:
        arms["peft"] = peft
    ours()
    mean()
    turns = range(pairs)
    for _ in track(turns, f"{sites} sites, {stack}", console=Console(stderr=True), transient=True):
        for arm, run in arms.items():
            started = time.perf_counter()
            run()
            taken[arm].append(time.perf_counter() - started)
    error = _excess_error(ours(), returned) if reference else None
    return OneLayer(
        sites, stack, tuple(taken["ours"]), tuple(taken["mean"]), tuple(taken["peft"]), error
    )


def _layer(sites: int, stack: str) -> tuple[AdapterState, list[AdapterState]]:
    shape = AdapterShape({"layer": (HIDDEN, HIDDEN)}, RANK, SCALING)
    states = [
        AdapterState(dict(random_pairs(shape, SEED + seed)), SCALING) for seed in range(sites + 1)
    ]
    if stack == "random":
        return states[0], states[1:]
    falling = np.logspace(0, -8, RANK, dtype=np.float32)
    first = states[0].pairs["layer"]
    alike = []
    for state in states:
        pair = state.pairs["layer"]
        a, b = first.A + 1e-4 * pair.A, (first.B + 1e-4 * pair.B) * falling
        alike.append(AdapterState({"layer": LoraPair(a, b)}, SCALING))
    return alike[0], alike[1:]


def _factor_mean(returned: Sequence[AdapterState]) -> LoraPair:
    pairs = [state.pairs["layer"] for state in returned]
    a, b = ([getattr(pair, name) for pair in pairs] for name in "AB")
    return LoraPair(np.mean(a, axis=0), np.mean(b, axis=0))


def _peft_svd(returned: Sequence[AdapterState]) -> Callable[[], object]:
    """PEFT's add_weighted_adapter(combination_type="svd") on one layer that carries all adapters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    names = [f"site{i}" for i in range(len(returned))]
    config = LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=["layer"])
    with torch.device("cpu"):
        base = nn.ModuleDict({"layer": nn.Linear(HIDDEN, HIDDEN, bias=False)})
        model: Any = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    layer = model.base_model.model["layer"]
    with torch.no_grad():
        for name, state in zip(names, returned, strict=True):
            pair = state.pairs["layer"]
            layer.lora_A[name].weight.copy_(torch.from_numpy(pair.A))
            layer.lora_B[name].weight.copy_(torch.from_numpy(pair.B))
    weights = [1 / len(names)] * len(names)

    def merge() -> None:
        if "merged" in model.peft_config:
            model.delete_adapter("merged")
        model.base_model.add_weighted_adapter(names, weights, "merged", combination_type="svd")

    return merge


def _excess_error(merged: MergedModule, returned: Sequence[AdapterState]) -> float:
    """(|M - ours| - |M - best of the rank|) / |M|, dense and in float64; Eckart and Young say the second."""
    import torch

    exact = torch.zeros((HIDDEN, HIDDEN), dtype=torch.float64)
    for state in returned:
        pair = state.pairs["layer"]
        a, b = torch.from_numpy(pair.A).double(), torch.from_numpy(pair.B).double()
        exact += (SCALING / len(returned)) * b @ a
    values = torch.linalg.svdvals(exact)
    least = float(values[RANK:].norm())
    a, b = torch.from_numpy(merged.pair.A).double(), torch.from_numpy(merged.pair.B).double()
    found = float((exact - SCALING * b @ a).norm())
    return (found - least) / float(exact.norm())
