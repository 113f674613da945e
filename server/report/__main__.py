"""`python -m server.report RUN_DIR`: a live page to standard output, from a process that ends with it.

So that who serves reports for weeks never holds what draws them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from common.errors import ConsiliumError
from server.report.page import run_page
from server.report.reading import read_run

if __name__ == "__main__":
    try:
        sys.stdout.write(run_page(read_run(Path(sys.argv[1])), live=True))
    except ConsiliumError as error:
        sys.exit(str(error))
