"""The one evaluation of each run: which task it was, and, once counted, what it gave.

One file a run, state/evaluations/<run_uid>. What was given is kept: counted anew after the records changed,
the difference would tell of those that came or went. policy.max-evaluations bounds how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client.policy import check_run_uid
from common.canonical import canonical_json, from_canonical
from common.errors import ConfigError, PolicyError
from common.files import write_atomically
from common.records import Task


class Evaluations:
    """The folder. Noting and keeping are for one task at a time; finding is safe at any.

    most: how many runs may have one, in all.
    """

    def __init__(self, folder: Path, *, most: int) -> None:
        self._folder = folder
        self._most = most

    def find(self, task: Task) -> dict[str, float] | None:
        """Return what a task's evaluation gave, None before it was counted.

        Raises PolicyError when another task was its run's one, or no further run may have one; ConfigError
        when the file is damaged.
        """
        content = self._read(task)
        if content is None:
            self._check_room()
            return None
        if content["task_id"] != task.task_id:
            raise PolicyError(
                f"run {task.run_uid} was evaluated here before, and once is all that a run gets: sums over "
                "the same records under many adapters would tell of single ones"
            )
        numbers = content["numbers"]
        return None if numbers is None else dict(numbers)

    def note(self, task: Task) -> None:
        """Write down durably, before any record is read, that this is its run's one evaluation."""
        self._write(task, None)

    def keep(self, task: Task, numbers: Mapping[str, float]) -> None:
        """Write down durably, before they leave, the numbers that a task gets however often it is asked."""
        self._write(task, numbers)

    def _check_room(self) -> None:
        done = sum(1 for _ in self._folder.glob("[!.]*"))
        if done >= self._most:
            raise PolicyError(
                f"policy.max-evaluations = {self._most}: {done} runs were evaluated here, each of "
                "which told a little of the same records; raise that line if one more may"
            )

    def _read(self, task: Task) -> dict[str, Any] | None:
        path = self._path(task)
        try:
            content = from_canonical(path.read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict) or set(content) != {"task_id", "numbers"}:
            raise ConfigError(f"{path} is damaged; put its backup there. Its run is not evaluated")
        return content

    def _write(self, task: Task, numbers: Mapping[str, float] | None) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        content = {"task_id": task.task_id, "numbers": None if numbers is None else dict(numbers)}
        write_atomically(self._path(task), canonical_json(content), mode=0o600)

    def _path(self, task: Task) -> Path:
        return self._folder / check_run_uid(task.run_uid)
