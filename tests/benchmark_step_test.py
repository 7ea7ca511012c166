"""What `benchmarks.step` makes of a profile and of its times."""

from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

pytest.importorskip("rich", reason="the benchmarks print with rich")
from benchmarks import step, timeline
from benchmarks.cases import make_case
from benchmarks.operands import make_operands
from tests.stand_ins import pretended_gpu


def event(name, begin, end):
    return SimpleNamespace(name=name, start_ns=begin * 1e3, duration_ns=(end - begin) * 1e3)


def plane(name, **lines):
    return SimpleNamespace(
        name=name,
        lines=[SimpleNamespace(name=line, events=events) for line, events in lines.items()],
    )


HOST = plane(
    "/host:CPU",
    python=[event("cuGraphLaunch (CudaGraph:3)", 0, 1), event("other", 0, 1)],
    driver=[event("cuLaunchKernel", 1, 2), event("cuLaunchKernel", 2, 3)],
)


class TimelineTest(parameterized.TestCase):
    def test_launches(self):
        counts = {"cuGraphLaunch (CudaGraph:3)": 1, "cuLaunchKernel": 2}
        self.assertEqual(timeline.count_launches([HOST]), counts)

    def test_kernels_of_the_first_gpu_in_order(self):
        gpu = plane(
            "/device:GPU:0",
            **{
                "Stream #7(compute)": [event("b", 5, 6), event("a", 1, 2)],
                "Stream #8(MemcpyH2D)": [event("MemcpyH2D", 0, 9)],
                "XLA Ops": [event("decode", 0, 9)],
            },
        )
        other = plane("/device:GPU:1", **{"Stream #7": [event("c", 1, 2)]})
        found = timeline.kernels([HOST, other, gpu])
        self.assertEqual([name for name, *_ in found], ["a", "b"])

    @parameterized.parameters(
        ([], 0, []),
        ([(0, 2)], 2, []),
        ([(0, 2), (3, 4), (9, 10)], 4, [1, 5]),
        ([(0, 2), (2, 4)], 4, []),  # one after the other
        ([(0, 3), (2, 4), (5, 6)], 5, [1]),  # the second starts before the first ends
        ([(0, 9), (2, 4), (5, 6)], 9, []),  # inside another
    )
    def test_busy_and_gaps(self, spans, busy, gaps):
        found = [("k", begin * 1e3, end * 1e3) for begin, end in spans]
        self.assertEqual(timeline.busy_and_gaps(found), (busy, gaps))

    def test_a_profile_of_this_machine(self):
        planes = timeline.profile(lambda: jnp.ones(3) + 1)
        self.assertTrue(any(line.events for plane in planes for line in plane.lines))
        if jax.default_backend() == "cpu":
            self.assertEqual(timeline.kernels(planes), [])


class StepTest(absltest.TestCase):
    def test_donating_writes_to_the_same_buffers(self):
        operands = make_operands(make_case(2, 1, 16, 128))
        queries = [operands[0], 2 * operands[0]]
        self.enterContext(pretended_gpu())
        run = step.donating(queries, *operands[1:])
        want = jax.jit(step.decode_layers)(queries, *operands[1:])
        first = run()
        places = {x.unsafe_buffer_pointer() for x in first}
        second = run()
        self.assertEqual({x.unsafe_buffer_pointer() for x in second}, places)
        self.assertTrue(all(x.is_deleted() for x in first))
        for got, expected in zip(second, want, strict=True):
            np.testing.assert_array_equal(got, expected)

    def test_a_row_with_made_up_times_of_the_kernels(self):
        def time_kernels(operands, metadata, what, launches):
            self.assertEqual((what, launches), ("decode", 3))
            self.assertEqual(operands[0].shape, (3, 2, 1, 16, 576))
            return [5.0] * 4

        with (
            pretended_gpu(),
            mock.patch.multiple(step, LAYERS=3, FEW_LAYERS=2, ROUNDS=2, CALLS=2),
            mock.patch.object(step, "time_kernels", time_kernels),
        ):
            row = step.measure(2, 16, 128)
        for key in ("layer_us", "few_layers_us", "new_outputs_us", "replanned_us"):
            self.assertLen(row[key]["samples"], 2)
        self.assertEqual(row["kernel_us"]["median"], 5)
        self.assertEqual(row["added_us"], round(row["layer_us"]["median"] - 5, 2))
        self.assertContainsSubset(
            {"slope_us", "fixed_us", "launches", "kernels", "replanned_launches"}, row
        )

    def test_costs(self):
        def program(layers):  # 30 to launch, 12 a layer
            return {"median": (30 + 12 * layers) / layers}

        row = {
            "layer_us": program(step.LAYERS),
            "few_layers_us": program(step.FEW_LAYERS),
            "replanned_us": {"median": 20},
            "kernel_us": {"median": 11},
        }
        costs = step.costs(row)
        self.assertEqual((costs["slope_us"], costs["fixed_us"]), (12, 30))
        self.assertAlmostEqual(costs["added_us"], 1 + 30 / step.LAYERS, delta=0.01)
        self.assertAlmostEqual(costs["plan_in_each_us"], 8 - 30 / step.LAYERS, delta=0.01)

    def test_device_times(self):
        kernels = [event("k", 3 * i, 3 * i + 2) for i in range(step.LAYERS)]
        gpu = plane("/device:GPU:0", **{"Stream #7": kernels})
        times = step.device_times([HOST, gpu])
        self.assertEqual((times["kernels"], times["busy_us"]), (step.LAYERS, 2))
        self.assertEqual(times["gap_us"]["median"], 1)
        self.assertAlmostEqual(times["gaps_us"], 1, delta=0.03)

    def test_a_graph_as_a_whole_says_nothing_of_gaps(self):
        gpu = plane("/device:GPU:0", **{"Stream #7": [event("CudaGraph:3", 0, 700)]})
        times = step.device_times([HOST, gpu])
        self.assertEqual(times["kernels"], 1)
        self.assertNotIn("busy_us", times)
        self.assertNotIn("gaps_us", times)


if __name__ == "__main__":
    absltest.main()
