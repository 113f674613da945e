"""Python runs this file when it starts, if its folder is on PYTHONPATH: test code in every process.

Each variable names a folder that the file beside it works by; without it, nothing is loaded.
"""

import importlib.util
import os
import sys

_TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
for _variable, _file in (
    ("CONSILIUM_CHAOS", "chaos/points.py"),
    ("CONSILIUM_MARKS", "bench/marks.py"),
):
    if os.environ.get(_variable):
        _name = "consilium_" + os.path.basename(_file).removesuffix(".py")
        _spec = importlib.util.spec_from_file_location(_name, os.path.join(_TESTS, _file))
        assert _spec is not None
        assert _spec.loader is not None
        _module = importlib.util.module_from_spec(_spec)
        # dataclasses look their own module up.
        sys.modules[_name] = _module
        _spec.loader.exec_module(_module)
        _module.install()
