"""The README's example runs."""

import pathlib
import re
import unittest

from absl.testing import absltest

README = pathlib.Path(__file__).parent.parent / "README.md"

if not README.exists():
    raise unittest.SkipTest("tests run without the repository's README")


class ReadmeTest(absltest.TestCase):
    def test_python_blocks_run_in_order(self):
        blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
        self.assertNotEmpty(blocks)
        names = {}
        for block in blocks:
            exec(block, names)
        self.assertEqual(names["out"].shape, (2, 1, 16, 512))
        self.assertEqual(names["lse"].shape, (2, 16, 1))


if __name__ == "__main__":
    absltest.main()
