"""Prints as JSON where nvcc is: `probe_nvcc.py <folder of toolchain.py>`."""

import glob
import json
import os
import re
import subprocess
import sys

sys.path.insert(0, sys.argv[1])
import toolchain


def toolkit(nvcc):
    """The folder of the toolkit, which nvcc itself knows: the program may be a link or a script."""
    done = subprocess.run(
        [nvcc, "--dryrun", "-c", "x.cu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    here = re.search(r"_HERE_=(.*)", done.stdout)
    return os.path.dirname(os.path.realpath(here.group(1).strip())) if here else ""


found = toolchain.find_nvcc()
root = toolkit(found[0]) if found else ""
libraries = []
if root:
    for folder in ("lib64", "lib", "targets/*/lib"):
        libraries += glob.glob(os.path.join(root, folder, "libcudart_static.a"))
if libraries:
    print(json.dumps({"nvcc": found[0], "root": root, "cudart_static": libraries[0]}))
else:
    print(json.dumps({"nvcc": "", "root": "", "cudart_static": ""}))
