"""What `benchmarks.counters` makes of ncu's output."""

import pytest
from absl.testing import absltest

pytest.importorskip("rich", reason="the benchmarks print with rich")
from benchmarks import counters

SPLIT = '"0","void a::split_kernel<(int)2, b::bf>(a::P, a::T)"'
HEADER = (
    '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value",'
    '"Rule Description"'
)
OUTPUT = f"""==PROF== Connected to process 1
16
{HEADER}
{SPLIT},"Speed Of Light","Duration","us","16.10",""
{SPLIT},"Speed Of Light","DRAM Throughput","%","51.3",""
{SPLIT},"Speed Of Light","","","","Low, they say."
"1","void a::combine_tiles<b::bf>(a::P)","Launch","Threads","","1,024",""
"""


class CountersTest(absltest.TestCase):
    def test_parse(self):
        split, combine = counters.parse(OUTPUT)
        self.assertEqual(split["kernel"], "split_kernel")
        self.assertEqual(split["counters"], {"Duration": "16.10 us", "DRAM Throughput": "51.3 %"})
        self.assertEqual(combine["kernel"], "combine_tiles")
        self.assertEqual(combine["counters"], {"Threads": "1,024"})

    def test_nothing_watched(self):
        self.assertEqual(counters.parse("==ERROR== no permission\n"), [])


if __name__ == "__main__":
    absltest.main()
