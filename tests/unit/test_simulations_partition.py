"""Cutting a data set into sites: every index exactly once, seeded, and as skewed as asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from simulations.partition import partition_by_column, partition_dirichlet, partition_iid

SEEDS = st.integers(0, 2**32 - 1)
LABELS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=120)


def _assert_exact_cover(sites: Iterable[tuple[int, ...]], num_records: int) -> None:
    cut = tuple(sites)
    assert sorted(index for site in cut for index in site) == list(range(num_records))
    assert all(list(site) == sorted(site) for site in cut)
    assert all(type(index) is int for site in cut for index in site)


@given(num_records=st.integers(1, 200), num_sites=st.integers(1, 20), seed=SEEDS)
def test_iid_cut_covers_every_index_once_in_even_sites(
    num_records: int, num_sites: int, seed: int
) -> None:
    assume(num_records >= num_sites)
    sites = partition_iid(num_records, num_sites=num_sites, seed=seed)
    assert len(sites) == num_sites
    _assert_exact_cover(sites, num_records)
    assert max(map(len, sites)) - min(map(len, sites)) <= 1
    assert sites == partition_iid(num_records, num_sites=num_sites, seed=seed)


@given(
    labels=LABELS,
    num_sites=st.integers(1, 12),
    concentration=st.floats(1e-6, 1e6),
    seed=SEEDS,
)
def test_dirichlet_cut_covers_every_index_once_in_even_sites(
    labels: list[str], num_sites: int, concentration: float, seed: int
) -> None:
    assume(len(labels) >= num_sites)
    sites = partition_dirichlet(labels, num_sites=num_sites, concentration=concentration, seed=seed)
    assert len(sites) == num_sites
    _assert_exact_cover(sites, len(labels))
    assert max(map(len, sites)) - min(map(len, sites)) <= 1
    assert sites == partition_dirichlet(
        labels, num_sites=num_sites, concentration=concentration, seed=seed
    )


@given(labels=st.lists(st.one_of(st.integers(), st.booleans().map(str)), min_size=1))
def test_column_cut_covers_every_index_once_and_keeps_values_apart(labels: list[object]) -> None:
    sites = partition_by_column(labels)
    _assert_exact_cover(sites.values(), len(labels))
    assert list(sites) == [str(label) for label in dict.fromkeys(labels)]
    for name, indices in sites.items():
        assert {str(labels[index]) for index in indices} == {name}


def test_column_cut_by_hand() -> None:
    assert partition_by_column(["b", "a", "b", 7]) == {"b": (0, 2), "a": (1,), "7": (3,)}


def test_another_seed_gives_another_cut() -> None:
    labels = ["a", "b"] * 50
    assert partition_iid(100, num_sites=4, seed=0) != partition_iid(100, num_sites=4, seed=1)
    assert partition_dirichlet(
        labels, num_sites=4, concentration=1.0, seed=0
    ) != partition_dirichlet(labels, num_sites=4, concentration=1.0, seed=1)


def _largest_share(concentration: float) -> float:
    """Return the mean share of a site's commonest label, over 20 cuts of 4 labels by 4 sites."""
    labels = [index % 4 for index in range(400)]
    shares = []
    for seed in range(20):
        for site in partition_dirichlet(
            labels, num_sites=4, concentration=concentration, seed=seed
        ):
            shares.append(max(Counter(labels[index] for index in site).values()) / len(site))
    return sum(shares) / len(shares)


def test_smaller_concentration_gives_sites_of_fewer_labels() -> None:
    # Alike sites hold a quarter of each label; strangers hold one label, or what others left.
    alike, mixed, strangers = _largest_share(1e6), _largest_share(1.0), _largest_share(1e-3)
    assert 0.25 <= alike < 0.35
    assert alike + 0.1 < mixed < strangers - 0.1
    assert strangers > 0.8


def test_bad_requests_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="num_sites is 0; choose 1 or more"):
        partition_iid(5, num_sites=0, seed=0)
    with pytest.raises(ValueError, match="3 records cannot give 4 sites 1 each; lower num_sites"):
        partition_iid(3, num_sites=4, seed=0)
    with pytest.raises(ValueError, match="8 records cannot give 4 sites 3 each"):
        partition_dirichlet("aabbccdd", num_sites=4, concentration=1.0, seed=0, min_records=3)
    with pytest.raises(ValueError, match="min_records is 0; choose 1 or more"):
        partition_dirichlet("ab", num_sites=1, concentration=1.0, seed=0, min_records=0)
    for concentration in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="choose a finite number above 0"):
            partition_dirichlet("ab", num_sites=1, concentration=concentration, seed=0)
    with pytest.raises(ValueError, match="labels is empty"):
        partition_by_column([])
    with pytest.raises(ValueError, match="two different labels read '1' as text"):
        partition_by_column([1, "1"])
