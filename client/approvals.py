"""Approvals: with policy.approval = "ask" a run waits until the hospital has seen what it costs.

One file a run, `approvals/<run_uid>.json`, in three states:

    waiting    asked; every task of the run is answered with code "approval"
    approved   tasks of exactly this plan may run, for as many steps as it holds
    declined   final, also for a run that was approved before

An approval is for one plan: a coordinator who wants other settings begins another run.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from client.cost import RunCost
from client.policy import check_run_uid
from common.canonical import canonical_json, from_canonical
from common.config import SET_BY_ROUND, RunConfig, Scalar
from common.errors import ApprovalError, ConfigError, PolicyError
from common.files import write_atomically

State = Literal["waiting", "approved", "declined"]

# Whoever may sign tasks must not fill the disk, nor hide one request among thousands.
MAX_WAITING = 100


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run asks of this site over its whole length.

    coordinator: the public key that signed it, 64 hex digits. max_rank: the highest lora.rank of its
    tasks. settings: every dotted key that a site is sent, less those that a round sets.
    """

    run_uid: str
    coordinator: str
    base_digest: str
    max_rank: int
    settings: Mapping[str, Scalar]

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

    @property
    def digest(self) -> str:
        """SHA-256 hex over all of it: what an approval is bound to."""
        return hashlib.sha256(canonical_json(_plan_tree(self))).hexdigest()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all rounds."""
        return int(self.settings["train.rounds"]) * int(self.settings["train.local-steps"])


@dataclass(frozen=True, slots=True)
class Request:
    """A run that asked. asked_at, decided_at: Unix seconds, the latter 0 while it waits."""

    plan: Plan
    cost: RunCost
    state: State
    asked_at: int
    decided_at: int = 0

    @property
    def run_uid(self) -> str:
        """The run's name."""
        return self.plan.run_uid


def plan_of(
    run: RunConfig, *, run_uid: str, base_digest: str, coordinator: str, max_rank: int
) -> Plan:
    """Return the plan that a task belongs to, the same for a run's describe and all its tasks.

    run: the task's settings. coordinator: the key that signed the task. max_rank: policy.max-rank,
    above which the coordinator is never answered.
    """
    settings = {k: v for k, v in run.for_sites().items() if k not in SET_BY_ROUND}
    return Plan(run_uid, coordinator, base_digest, min(run.lora.rank, max_rank), settings)


