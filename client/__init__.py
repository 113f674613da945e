"""What runs at a hospital: the relay that Flower starts, and the site that owns data and keys."""

from pathlib import Path

import common

# Flower unpacks the app bundle ahead of site-packages: code of one release must never meet another's.
if Path(common.__file__).resolve().parent.parent != Path(__file__).resolve().parent.parent:
    raise ImportError(
        f"client ({Path(__file__).parent}) and common ({Path(common.__file__).parent}) are not from "
        "the same folder; start it with the release's own environment"
    )
