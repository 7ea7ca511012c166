load("@rules_cc//cc:defs.bzl", "cc_library")
load("@rules_python//python:defs.bzl", "py_library", "py_runtime", "py_runtime_pair")

package(default_visibility = ["//visibility:public"])

py_runtime(
    name = "runtime",
    interpreter_path = "%{interpreter}",
    python_version = "PY3",
)

py_runtime_pair(
    name = "runtime_pair",
    py3_runtime = ":runtime",
)

toolchain(
    name = "toolchain",
    toolchain = ":runtime_pair",
    toolchain_type = "@bazel_tools//tools/python:toolchain_type",
)

# `paths.py`: where the environment's packages are.
py_library(
    name = "paths",
    srcs = ["paths.py"],
)

cc_library(
    name = "xla_ffi_headers",
    hdrs = glob(["jaxlib/xla/ffi/api/**"]),
    includes = ["jaxlib"],
)

cc_library(
    name = "python_headers",
    hdrs = glob(["python_headers/**/*.h"]),
    includes = ["python_headers"],
)

cc_library(
    name = "nanobind",
    srcs = glob(["nanobind/src/nb_combined.cpp"], allow_empty = True),
    hdrs = glob(["nanobind/include/**", "nanobind/src/*.h"], allow_empty = True),
    copts = ["-std=c++17", "-fvisibility=hidden", "-fno-strict-aliasing", "-w"],
    defines = ["NB_COMPACT_ASSERTIONS"],
    includes = ["nanobind/ext/robin_map/include", "nanobind/include"],
    textual_hdrs = glob(["nanobind/src/*.cpp", "nanobind/ext/**/*.h"], allow_empty = True),
    deps = [":python_headers"],
)