class Approvals:
    """The folder of requests, safe for several processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def check(self, plan: Plan, *, cost: Callable[[], RunCost]) -> None:
        """Return when the hospital approved this plan; file it durably the first time it is asked.

        cost: computed only then.
        Raises ApprovalError while it waits, PolicyError when it was declined, when the run was filed with
        another plan, or when too many requests wait already.
        """
        request = self._read(plan.run_uid) or self._file(plan, cost())
        _check_same(request.plan, plan)
        if request.state == "declined":
            raise PolicyError(
                f"policy.approval = 'ask': this hospital declined run {plan.run_uid}; that is final"
            )
        if request.state == "waiting":
            raise ApprovalError(
                f"policy.approval = 'ask': run {plan.run_uid} waits for this hospital; see what it costs "
                f"with `consilium client approve {plan.run_uid}`"
            )

    def has_asked(self, run_uid: str) -> bool:
        """Return whether a run has been filed, whatever became of it."""
        return self._path(run_uid).exists()

    def check_steps(self, run_uid: str, *, charged_steps: int, asked_steps: int) -> None:
        """Refuse a task that would take an approved run beyond the steps it was approved for.

        charged_steps: of the run's other tasks in the ledger. asked_steps: of this one.
        Raises PolicyError.
        """
        plan = self.find(run_uid).plan
        if charged_steps + asked_steps > plan.total_steps:
            raise PolicyError(
                f"policy.approval = 'ask': run {run_uid} was approved for {plan.total_steps} steps: "
                f"{charged_steps} are charged and this task asks for {asked_steps} more; what is beyond "
                "needs a run and an approval of its own"
            )

    def approve(self, run_uid: str) -> Request:
        """Let a waiting run begin. Raises ConfigError when it never asked or was declined."""
        return self._decide(run_uid, "approved")

    def decline(self, run_uid: str) -> Request:
        """Refuse a run for good, from its next task on. Raises ConfigError when it never asked."""
        return self._decide(run_uid, "declined")

    def find(self, run_uid: str) -> Request:
        """Return a run's request. Raises ConfigError when it never asked."""
        request = self._read(run_uid)
        if request is None:
            waiting = ", ".join(other.run_uid for other in self.waiting())
            raise ConfigError(
                f"no run {run_uid} has asked this site for approval; waiting: {waiting or 'none'}"
            )
        return request

    def waiting(self) -> list[Request]:
        """Return the requests that nobody decided yet, oldest first."""
        return [request for request in self.all() if request.state == "waiting"]

    def all(self) -> list[Request]:
        """Return every request, oldest first."""
        found = [self._read(path.stem) for path in self.folder.glob("[!.]*.json")]
        requests = [request for request in found if request is not None]
        return sorted(requests, key=lambda request: (request.asked_at, request.run_uid))

    def _file(self, plan: Plan, cost: RunCost) -> Request:
        with self._locked():
            # Another process may have filed it, and the hospital decided, while the cost was computed.
            standing = self._read(plan.run_uid)
            if standing is not None:
                return standing
            theirs = sum(item.plan.coordinator == plan.coordinator for item in self.waiting())
            if theirs >= MAX_WAITING:
                raise PolicyError(
                    f"policy.approval = 'ask': {MAX_WAITING} runs of this coordinator wait for this hospital "
                    "already; approve or decline some with `consilium client approve`"
                )
            return self._write(Request(plan, cost, "waiting", int(time.time())))

    def _decide(self, run_uid: str, state: State) -> Request:
        with self._locked():
            request = self.find(run_uid)
            if request.state == state:
                return request
            if request.state == "declined":
                raise ConfigError(
                    f"run {run_uid} was declined, which is final; its coordinator may begin a new run"
                )
            return self._write(replace(request, state=state, decided_at=int(time.time())))

    def _read(self, run_uid: str) -> Request | None:
        path = self._path(run_uid)
        try:
            return _request(from_canonical(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError):
            raise ConfigError(
                f"{path} is damaged; restore it, or remove it and the run asks again"
            ) from None

    def _write(self, request: Request) -> Request:
        content = {
            "plan": _plan_tree(request.plan),
            "cost": asdict(request.cost),
            "state": request.state,
            "asked_at": request.asked_at,
            "decided_at": request.decided_at,
        }
        write_atomically(self._path(request.run_uid), canonical_json(content), mode=0o600)
        return request

    def _path(self, run_uid: str) -> Path:
        return self.folder / f"{check_run_uid(run_uid)}.json"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _check_same(approved: Plan, asked: Plan) -> None:
    """A lower rank than the approved one asks for less; anything else is another plan."""
    before, now = _plan_tree(approved), _plan_tree(asked)
    before, now = {**before, **before["settings"]}, {**now, **now["settings"]}
    differ = sorted(
        key
        for key in before.keys() | now.keys()
        if key not in ("settings", "max_rank") and before.get(key) != now.get(key)
    )
    if asked.max_rank > approved.max_rank:
        differ.append("lora.rank")
    if differ:
        raise PolicyError(
            f"policy.approval = 'ask': run {asked.run_uid} was filed for approval with other settings "
            f"({', '.join(differ)} differ); "
            "its coordinator must begin a new run for those"
        )


def _plan_tree(plan: Plan) -> dict[str, Any]:
    return {
        "run_uid": plan.run_uid,
        "coordinator": plan.coordinator,
        "base_digest": plan.base_digest,
        "max_rank": plan.max_rank,
        "settings": dict(plan.settings),
    }


def _request(content: Any) -> Request:
    state = content["state"]
    if state not in ("waiting", "approved", "declined"):
        raise ValueError(state)
    return Request(
        plan=Plan(**content["plan"]),
        cost=RunCost(**content["cost"]),
        state=state,
        asked_at=content["asked_at"],
        decided_at=content["decided_at"],
    )
