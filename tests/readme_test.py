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
PAGES = "getting_started", "concepts", "fp8", "from_flashmla"

if not README.exists():
    raise unittest.SkipTest("tests run without the repository's README")


class ReadmeTest(parameterized.TestCase):
    def run_blocks(self, path):
        """Runs a page's Python blocks, one after the other; returns their names."""
        blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
        self.assertNotEmpty(blocks)
        names = {}
        for block in blocks:
            exec(block, names)
        return names

    def test_python_blocks_run_in_order(self):
        names = self.run_blocks(README)
        self.assertEqual(names["out"].shape, (2, 1, 16, 512))
        self.assertEqual(names["lse"].shape, (2, 16, 1))

    def test_the_first_example_is_short(self):
        block = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
        self.assertLessEqual(len(block.splitlines()), 15)
        self.assertIn("@jax.jit", block)

    @parameterized.parameters(*PAGES)
    def test_pages(self, page):
        path = ROOT / "docs" / f"{page}.md"
        if not path.exists():
            self.skipTest("tests run without the repository's documentation")
        names = self.run_blocks(path)  # which assert what they show
        self.assertIs(names["flash_mla_with_kvcache"], jax_flashmla.flash_mla_with_kvcache)

    @parameterized.parameters(
        "flash_mla_with_kvcache",
        "get_mla_metadata",
        "append_kv_cache",
        "block_table_from_csr",
        "quantize_kv_cache",
        "merge_attention_states",
    )
    def test_docstrings(self, name):
        function = getattr(jax_flashmla, name)
        public = {public: getattr(jax_flashmla, public) for public in jax_flashmla.__all__}
        names = {"jax": jax, "jnp": jnp} | public
        (example,) = doctest.DocTestFinder(recurse=False).find(function, name, globs=names)
        failed, tried = doctest.DocTestRunner().run(example)
        self.assertEqual(failed, 0)
        self.assertGreater(tried, 2)


if __name__ == "__main__":
    absltest.main()
