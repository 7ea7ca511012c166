"""8 CPU devices for the tests of meshes."""

import jax

# Before any test starts a backend; of no effect on GPUs.
jax.config.update("jax_num_cpu_devices", 8)
