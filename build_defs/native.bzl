"""What the native code consists of. Bazel loads this file; CMake reads the JSON in it (see
CMakeLists.txt), so it must stay strict JSON from the first brace on: no comments, no trailing commas.

kernels: CUDA sources; launchers: C++ sources beside them, no XLA in either. module: the Python
module's; handlers: the XLA FFI handlers, which are part of it.
"""

NATIVE = {
  "kernels": [
    "cuda/plan.cu",
    "cuda/decode_split.cu",
    "cuda/decode_narrow.cu",
    "cuda/decode_fp8.cu",
    "cuda/decode_combine.cu"
  ],
  "launchers": [
    "cuda/tensor_map.cc"
  ],
  "handlers": [
    "cuda/ffi/plan_handler.cc",
    "cuda/ffi/decode_handler.cc"
  ],
  "module": [
    "cuda/ffi/module.cc",
    "cuda/bench/bindings.cc",
    "cuda/bench/graph_timer.cc"
  ],
  "bench_kernels": [
    "cuda/bench/load_floor.cu"
  ],
  "cxx_flags": [
    "-std=c++20",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror"
  ],
  "nvcc_flags": [
    "-std=c++20",
    "-gencode=arch=compute_90a,code=sm_90a",
    "--expt-relaxed-constexpr",
    "-lineinfo",
    "-Werror=all-warnings",
    "-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage",
    "-Xcompiler=-Wall,-Wextra,-fvisibility=hidden"
  ]
}
