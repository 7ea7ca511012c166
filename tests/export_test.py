"""Programs that outlive their process: exports, and the persistent compilation cache."""

import functools
import os
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jax_flashmla import append_kv_cache, flash_mla_with_kvcache, get_mla_metadata, native
from tests import oracle, problems, support

ROOT = pathlib.Path(__file__).parent.parent

CALL_AN_EXPORT = """
import sys, jax, jax.export, numpy as np
import jax_flashmla  # registers the kernels
folder = sys.argv[1]
operands = [np.load(f"{folder}/{i}.npy") for i in range(4)]
q, k_cache = (x.view(jax.numpy.bfloat16) for x in operands[:2])
with open(f"{folder}/program", "rb") as file:
    program = jax.export.deserialize(bytearray(file.read()))
out, lse = program.call(q, k_cache, *operands[2:])
np.savez(f"{folder}/results.npz", out=np.asarray(out, np.float32), lse=lse)
"""

COMPILE_WITH_A_CACHE = """
import collections, sys, jax, jax.numpy as jnp
from jax import monitoring
from jax.sharding import AxisType, PartitionSpec as P
from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
if sys.argv[2] == "automatic":
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
events = collections.Counter()
monitoring.register_event_listener(lambda name, **_: events.update([name.split("/")[-1]]))

@jax.jit
def step(q, k_cache, block_table, cache_seqlens):
    metadata = get_mla_metadata(cache_seqlens, 4, 1)
    return flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, 512, *metadata)

shapes = (2, 1, 4, 576), (6, 64, 1, 576), (2, 3), (2,)
dtypes = jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.int32
devices = jax.devices("cpu")[: 1 if sys.argv[2] == "one device" else 2]
axis_type = AxisType.Explicit if sys.argv[2] == "explicit" else AxisType.Auto
mesh = jax.make_mesh((len(devices),), ("x",), axis_types=(axis_type,), devices=devices)
with jax.set_mesh(mesh):
    specs = P(None, None, "x"), P(), P(), P()
    args = [
        jax.ShapeDtypeStruct(*x[:2], sharding=jax.NamedSharding(mesh, x[2]))
        for x in zip(shapes, dtypes, specs)
    ]
    step.lower(*args).compile()
print("hits", events["cache_hits"], "misses", events["cache_misses"])
"""


def run_child(script, *args):
    """Runs a script in another process; returns what it printed."""
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    paths = [str(ROOT), *sys.path] if native.module is None else sys.path
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, args)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode != 0:
        raise AssertionError(done.stderr)
    return done.stdout


def step(q, k_cache, block_table, cache_seqlens, implementation="xla"):
    metadata = get_mla_metadata(
        cache_seqlens, q.shape[-3] * q.shape[-2], 1, num_sms=16, implementation=implementation
    )
    return flash_mla_with_kvcache(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        512,
        *metadata,
        causal=True,
        implementation=implementation,
    )


def symbolic_operands(problem):
    """Types of a problem's operands for any batch, pool and table."""
    shapes = "b, _, _, _", "n, _, _, _", "b, m", "b"
    return jax.export.symbolic_args_specs(problem.arrays, shapes)


class ExportTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
        self.rng = np.random.default_rng()

    def assert_close(self, got, problem):
        want = oracle.decode(*problem.arrays, causal=True)
        np.testing.assert_allclose(np.asarray(got[0], np.float32), want[0], atol=2e-2)
        np.testing.assert_allclose(got[1], want[1], atol=1e-4, rtol=1e-5)

    def test_several_platforms(self):
        problem = problems.make_problem(self.rng, [3, 0, 200, 64])
        exported = jax.export.export(jax.jit(step), platforms=["cpu", "cuda"])(*problem.arrays)
        loaded = jax.export.deserialize(exported.serialize())
        self.assert_close(loaded.call(*problem.arrays), problem)

    def test_any_batch(self):
        # For all sizes that serving varies: sequences, pages of the pool, pages of a sequence.
        problem = problems.make_problem(self.rng, [3, 65], s_q=2)
        exported = jax.export.export(jax.jit(step))(*symbolic_operands(problem))
        loaded = jax.export.deserialize(exported.serialize())
        for lengths in ([70], [3, 0, 200, 64], self.rng.integers(0, 500, 40)):
            problem = problems.make_problem(self.rng, lengths, s_q=2)
            self.assert_close(loaded.call(*problem.arrays), problem)

    def test_any_batch_on_an_accelerator(self):
        # Which walks the pages in other steps. That it lowers is what can be seen anywhere.
        problem = problems.make_problem(self.rng, [3, 65])
        exported = jax.export.export(jax.jit(step), platforms=["cuda"])(*symbolic_operands(problem))
        self.assertEqual(exported.platforms, ("cuda",))

    def test_any_batch_of_an_append(self):
        problem = problems.make_problem(self.rng, [3, 65])
        new_kv = np.ones((2, 1, 1, 576), jnp.bfloat16)
        args = problem.k_cache, new_kv, *problem.arrays[2:]
        types = jax.export.symbolic_args_specs(args, ("n, ...", "b, _, _, _", "b, m", "b"))
        exported = jax.export.export(jax.jit(append_kv_cache))(*types)
        loaded = jax.export.deserialize(exported.serialize())
        for lengths in ([70], [3, 0, 200, 64]):
            problem = problems.make_problem(self.rng, lengths)
            new_kv = np.ones((len(lengths), 1, 1, 576), jnp.bfloat16)
            args = problem.k_cache, new_kv, *problem.arrays[2:]
            support.assert_same_bits(loaded.call(*args), append_kv_cache(*args))

    @parameterized.parameters("b, m, _, _", "b, 16*m, _, _")
    def test_unpaged_cache_of_any_length(self, cache):
        def decode(q, k_cache, lengths):
            return flash_mla_with_kvcache(
                q, k_cache, None, lengths, causal=True, implementation="xla"
            )

        problem = problems.make_unpaged_problem(self.rng, [3, 16], 16)
        args = problem.q, problem.k_cache, problem.cache_seqlens
        types = jax.export.symbolic_args_specs(args, ("b, _, _, _", cache, "b"))
        exported = jax.export.export(jax.jit(decode), platforms=["cpu", "cuda"])(*types)
        loaded = jax.export.deserialize(exported.serialize())
        for lengths, max_len in (([80], 80), ([3, 0, 200, 64], 208)):
            problem = problems.make_unpaged_problem(self.rng, lengths, max_len)
            got = loaded.call(problem.q, problem.k_cache, problem.cache_seqlens)
            self.assert_close(got, problem)

    @parameterized.parameters(False, True)
    def test_kernels(self, symbolic):
        problem = problems.make_problem(self.rng, [3, 0, 200, 64])
        operands = symbolic_operands(problem) if symbolic else problem.arrays
        targets = [native.FFI_TARGETS[name] for name in ("plan", "decode")]
        checks = [jax.export.DisabledSafetyCheck.custom_call(target) for target in targets]
        # Exported on a machine without a GPU, too.
        with mock.patch.object(native, "why_no_kernel", return_value=None):
            exported = jax.export.export(
                jax.jit(functools.partial(step, implementation="cuda")),
                platforms=["cuda"],
                disabled_checks=checks,
            )(*operands)
        for target in targets:
            self.assertEqual(exported.mlir_module().count(f"@{target}("), 1)

    def test_in_another_process(self):
        problem = problems.make_problem(self.rng, [3, 0, 200, 64])
        exported = jax.export.export(jax.jit(step), platforms=["cpu"])(*symbolic_operands(problem))
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder)
            (path / "program").write_bytes(exported.serialize())
            for i, x in enumerate(problem.arrays):
                np.save(path / f"{i}.npy", x.view(np.uint16) if i < 2 else x)
            run_child(CALL_AN_EXPORT, folder)
            results = np.load(path / "results.npz")
            self.assert_close((results["out"], results["lse"]), problem)


class CompilationCacheTest(parameterized.TestCase):
    @parameterized.parameters("one device", "explicit", "automatic")
    def test_another_process_compiles_nothing(self, devices):
        with tempfile.TemporaryDirectory() as folder:
            first = run_child(COMPILE_WITH_A_CACHE, folder, devices)
            self.assertEqual(first.split()[:2], ["hits", "0"])
            second = run_child(COMPILE_WITH_A_CACHE, folder, devices)
            self.assertEqual(second.split()[2:], ["misses", "0"])
            self.assertGreater(int(second.split()[1]), 0)


if __name__ == "__main__":
    absltest.main()
