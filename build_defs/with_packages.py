"""Runs `pytest FILE [ARGUMENT...]` or `module NAME [ARGUMENT...]` with the environment's packages.

They come after Bazel's own files on the path, and no .pth file is read: an editable installation
of this package would otherwise take the place of Bazel's.
"""

import runpy
import sys

from jax_flashmla_python.paths import PATHS


def main():
    """Runs what the arguments name."""
    sys.path.extend(PATHS)
    kind, name, *arguments = sys.argv[1:]
    import jax_flashmla

    if "runfiles" not in jax_flashmla.__file__:
        sys.exit(f"jax_flashmla is imported from {jax_flashmla.__file__}, not from Bazel's files")
    if kind == "pytest":
        import pytest

        sys.exit(
            pytest.main(
                [name, "--import-mode=importlib", "-ra", "-p", "no:cacheprovider", *arguments]
            )
        )
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
