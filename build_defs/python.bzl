"""Tests under pytest, with the packages of the Python environment."""

load("@rules_python//python:defs.bzl", "py_binary", "py_test")

# A Label, since macros are also called from other workspaces.
_MAIN = Label("//build_defs:with_packages.py")

def pytest_test(name, src, deps = [], args = [], **kwargs):
    """Runs one test file under pytest.

    Args:
      name: of the target.
      src: the file.
      deps: libraries that it imports.
      args: more of pytest's arguments.
      **kwargs: of the py_test.
    """
    py_test(
        name = name,
        srcs = [_MAIN, src],
        args = ["pytest", "$(rootpath %s)" % src] + args,
        main = _MAIN,
        python_version = "PY3",
        deps = deps + ["@jax_flashmla_python//:paths"],
        **kwargs
    )

def python_program(name, module, deps = [], **kwargs):
    """Runs a module as `python -m` does.

    Args:
      name: of the target.
      module: its dotted name.
      deps: the library that has it, and what it imports.
      **kwargs: of the py_binary.
    """
    py_binary(
        name = name,
        srcs = [_MAIN],
        args = ["module", module],
        main = _MAIN,
        python_version = "PY3",
        deps = deps + ["@jax_flashmla_python//:paths"],
        **kwargs
    )
