"""The examples run: the README's, the documentation's, the docstrings'."""

import doctest
import pathlib
import re
import unittest

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

import jax_flashmla

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = "getting_started", "concepts", "from_flashmla"

if not README.exists():
    raise unittest.SkipTest("tests run without the repository's README")


def run_blocks(path):
    """Runs a page's Python blocks, one after the other; returns their names."""
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    names = {}
    for block in blocks:
        exec(block, names)
    return names


class ReadmeTest(parameterized.TestCase):
    def test_python_blocks_run_in_order(self):
        names = run_blocks(README)
        self.assertEqual(names["out"].shape, (2, 1, 16, 512))
        self.assertEqual(names["lse"].shape, (2, 16, 1))

    @parameterized.parameters(*PAGES)
    def test_pages(self, page):
        path = ROOT / "docs" / f"{page}.md"
        if not path.exists():
            self.skipTest("tests run without the repository's documentation")
        self.assertIn("jax_flashmla", run_blocks(path).get("flash_mla_with_kvcache").__module__)

    @parameterized.parameters(
        "flash_mla_with_kvcache", "get_mla_metadata", "append_kv_cache", "merge_attention_states"
    )
    def test_docstrings(self, name):
        function = getattr(jax_flashmla, name)
        names = {"jax": jax, "jnp": jnp, name: function}
        (example,) = doctest.DocTestFinder(recurse=False).find(function, name, globs=names)
        failed, tried = doctest.DocTestRunner().run(example)
        self.assertEqual(failed, 0)
        self.assertGreater(tried, 2)


if __name__ == "__main__":
    absltest.main()
