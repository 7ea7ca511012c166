"""Prints as JSON what a Python environment has for a build. Imports none of it."""

import importlib.util
import json
import os
import sys
import sysconfig


def folder(package, *parts):
    """A folder inside an installed package; empty if there is none."""
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations or []) if spec else []:
        path = os.path.join(root, *parts)
        if os.path.isdir(path):
            return path
    return ""


base = os.path.join(sys.base_prefix, "bin", "python{}.{}".format(*sys.version_info[:2]))
print(
    json.dumps(
        {
            # Not a virtual environment's own: an editable installation in it would shadow Bazel's.
            "interpreter": base if os.path.exists(base) else sys.executable,
            "paths": sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}),
            "python_headers": sysconfig.get_path("include"),
            "jaxlib": folder("jaxlib", "include"),
            "nanobind": folder("nanobind"),
            "cutlass": folder("cutlass_library", "source", "include"),
        }
    )
)
