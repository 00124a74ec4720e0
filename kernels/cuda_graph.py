"""A function of tensors as one CUDA graph: one launch instead of hundreds.

At small widths a GPU waits for the host: the launch of a kernel takes longer than the kernel. A
graph records all launches of a training step, forward to optimizer, and replays them at once.
"""

import torch


class Graphed:
    """function(*tensors) -> tensor, which is called directly a few times, then recorded, then replayed.

    All tensors must be on the current GPU and have the same shapes in every call, and the function's
    work must not depend on values that the host reads. A replay changes in place what a call does:
    weights, gradients, the state of an optimizer made with capturable=True.
    """

    CALLS_BEFORE = 3  # in these torch.compile and autotuning run, and the optimizer makes its state

    def __init__(self, function):
        self.function, self.calls, self.graph = function, 0, None

    def __call__(self, *inputs):
        if self.calls < self.CALLS_BEFORE:
            self.calls += 1
            stream = torch.cuda.Stream()  # recording needs its own stream, and so does what is allocated before it
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
        return self.output.clone()  # the next replay overwrites the output
