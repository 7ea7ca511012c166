"""Compiles CUDA sources: one nvcc action for each, their objects in one cc_library."""

load("@jax_flashmla_cuda//:found.bzl", "NVCC")
load("@jax_flashmla_python//:found.bzl", "FOUND")
load("@rules_cc//cc:defs.bzl", "cc_library")
load(":native.bzl", "NATIVE")

# Whether targets with kernels are built where neither --config=cuda nor --config=nocuda says so.
HAVE_CUDA = bool(NVCC and FOUND["cutlass"] and FOUND["nanobind"])

def native_sources(*kinds):
    """The labels of the manifest's sources of these kinds."""
    sources = [source for kind in kinds for source in NATIVE[kind]]
    return ["//%s:%s" % (folder, name) for folder, _, name in [source.rpartition("/") for source in sources]]

def _nvcc_objects_impl(ctx):
    if not NVCC:
        fail("jax_flashmla: no nvcc 12.4 or newer: install the CUDA toolkit and set CUDA_HOME, or " +
             "build with --config=nocuda")
    if not FOUND["cutlass"] or not FOUND["nanobind"]:
        fail("jax_flashmla: the Python environment lacks CUTLASS or nanobind: run `pip install nvidia-cutlass nanobind` in it, or build with --config=nocuda")
    headers = ctx.attr.headers[CcInfo].compilation_context.headers
    objects = []
    for source in ctx.files.srcs:
        out = ctx.actions.declare_file("%s/%s.pic.o" % (ctx.label.name, source.basename))
        ctx.actions.run(
            executable = FOUND["interpreter"],
            arguments = [ctx.file._strict_nvcc.path, NVCC, "-O3", "-DNDEBUG", "-Xcompiler=-fPIC"] +
                        NATIVE["nvcc_flags"] + ["-I" + ctx.label.workspace_root if ctx.label.workspace_root else "-I."] +
                        ["-isystem", FOUND["cutlass"], "-c", source.path, "-o", out.path],
            inputs = depset([source, ctx.file._strict_nvcc], transitive = [headers]),
            outputs = [out],
            mnemonic = "Nvcc",
            progress_message = "Compiling %s" % source.short_path,
            use_default_shell_env = True,
        )
        objects.append(out)
    return [DefaultInfo(files = depset(objects))]

_nvcc_objects = rule(
    implementation = _nvcc_objects_impl,
    attrs = {
        "headers": attr.label(providers = [CcInfo]),
        "srcs": attr.label_list(allow_files = [".cu"]),
        "_strict_nvcc": attr.label(default = "//tools:strict_nvcc.py", allow_single_file = True),
    },
)

def cuda_library(name, kernels, headers, srcs = [], hdrs = [], **kwargs):
    """A cc_library of CUDA sources, and C++ sources beside them.

    Args:
      name: of the library.
      kernels: `.cu` files.
      headers: a cc_library of all headers that they include, but CUTLASS's.
      srcs: C++ sources.
      hdrs: public headers.
      **kwargs: of the library.
    """
    _nvcc_objects(
        name = name + "_objects",
        srcs = kernels,
        headers = headers,
        tags = ["manual"],
    )
    cc_library(
        name = name,
        srcs = srcs + [":" + name + "_objects"],
        hdrs = hdrs,
        alwayslink = True,
        copts = NATIVE["cxx_flags"],
        deps = [headers],
        **kwargs
    )
