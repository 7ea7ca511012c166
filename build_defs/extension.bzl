"""The repositories of repositories.bzl for Bazel 7 and newer (see MODULE.bazel; untested)."""

load(":repositories.bzl", "machine_repositories")

def _machine_impl(_ctx):
    machine_repositories()

machine = module_extension(implementation = _machine_impl)
