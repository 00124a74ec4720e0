"""A function of tensors as one CUDA graph: one launch instead of hundreds.

At small widths a GPU waits for the host: the launch of a kernel takes longer than the kernel. A
graph records all launches of a training step, forward to optimizer, and replays them at once.
"""

import torch


class Graphed:
    """function(*tensors) -> tensor: called as it is a few times, then recorded, then replayed.

    The function's tensors must all be on the current GPU, have the same shapes every time, and
    its work must not depend on values that the host reads. What it changes in place (weights,
    gradients, an optimizer made with capturable=True) changes by a replay as by a call.
    """

    CALLS_BEFORE = 3  # torch.compile, autotuning and the optimizer's state happen in these

    def __init__(self, function):
        self.function, self.calls, self.graph = function, 0, None

    def __call__(self, *inputs):
        if self.calls < self.CALLS_BEFORE:
            self.calls += 1
            stream = torch.cuda.Stream()  # recording needs a stream of its own; what is made before it, too
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                output = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            return output
        if self.graph is None:
            self.inputs = [tensor.clone() for tensor in inputs]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = self.function(*self.inputs)
        for mine, new in zip(self.inputs, inputs):
            mine.copy_(new, non_blocking=True)
        self.graph.replay()
        return self.output.clone()  # the next replay writes over it
