// The XLA FFI handlers, by the operation names that jax_flashmla/native.py registers.
#pragma once

#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error* jax_flashmla_plan(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* jax_flashmla_decode(XLA_FFI_CallFrame* call_frame);
}
