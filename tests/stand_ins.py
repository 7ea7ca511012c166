"""Stand-ins for the timer of the native module, for PyTorch, FlashMLA and FlashInfer."""

import contextlib
import types
from unittest import mock

import jax.numpy as jnp
import numpy as np

from jax_flashmla import flash_mla_with_kvcache, native


@contextlib.contextmanager
def pretended_gpu():
    """`implementation="cuda"` as if it could run here; where there is no GPU, it ends in XLA."""
    with (
        mock.patch.object(native, "why_no_kernel", lambda operation: None),
        mock.patch.object(native, "check_platforms", lambda implementation, platforms: None),
    ):
        yield


def fake_timer(pointers, *, batch, s_q, h_q, max_blocks, what, launches, replays, copies, **rest):
    """Microseconds in place of the native module's: loads, and 1 more for each of the others."""
    assert len(pointers) == 10 and all(pointers) and launches >= 4 and copies == 1, rest
    loads = batch * max_blocks / 100
    return [{"floor": loads, "split": loads + 1, "combine": 1, "decode": loads + 2}[what]] * replays


class FakeTensor:
    """As much of a tensor of PyTorch as the adapters use."""

    device = "cuda:0"

    def __init__(self, array):
        self.array, self.dtype = jnp.asarray(array), array.dtype

    def __getitem__(self, index):
        return FakeTensor(self.array[index])

    def flatten(self, *dims):
        assert dims == (0, 1)
        return FakeTensor(self.array.reshape(-1, *self.array.shape[2:]))

    def float(self):
        return self

    cpu = float

    def numpy(self):
        return np.asarray(self.array, np.float32)


class FakeEvent:
    clock = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.clock

    def elapsed_time(self, end):
        return (end.at - self.at) / 1e3  # milliseconds


class FakeGraph:
    """7 µs for each call that was captured."""

    def replay(self):
        FakeEvent.clock += 7 * self.calls


class FakeTorch(types.ModuleType):
    uint8 = "uint8"

    def __init__(self):
        super().__init__("torch")
        self.calls = 0
        self.cuda = types.SimpleNamespace(
            CUDAGraph=FakeGraph, Event=FakeEvent, graph=self.graph, synchronize=lambda: None
        )

    def from_dlpack(self, array):
        return FakeTensor(array)

    def empty(self, size, dtype, device):
        assert size == 128 * 2**20 and dtype == "uint8" and device == "cuda:0"

    @contextlib.contextmanager
    def graph(self, graph):
        before = self.calls
        yield
        graph.calls = self.calls - before


def fake_peers():
    """Modules of the peers' names that compute with JAX, through the calls that they document."""
    torch = FakeTorch()
    flash_mla, flashinfer = types.ModuleType("flash_mla"), types.ModuleType("flashinfer")

    def flash_mla_call(q, pool, table, lengths, head_dim_v, plan, splits, *, softmax_scale, causal):
        assert (plan, splits) == ("plan", None)
        torch.calls += 1
        outputs = flash_mla_with_kvcache(
            *(x.array for x in (q, pool, table, lengths)),
            head_dim_v,
            softmax_scale=softmax_scale,
            causal=causal,
            implementation="xla",
        )
        return tuple(map(FakeTensor, outputs))

    flash_mla.get_mla_metadata = lambda lengths, rows, h_kv: ("plan", None)
    flash_mla.flash_mla_with_kvcache = flash_mla_call

    class Wrapper:
        def __init__(self, workspace):
            pass

        def plan(
            self, q_ends, ends, indices, lengths, heads, ckv, kpe, page, causal, scale, *dtypes
        ):
            assert (ckv, kpe, page, causal) == (512, 64, 64, True), dtypes
            ends, indices = np.asarray(ends.array), np.asarray(indices.array)
            self.s_q, self.lengths, self.scale = int(q_ends.array[1]), lengths.array, scale
            self.table = np.zeros((len(ends) - 1, np.diff(ends).max()), np.int32)
            for row, begin, end in zip(self.table, ends, ends[1:], strict=False):
                row[: end - begin] = indices[begin:end]

        def run(self, q_nope, q_rope, ckv, kpe):
            torch.calls += 1
            q = jnp.concatenate([q_nope.array, q_rope.array], axis=-1)
            q = q.reshape(-1, self.s_q, *q.shape[1:])
            pool = jnp.concatenate([ckv.array, kpe.array], axis=-1)[:, :, None]
            out, _ = flash_mla_with_kvcache(
                *(q, pool, self.table, self.lengths),
                softmax_scale=self.scale,
                causal=True,
                implementation="xla",
            )
            return FakeTensor(out.reshape(-1, *out.shape[2:]))

    flashinfer.mla = types.SimpleNamespace(BatchMLAPagedAttentionWrapper=Wrapper)
    return {"torch": torch, "flash_mla": flash_mla, "flashinfer": flashinfer}
