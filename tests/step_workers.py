"""Contenders of a training step in the test's own process, on a fake clock."""

from fastlm.bench import step_worker

STEP_MS = 10.0  # of a step that does not move the clock itself


class Here:
    """A step_worker.Worker without a process."""

    def __init__(self, clock, name, directory):
        self.clock = clock
        self.runner = step_worker.Runner(name, directory, lambda device: clock)

    def start(self):
        answer = step_worker.answer_of(self.runner.start)
        if "loss" in answer:
            step = self.runner.step

            def timed(number):
                before = self.clock.now()
                out = step(number)
                if self.clock.now() == before:
                    self.clock.advance(STEP_MS)
                return out

            self.runner.step = timed
        return answer

    def run(self, steps, what="time"):
        return step_worker.answer_of(self.runner.run, steps, what)

    def said(self):
        return ""

    def close(self):
        pass
