"""Cut one data set into simulated sites, by index: pure functions, every index exactly once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

SiteIndices = tuple[tuple[int, ...], ...]


def partition_iid(num_records: int, *, num_sites: int, seed: int) -> SiteIndices:
    """Return a uniformly random cut into sites whose sizes differ by one at most.

    Returns num_sites tuples of sorted indices below num_records.
    Raises ValueError if a site would be left without a record.
    """
    _check_sites(num_records, num_sites=num_sites, min_records=1)
    order = np.random.default_rng(seed).permutation(num_records)
    return tuple(_as_indices(part) for part in np.array_split(order, num_sites))


def partition_dirichlet(
    labels: Sequence[Hashable],
    *,
    num_sites: int,
    concentration: float,
    seed: int,
    min_records: int = 1,
) -> SiteIndices:
    """Return a cut in which each site has its own mix of labels.

    Site k draws its mix q_k ~ Dirichlet(concentration * p), p the labels' share of the whole, then
    its records by q_k without replacement; a label that runs out is left out of the later draws.
    As in the source all sites hold the same number of records, give or take one.
    concentration: above 0; small gives sites of a single label, large gives sites alike.
    Returns num_sites tuples of sorted indices into labels.
    Raises ValueError if concentration is not positive and finite, or if a site would hold fewer
    than min_records.
    Source: Hsu, Qi and Brown, 2019 (arXiv 1909.06335), section 3.
    """
    if not (np.isfinite(concentration) and concentration > 0):
        raise ValueError(
            f"concentration is {concentration}; choose a finite number above 0, such as 0.5"
        )
    _check_sites(len(labels), num_sites=num_sites, min_records=min_records)
    rng = np.random.default_rng(seed)
    pools = [rng.permutation(indices) for indices in partition_by_column(labels).values()]
    left = np.array([len(pool) for pool in pools])
    prior = left / left.sum()
    sizes = [len(part) for part in np.array_split(np.arange(len(labels)), num_sites)]
    sites: list[tuple[int, ...]] = [()] * num_sites
    # The last sites to draw get what the others left, so the order is drawn too.
    for site in rng.permutation(num_sites):
        taken = _draw_counts(
            rng, mix=_draw_mix(rng, concentration * prior), left=left, size=sizes[site]
        )
        parts = [
            pool[count - number : count]
            for pool, count, number in zip(pools, left, taken, strict=True)
        ]
        sites[site] = _as_indices(np.concatenate(parts))
        left = left - taken
    return tuple(sites)


def partition_by_column(labels: Sequence[Hashable]) -> dict[str, tuple[int, ...]]:
    """Return one site for each value of a column, in order of first appearance.

    The site's name is the value as text. Returns sorted indices into labels by name.
    Raises ValueError if there are no labels, or if two values read the same as text.
    """
    if len(labels) == 0:
        raise ValueError("labels is empty; give one label for each record")
    groups: dict[Hashable, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    named: dict[str, tuple[int, ...]] = {}
    for label, indices in groups.items():
        if str(label) in named:
            raise ValueError(
                f"two different labels read {str(label)!r} as text; make the column one type"
            )
        named[str(label)] = tuple(indices)
    return named


def held_back(groups: Sequence[Hashable], *, share: float, seed: int) -> frozenset[int]:
    """Return the places of a random share of the groups, each whole: a test set that no group straddles.

    groups: for each record what it belongs to, such as its patient. share: of the groups, above 0, below 1.
    Raises ValueError if no group, or every one, would be held back.
    """
    places = list(partition_by_column(groups).values())
    count = round(share * len(places))
    if not 0 < count < len(places):
        raise ValueError(
            f"a share of {share} of {len(places)} is {count}; choose one that leaves some on both sides"
        )
    chosen = np.random.default_rng(seed).permutation(len(places))[:count]
    return frozenset(index for group in chosen for index in places[group])


def _check_sites(num_records: int, *, num_sites: int, min_records: int) -> None:
    if num_sites < 1:
        raise ValueError(f"num_sites is {num_sites}; choose 1 or more")
    if min_records < 1:
        raise ValueError(f"min_records is {min_records}; choose 1 or more")
    if num_records < num_sites * min_records:
        raise ValueError(
            f"{num_records} records cannot give {num_sites} sites {min_records} each; lower "
            "num_sites or min_records"
        )


def _draw_mix(rng: np.random.Generator, alpha: np.ndarray) -> np.ndarray:
    """Return a draw from Dirichlet(alpha), also for alpha so small that it underflows.

    log Gamma(a) = log Gamma(a + 1) + log(U) / a keeps the largest component at 1.
    """
    logs = np.log(rng.standard_gamma(alpha + 1.0)) + np.log1p(-rng.random(len(alpha))) / alpha
    weights = np.exp(logs - logs.max())
    mix: np.ndarray = weights / weights.sum()
    return mix


def _draw_counts(
    rng: np.random.Generator, *, mix: np.ndarray, left: np.ndarray, size: int
) -> np.ndarray:
    """Return how many records of each label a site takes: size in all, never above left."""
    taken = np.zeros_like(left)
    while (missing := size - int(taken.sum())) > 0:
        open_mix = np.where(taken < left, mix, 0.0)
        if open_mix.sum() == 0.0:
            open_mix = (left - taken).astype(np.float64)
        drawn = rng.multinomial(missing, open_mix / open_mix.sum())
        taken = np.minimum(taken + drawn, left)
    return taken


def _as_indices(part: np.ndarray) -> tuple[int, ...]:
    return tuple(int(index) for index in np.sort(part))
