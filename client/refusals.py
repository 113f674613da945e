"""What the log holds of tasks not let in: of those that nobody believed signed, so many a minute and a count.

Whoever carries messages here needs no key to send rubbish, and every line costs disk that is never freed.
What a believed coordinator signed and is refused all the same (another site's, an old protocol) always has
its line: rubbish must not hide it.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections.abc import Callable

from client.replies import in_words
from common.audit_log import AuditLog
from common.errors import AuditError, ProtocolError, SignatureError

# More in a minute than people could read; of whoever signs nothing, one line says as much as another.
MAX_LINES = 60
MINUTE_S = 60.0

logger = logging.getLogger(__name__)


class Refusals:
    """What one site writes down of tasks that it does not let in.

    clock: seconds, never backwards; a test may pass another.
    """

    def __init__(self, audit: AuditLog, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._audit = audit
        self._clock = clock
        self._lock = threading.Lock()
        self._began_s = -math.inf
        self._lines = 0
        self._more = 0

    def note(self, payload: bytes, error: SignatureError | ProtocolError) -> None:
        """Write down a task that was not let in, or only count it where nobody believed signed it.

        error: a SignatureError when nobody did. Raises as AuditLog.append does.
        """
        with self._lock:
            if self._is_over():
                self._write_count()
                self._began_s, self._lines = self._clock(), 0
            if isinstance(error, SignatureError):
                if self._lines == MAX_LINES:
                    self._more += 1
                    return
                self._lines += 1
            received = hashlib.sha256(payload).hexdigest()
            self._audit.append(
                "refused", task_sha256=received, code=error.code, why=in_words(error)
            )

    def close_minute(self, *, at_once: bool = False) -> None:
        """Write how many had no line of their own, once their minute is over, or at once; never raise."""
        with self._lock:
            if not (at_once or self._is_over()):
                return
            try:
                self._write_count()
            except (AuditError, OSError) as error:
                # Counted on, and tried again: this is nobody's task, so nobody could be told.
                logger.error("audit log: %s", in_words(error))

    def _is_over(self) -> bool:
        return self._clock() - self._began_s >= MINUTE_S

    def _write_count(self) -> None:
        if self._more:
            self._audit.append(
                "refused",
                code="signature",
                why=f"{self._more} tasks more within a minute that no believed coordinator signed",
                count=self._more,
            )
            self._more = 0
