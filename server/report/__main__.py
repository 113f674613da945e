"""`python -m server.report RUN_DIR VERSION`: a page that is served, to standard output.

A process of its own, so that who serves reports for weeks never holds what draws them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from common.errors import ConsiliumError
from server.report.page import run_page
from server.report.reading import read_run

if __name__ == "__main__":
    # The run itself comes first.
    os.nice(10)
    try:
        sys.stdout.write(run_page(read_run(Path(sys.argv[1])), version=sys.argv[2]))
    except ConsiliumError as error:
        sys.exit(str(error))
