"""What is measured: cases, the lengths of their sequences, and suites of them."""

import hashlib
import json
import math
import pathlib
import re
from typing import NamedTuple

import numpy as np

from benchmarks import report
from jax_flashmla import planner
from jax_flashmla.arguments import HEAD_DIM, LATENT_DIM, MOST_TOKENS, PAGE_BLOCK_SIZE

SEED = 0
DTYPES = "bfloat16", "float16"
ROW_BYTES = HEAD_DIM * 2  # of the cache: one token
FLOPS = 2 * (HEAD_DIM + LATENT_DIM)  # of a token, for each query row
FULL_BATCH = 32  # from here on, the chip's ceilings bound a case, and not latency
DRAWN = re.compile(r"(normal|uniform)\((\d+),(\d+)\)")
LENGTHS = (
    "a length of 1 or more, normal(mean,deviation), uniform(least,most) or a file of such lengths"
)


class Case(NamedTuple):
    """One decode: `batch` sequences, `s_q` query tokens each, one KV head."""

    batch: int
    s_q: int
    heads: int
    lengths: tuple[int, ...]  # tokens of each sequence, the new ones included
    seqlens: str  # how the lengths were given, which tells them from others
    dtype: str = "bfloat16"

    @property
    def equal(self):
        """Whether all sequences are as long as each other."""
        return len(set(self.lengths)) == 1

    @property
    def pages(self):
        """Pages that the sequences fill."""
        return sum(math.ceil(length / PAGE_BLOCK_SIZE) for length in self.lengths)

    @property
    def read_bytes(self):
        """Of the cache, read once."""
        return sum(self.lengths) * ROW_BYTES

    @property
    def flops(self):
        """Of both products, none of them masked."""
        return FLOPS * self.s_q * self.heads * sum(self.lengths)

    @property
    def bounded_by_products(self):
        """Whether the chip's tensor cores, and so its power, bound the case."""
        return self.batch >= FULL_BATCH and self.s_q * self.heads > planner.ROWS_PER_TILE

    def identity(self):
        """What a row of a report says of its case; `tokens` is the mean of unequal lengths."""
        row = {"batch": self.batch, "s_q": self.s_q, "heads": self.heads}
        row["tokens"] = round(sum(self.lengths) / self.batch)
        if not self.equal:
            row["seqlens"] = self.seqlens
        return row | {"dtype": self.dtype}

    def __str__(self):
        """In words, for the progress bar and for messages."""
        return f"{self.batch} x {self.seqlens}, {self.heads} heads, s_q {self.s_q}, {self.dtype}"


def make_case(batch, s_q, heads, seqlens, dtype="bfloat16"):
    """A case from its lengths as a flag gives them; ValueError says what is wrong with them.

    `batch` may be None: as many as a file has lengths, else 1.
    """
    text = str(seqlens).replace(" ", "")
    drawn = DRAWN.fullmatch(text)
    if drawn:
        kind, first, second = drawn[1], int(drawn[2]), int(drawn[3])
        if not 1 <= max(first, second) <= MOST_TOKENS or first < 1:
            raise ValueError(f"expected numbers from 1 to {MOST_TOKENS:,}, got {text}")
        lengths = (_normal if kind == "normal" else _uniform)(first, second, batch or 1)
    elif text.isdecimal():
        lengths = [int(text)] * (batch or 1)
    else:
        text, lengths = _read_lengths(seqlens)
        if batch not in (None, len(lengths)):
            raise ValueError(f"expected {batch} lengths, as --batch says, got {len(lengths)}")
    if min(lengths) < 1:
        raise ValueError(f"expected {LENGTHS}, got {seqlens!r}")
    return Case(len(lengths), s_q, heads, tuple(map(int, lengths)), text, dtype)


def _normal(mean, deviation, batch):
    """Lengths from N(mean, deviation), at least 1, scaled so that their mean is exactly `mean`.

    A case of equal lengths then has as many tokens.
    """
    drawn = np.random.default_rng(SEED).normal(mean, deviation, batch).clip(1)
    lengths = np.floor(drawn * (batch * mean / drawn.sum())).clip(1).astype(int)
    lengths[lengths.argmax()] += batch * mean - lengths.sum()
    return lengths.tolist()


