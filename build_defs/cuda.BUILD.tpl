load("@rules_cc//cc:defs.bzl", "cc_library")

package(default_visibility = ["//visibility:public"])

cc_library(
    name = "runtime",
    srcs = glob(["lib/libcudart_static.a"], allow_empty = True),
    hdrs = glob(["include/**/*.h", "include/**/*.hpp", "include/crt/**"], allow_empty = True),
    includes = ["include"],
    linkopts = ["-ldl", "-lpthread", "-lrt"],
)
