"""The programs of `benchmarks.sharded`, through XLA on CPU devices."""

import functools
from unittest import mock

import jax
import pytest
from absl.testing import absltest

pytest.importorskip("rich", reason="the benchmarks print with rich")
from benchmarks import sharded
from jax_flashmla import flash_mla_with_kvcache
from tests.meshes import MeshTest, make_mesh


class ShardedBenchmarkTest(MeshTest):
    def test_rows(self):
        mesh = make_mesh((4,), ("x",))
        decode = functools.partial(flash_mla_with_kvcache, implementation="xla")
        part = sharded.context_parallel.decode

        def part_through_xla(*args, **options):
            return part(*args, **options | {"implementation": "xla"})

        with (
            mock.patch.multiple(sharded, LAYERS=2, ROUNDS=2, CALLS=2, LONG=1024, decode=decode),
            mock.patch.object(sharded.context_parallel, "decode", part_through_xla),
        ):
            rows = [
                sharded.measure(mesh, "heads", sharded.share_heads(mesh, 2, 16, 128)),
                sharded.measure(mesh, "sequences", sharded.share_sequences(mesh, 8, 16, 128)),
                sharded.measure(mesh, "keys", sharded.share_keys(mesh, 16)),
            ]
        for row in rows:
            self.assertLen(row["all_gpus_us"]["samples"], 2)
        self.assertIn("efficiency", rows[1])
        self.assertIn("speedup", rows[2])

    def test_chained_donates(self):
        q = jax.numpy.ones((2, 3))
        run = sharded.chained(lambda q, x: q + x, q, 1.0)
        first = run()
        second = run()
        self.assertTrue(first.is_deleted())
        self.assertFalse(q.is_deleted())
        self.assertEqual(float(second[0, 0]), 3)


if __name__ == "__main__":
    absltest.main()
