"""The benchmark of merging: what it times is a real merge, and a missed target is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.adapter import AdapterShape
from common.adapter_file import open_adapter_file
from simulations.bench.aggregation import missed
from simulations.bench.merges import OneLayer, WholeMerge, merge_from_disk, write_round
from tests.unit.adapters import in_memory

SHAPE = AdapterShape({f"model.layers.{i}.mlp.up_proj": (12, 10) for i in range(3)}, 2, 2.0)


def test_all_modules_are_merged_from_disk_to_disk(tmp_path: Path) -> None:
    write_round(tmp_path, SHAPE, sites=3)
    taken = merge_from_disk(tmp_path, SHAPE, method="svd", repeats=2)
    assert (taken.modules, len(taken.seconds)) == (3, 2)
    # Three sites, rank 2, sides 12 and 10, of one layer.
    assert taken.layer_bytes == 3 * 4 * 2 * 22
    merged = in_memory(open_adapter_file(tmp_path / "merged.safetensors", shape=SHAPE))
    assert merged.is_finite()
    assert all(pair.B.any() for pair in merged.pairs.values())


@pytest.mark.parametrize(
    ("whole", "layer", "words"),
    [
        ({}, {}, []),
        ({"seconds": (21.0,)}, {}, ["224 modules took more than 20 s"]),
        ({"bytes_above": 300_000_000}, {}, ["svd held more than a layer's inputs and 200 MB"]),
        ({}, {"peft": (29.0,)}, ["10 sites: 290 times PEFT's speed, not 300"]),
        ({}, {"error": 2e-5}, ["10 sites, random: error 2.0e-05 of |M|"]),
    ],
)
def test_what_misses_a_target_is_said(whole, layer, words: list[str]) -> None:
    merge = {
        "method": "svd",
        "modules": 224,
        "seconds": (6.0,),
        "bytes_above": 10**8,
        "layer_bytes": 5 * 10**7,
    }
    one = {
        "sites": 10,
        "stack": "random",
        "ours": (0.1,),
        "mean": (0.01,),
        "peft": (31.0,),
        "error": 1e-9,
    }
    assert missed([WholeMerge(**{**merge, **whole})], [OneLayer(**{**one, **layer})]) == words
