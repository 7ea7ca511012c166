"""Runs nvcc and fails where ptxas says that it serialises wgmma, which it reports as a remark.

CMake puts it before the compiler's command line. Spills and local memory are warnings, which the
compiler's own options make errors.
"""

import subprocess
import sys


def main():
    done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    sys.stdout.write(done.stdout)
    if done.returncode == 0 and "Potential Performance Loss" in done.stdout:
        sys.exit("error: a kernel would run slower than it was written, see above")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
