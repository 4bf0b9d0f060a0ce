"""Clocks for tests of what measures: time passes only where a test says so."""


class FakeClock:
    """fastlm.bench.clock.Clock of a host without a GPU."""

    on_gpu = False

    def __init__(self):
        self.seconds = 0.0

    def now(self):
        return self.seconds

    def wait(self):
        pass

    def advance(self, ms):
        self.seconds += ms / 1e3


class FakeGpuClock(FakeClock):
    """A host and a device with a queue: a kernel starts when it is launched and the one before it has ended."""

    on_gpu = True

    def __init__(self):
        super().__init__()
        self.free_at = 0.0  # when the device has finished its queue, in seconds of the host
        self.captured = None  # milliseconds of the kernels of the graph that is captured now
        self.broken = False  # whether that capture cannot end

    def wait(self):
        if self.captured is not None:
            self.broken = True
            raise RuntimeError("operation not permitted when stream is capturing")
        self.seconds = max(self.seconds, self.free_at)

    def keep_busy(self, ms):
        self.free_at = max(self.free_at, self.seconds) + ms / 1e3

    def launch(self, host_ms, device_ms):
        """A kernel that takes `host_ms` to launch and `device_ms` to run."""
        self.advance(host_ms)
        if self.captured is not None:
            self.captured.append(device_ms)
        else:
            self.keep_busy(device_ms)

    def mark(self):
        return max(self.free_at, self.seconds)

    def between(self, start, end):
        self.seconds = max(self.seconds, end)
        return (end - start) * 1e3
