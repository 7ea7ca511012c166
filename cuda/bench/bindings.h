#pragma once

#include <nanobind/nanobind.h>

namespace jax_flashmla {

// Adds the timers to `module`.
void bind_benchmarks(nanobind::module_& module);

}  // namespace jax_flashmla
