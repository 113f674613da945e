"""Python runs this file when it starts, if its folder is on PYTHONPATH: see tests/chaos/points.py."""

import importlib.util
import os
import sys

if os.environ.get("CONSILIUM_CHAOS"):
    _file = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "points.py")
    _spec = importlib.util.spec_from_file_location("consilium_chaos_points", _file)
    assert _spec is not None
    assert _spec.loader is not None
    _points = importlib.util.module_from_spec(_spec)
    # dataclasses look their own module up.
    sys.modules[_spec.name] = _points
    _spec.loader.exec_module(_points)
    _points.install()
