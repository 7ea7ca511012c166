"""The README's program runs."""

import pathlib
import re

import numpy as np
from absl.testing import absltest

from examples.deepseek.tests import support

README = pathlib.Path(__file__).parent.parent / "README.md"


class ReadmeTest(support.CheckpointTest):
    def test_python_blocks(self):
        directory = self.checkpoint("v2_lite", num_hidden_layers=1)
        blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
        self.assertNotEmpty(blocks)
        for block in blocks:
            names = {}
            exec(block.replace('"DIR"', repr(str(directory))), names)
            self.assertEqual(names["logits"].shape, (4, 512))
            self.assertTrue(np.isfinite(names["logits"]).all())


if __name__ == "__main__":
    absltest.main()