def _uniform(least, most, batch):
    """Lengths between the two, both included."""
    if least > most:
        raise ValueError(f"expected uniform(least,most), got uniform({least},{most})")
    return np.random.default_rng(SEED).integers(least, most, batch, endpoint=True).tolist()


def _read_lengths(path):
    """A file's name with the digest of its lengths, and the lengths."""
    try:
        text = pathlib.Path(path).read_text()
        lengths = [int(word) for word in text.split()]
    except (OSError, ValueError):
        lengths = []
    if not lengths:
        raise ValueError(f"expected {LENGTHS}, got {str(path)!r}")
    digest = hashlib.sha256(repr(lengths).encode()).hexdigest()[:8]
    return f"{pathlib.Path(path).name}:{digest}", lengths


# batch, s_q, heads, lengths of each suite.
SMALL = (
    (1, 1, 16, "4096"),
    (1, 1, 16, "65536"),
    (8, 1, 16, "4096"),
    (1, 1, 128, "4096"),
    *((4, s_q, 16, "uniform(1700,45000)") for s_q in (1, 2, 4)),
    *((64, s_q, 16, "uniform(300,1000)") for s_q in (1, 2, 4)),
)
# A case of equal lengths beside each, with as many tokens.
VARLEN = tuple(
    (batch, 1, heads, seqlens)
    for heads in (16, 128)
    for batch, mean in ((128, 4096), (64, 8192))
    for seqlens in (f"normal({mean},{mean // 2})", f"{mean}")
)
SWEEP = tuple(
    (batch, 1, heads, f"{length}")
    for heads in (16, 128)
    for batch, length in (
        *((1, 1024 * 2**i) for i in range(8)),
        *((2**i, 4096) for i in range(9)),
    )
)
# For machines without the kernel: quick on two cores.
TINY = ((2, 1, 16, "512"), (1, 1, 128, "1000"), (4, 2, 16, "uniform(100,700)"))


def peers():
    """The recorded times of FlashMLA and FlashAttention-3, `peers_h200.json`."""
    return json.loads(report.PEERS.read_text())


def _peer_shapes(least_heads, most_heads):
    """The shapes of the recorded times with full batches."""
    return [
        (row["b"], row["s_q"], row["h_q"], f"{row['s_k']}")
        for row in peers()["rows"]
        if row["b"] >= FULL_BATCH and least_heads <= row["h_q"] <= most_heads
    ]


SUITES = {
    "small": lambda: SMALL,
    "memory": lambda: _peer_shapes(1, planner.ROWS_PER_TILE),
    "compute": lambda: _peer_shapes(planner.ROWS_PER_TILE + 1, 128),
    "varlen": lambda: VARLEN,
    "sweep": lambda: SWEEP,
}


def suite(name, dtype="bfloat16"):
    """The cases of a suite, of "all" or of "tiny", each with the first suite that has it."""
    shapes = SUITES | {"tiny": lambda: TINY}
    found = {}
    for member in SUITES if name == "all" else (name,):
        for shape in shapes[member]():
            found.setdefault(make_case(*shape, dtype), member)
    return found


def groups(cases):
    """Cases that are measured in turns, since they are compared: of the same number of tokens."""
    found = {}
    for case in cases:
        key = case.batch, case.s_q, case.heads, sum(case.lengths), case.dtype
        found.setdefault(key, []).append(case)
    return list(found.values())


def bytes_needed(case):
    """Device memory of a case, about: pages, queries, outputs, partial results."""
    rows = case.s_q * case.heads
    widest = math.ceil(max(case.lengths) / PAGE_BLOCK_SIZE)
    pages = case.pages * PAGE_BLOCK_SIZE * ROW_BYTES + case.batch * widest * 4
    partial = (case.batch + planner.num_sm_parts(rows, 1, 132)) * rows * LATENT_DIM * 2
    return pages + case.batch * rows * (HEAD_DIM + LATENT_DIM) * 2 + partial
