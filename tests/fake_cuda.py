"""A stand-in for what CudaGraph uses of torch.cuda: captured work runs at a replay, on a FakeGpuClock.

A failed capture leaves behind what torch's leaves: its stream is current, the generator refuses to draw, and the
allocator refuses to begin another one.
"""

import warnings
from types import SimpleNamespace

import torch

REPLAY_MS = 0.01  # of the host


class FakeCuda:
    def __init__(self, clock):
        self.clock, self.graphs, self.streams, self.current = clock, [], ["default"], "default"
        self.recording, self.pools = set(), 0  # pools of which a capture has not ended
        self.state = SimpleNamespace(capturing=False)
        self.generator = SimpleNamespace(
            clone_state=lambda: SimpleNamespace(capturing=self.state.capturing),
            graphsafe_set_state=lambda state: setattr(self, "state", state),
        )

    def install(self, monkeypatch):
        fake = self

        class Stream(str):
            def __new__(cls):
                fake.streams.append(f"stream {len(fake.streams)}")
                return super().__new__(cls, fake.streams[-1])

            def wait_stream(self, other):
                pass

        class Current(str):
            def wait_stream(self, other):
                pass

        class StreamContext:
            def __init__(self, stream):
                self.stream = stream

            def __enter__(self):
                self.before, fake.current = fake.current, self.stream

            def __exit__(self, *error):
                fake.current = self.before

        class CUDAGraph:
            def __init__(self):
                self.kernels, self.replays = [], 0
                fake.graphs.append(self)

            def reset(self):
                self.kernels.clear()

            def replay(self):
                self.replays += 1
                fake.clock.advance(REPLAY_MS)
                fake.clock.keep_busy(sum(self.kernels))

        class graph:  # as torch calls it
            def __init__(self, graph, pool, stream, capture_error_mode):
                self.graph, self.pool, self.context = graph, pool, StreamContext(stream)

            def __enter__(self):
                assert not fake.recording, "captures_underway.empty() INTERNAL ASSERT FAILED"
                self.context.__enter__()
                fake.recording.add(self.pool)
                fake.state.capturing, fake.clock.captured, fake.clock.broken = True, self.graph.kernels, False

            def __exit__(self, *error):
                fake.clock.captured = None
                if fake.clock.broken:
                    raise RuntimeError("operation failed due to a previous error during capture")
                fake.state.capturing = False
                fake.recording.discard(self.pool)
                if not self.graph.kernels:
                    warnings.warn("The CUDA Graph is empty. This usually means", stacklevel=1)
                self.context.__exit__(*error)

        def pool():
            self.pools += 1
            return (0, self.pools)

        def end(device, pool):
            if pool not in self.recording:
                raise RuntimeError("not currently recording to mempool_id")
            self.recording.discard(pool)

        self.released = []
        for name, value in {
            "CUDAGraph": CUDAGraph,
            "graph": graph,
            "Stream": Stream,
            "stream": StreamContext,
            "current_stream": lambda: Current(self.current),
            "current_device": lambda: 0,
            "default_generators": (self.generator,),
            "graph_pool_handle": pool,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
        monkeypatch.setattr(
            torch._C, "_cuda_releasePool", lambda device, pool: self.released.append(pool), raising=False
        )
        return self

    def draw(self):
        """As torch.randn on the device."""
        if self.state.capturing and self.clock.captured is None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
