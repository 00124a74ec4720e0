"""Tests a training step replayed as a CUDA graph against the same step without one. Needs a GPU."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import train
from kernels.cuda_graph import Graphed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@pytest.fixture
def alone():
    """A group of one process, in which an update exchanges gradients and reports as it does among several."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield
    dist.destroy_process_group()


MODELS = [
    ["--rank=2"],
    ["--structure=dense"],
    ["--num_cores=3"],
    ["--compile=True"],
    ["--moe=linear", "--num_experts=4"],
]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("words", MODELS, ids=str)
def test_steps_replayed_as_graphs_equal_steps_without(words, dropout, world, alone, monkeypatch):
    """Compares losses and gradient norms of ten steps of two micro-steps, with changing rates and seeds of dropout.

    With world=2 an update is two graphs with an exchange of gradients between them, here in a group of one.
    """
    results = []
    for graphs, processes in ((False, 1), (True, world)):
        options = ["--vocab_size=96", "--n_layer=2", "--n_head=2", "--d_model=36", "--block_size=32", "--micro_batch=4"]
        options += ["--batch_tokens=256", f"--dropout={dropout}", f"--cuda_graphs={graphs}", "--compile=False", *words]
        config = train.load_config(train.TrainConfig, [*options, "--dtype=float32"])
        device, data = torch.device("cuda", 0), SimpleNamespace(meta={})
        task = train.TokenTask(config, device, data)
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        run = train.Trainer(config, task, device)
        assert isinstance(run.update, Graphed) == (graphs and world == 1)
        assert (
            isinstance(run.run_passes, Graphed) == isinstance(run.step_optimizers, Graphed) == (graphs and world == 2)
        )
        torch.manual_seed(0)
        batches = torch.randint(96, (10, 2, 2, 4, 32), device="cuda")
        rows = []
        for step, (x, y) in enumerate(batches):
            run.optimizers.set_lr(1e-4 * (step + 1))
            torch.manual_seed(step)
            rows.append(run.update(x, y))
        results.append(torch.stack(rows))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)  # TF32 is on, and a graph runs other kernels
    assert results[0][:, 0].diff().abs().min() > 0


def test_learning_rates_are_read_at_every_replay():
    parameter = torch.nn.Parameter(torch.zeros(1, device="cuda"))
    optimizer = torch.optim.AdamW(
        [parameter], lr=torch.zeros((), device="cuda"), weight_decay=0, capturable=True, fused=True
    )

    def update(gradient):
        parameter.grad = gradient.clone()
        optimizer.step()
        return parameter.detach()

    graphed, steps = Graphed(update), []
    for rate in (1.0, 1.0, 1.0, 1.0, 0.0, 2.0):
        before = parameter.item()
        optimizer.param_groups[0]["lr"].fill_(rate)
        graphed(torch.ones(1, device="cuda"))
        steps.append(before - parameter.item())
    assert steps == pytest.approx([1, 1, 1, 1, 0, 2], abs=1e-5)
