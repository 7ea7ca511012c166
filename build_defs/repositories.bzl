"""What the targets need from this machine, as repositories: nothing is downloaded.

A workspace that depends on this one calls `jax_flashmla_repositories()` in its WORKSPACE.
"""

def _fail(sentence):
    fail("jax_flashmla: " + sentence)

def _python_environment_impl(ctx):
    choice = ctx.os.environ.get("JAX_FLASHMLA_PYTHON", "")
    venv = ctx.path(str(ctx.path(Label("//:WORKSPACE")).dirname) + "/.venv/bin/python")
    python = choice or (str(venv) if venv.exists else str(ctx.which("python3") or ""))
    if not python:
        _fail("no Python environment: run `make test` in jax_flashmla's folder, which makes .venv, " +
              "or set JAX_FLASHMLA_PYTHON to a Python that has jax.")
    probe = ctx.execute([python, ctx.path(Label("//build_defs:probe.py"))])
    if probe.return_code != 0:
        _fail("%s does not run: set JAX_FLASHMLA_PYTHON to a Python 3.11 or newer that has jax.\n%s" %
              (python, probe.stderr))
    found = json.decode(probe.stdout)
    if not found["jaxlib"]:
        _fail("no jaxlib in %s: run `make test` in jax_flashmla's folder, which makes .venv, or `%s -m pip install jax`." %
              (python, python))
    for name in ("jaxlib", "nanobind", "cutlass", "python_headers"):
        if found[name]:
            ctx.symlink(found[name], name)
    ctx.file("paths.py", "PATHS = %s\n" % repr(found["paths"]))
    ctx.file("found.bzl", "FOUND = %s\n" % repr(found))
    ctx.template("BUILD", Label("//build_defs:python.BUILD.tpl"), {"%{interpreter}": found["interpreter"]})

_python_environment = repository_rule(
    implementation = _python_environment_impl,
    environ = ["JAX_FLASHMLA_PYTHON", "PATH"],
    local = True,
    configure = True,
)

def _cuda_toolkit_impl(ctx):
    python = str(ctx.which("python3") or "python3")
    probe = ctx.execute([python, ctx.path(Label("//build_defs:probe_nvcc.py")), ctx.path(Label("//tools:toolchain.py")).dirname])
    found = json.decode(probe.stdout) if probe.return_code == 0 else {"nvcc": "", "root": ""}
    if found["root"]:
        ctx.symlink(found["root"] + "/include", "include")
        ctx.symlink(found["cudart_static"], "lib/libcudart_static.a")
    ctx.file("found.bzl", "NVCC = %r\n" % found["nvcc"])
    ctx.template("BUILD", Label("//build_defs:cuda.BUILD.tpl"))

_cuda_toolkit = repository_rule(
    implementation = _cuda_toolkit_impl,
    environ = ["CUDACXX", "CUDA_HOME", "PATH"],
    local = True,
    configure = True,
)

# Bazel 4 downloads these by itself, for rules that it has built in. Repositories with their names,
# defined first, stop that, and let BUILD files carry the load lines that newer versions want.
_SHIMS = {
    "rules_cc": {"cc/defs.bzl": ["cc_binary", "cc_import", "cc_library", "cc_test", "cc_toolchain", "cc_toolchain_suite"]},
    "rules_java": {"java/defs.bzl": ["java_binary", "java_import", "java_library", "java_package_configuration", "java_plugin", "java_runtime", "java_test", "java_toolchain"]},
    "rules_python": {"python/defs.bzl": ["py_binary", "py_library", "py_runtime", "py_runtime_pair", "py_test"]},
    "remote_coverage_tools": {},
    "rules_proto": {},
}

def _shim_impl(ctx):
    ctx.file("BUILD", 'filegroup(name = "coverage_report_generator", visibility = ["//visibility:public"])\n')
    for path, names in _SHIMS[ctx.name].items():
        lines = ["%s = native.%s" % (name, name) for name in names if name != "py_runtime_pair"]
        if "py_runtime_pair" in names:
            lines.insert(0, 'load("@bazel_tools//tools/python:toolchain.bzl", _pair = "py_runtime_pair")\n\npy_runtime_pair = _pair')
        ctx.file(path.split("/")[0] + "/BUILD")
        ctx.file(path, "\n".join(lines) + "\n")

_shim = repository_rule(implementation = _shim_impl)

def machine_repositories():
    """Defines what is found on this machine."""
    _python_environment(name = "jax_flashmla_python")
    _cuda_toolkit(name = "jax_flashmla_cuda")

def jax_flashmla_repositories():
    """Defines the repositories that jax_flashmla's targets use, where they are not defined yet."""
    for name in _SHIMS:
        if not native.existing_rule(name):
            _shim(name = name)
    machine_repositories()
    native.register_toolchains("@jax_flashmla_python//:toolchain")
