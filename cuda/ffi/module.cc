// The Python module jax_flashmla._native: handlers as capsules, versions, and benchmark timers.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>

#include "cuda/bench/bindings.h"
#include "cuda/ffi/handlers.h"

namespace nb = nanobind;

namespace {

nb::capsule to_capsule(XLA_FFI_Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("handlers", [] {
    nb::dict handlers;
    handlers["plan"] = to_capsule(jax_flashmla_plan);
    handlers["decode"] = to_capsule(jax_flashmla_decode);
    return handlers;
  });
  m.def("ffi_version", [] { return std::make_pair(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
  m.def("cuda_version",
        [] { return std::make_pair(CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10); });
  nb::module_ bench = m.def_submodule("bench", "Timers for benchmarks/: launches without XLA.");
  jax_flashmla::bind_benchmarks(bench);
}
