"""Meshes of 8 CPU devices, and what compiled programs exchange on them."""

import re

import jax
import numpy as np
from absl.testing import parameterized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests import problems

COLLECTIVES = re.compile(
    r"= .*? (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def make_mesh(shape, names, axis_type=AxisType.Auto):
    return jax.make_mesh(
        shape, names, axis_types=(axis_type,) * len(shape), devices=jax.devices("cpu")
    )


def collectives(compiled):
    return sorted(COLLECTIVES.findall(compiled.as_text()))


def put(mesh, arrays, specs):
    pairs = zip(arrays, specs, strict=True)
    return [jax.device_put(x, jax.NamedSharding(mesh, P(*spec))) for x, spec in pairs]


class MeshTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        if len(jax.devices("cpu")) < 8:
            self.skipTest("needs 8 CPU devices: run it with pytest")
        self.enterContext(jax.default_device(jax.devices("cpu")[0]))
        self.rng = np.random.default_rng()

    def draw_pools(self, count):
        """Problems of equal shapes, to be stacked: a page pool for each group."""
        return [
            problems.make_problem(self.rng, self.rng.permutation([3, 0, 300, 64]))
            for _ in range(count)
        ]

    def assert_close(self, got, want):
        np.testing.assert_allclose(np.asarray(got[0], np.float32), want[0], atol=2e-2)
        np.testing.assert_allclose(got[1], want[1], atol=1e-4, rtol=1e-5)
