"""What an audit's lower bound on epsilon says of the protection that a ledger counts."""

from __future__ import annotations

# A bound that honest training reaches in an audit's rehearsals, and misses hardly ever.
_SOMETHING = 0.2


def exceeds_ledger(epsilon_lower: float | None, ledger_epsilon: float | None) -> bool:
    """Whether more was given away than the ledger counts; ledger_epsilon: None without protection."""
    return (
        epsilon_lower is not None and ledger_epsilon is not None and epsilon_lower > ledger_epsilon
    )


def is_blind(epsilon_lower: float | None, epsilon_rehearsed: float | None) -> bool:
    """Whether nothing was seen where training as it is claimed would have shown something.

    epsilon_rehearsed: what the same audit shows of it, None where nobody rehearsed. A bound of 0 is no sign
    of protection then.
    """
    return epsilon_lower == 0 and (epsilon_rehearsed or 0.0) > _SOMETHING
