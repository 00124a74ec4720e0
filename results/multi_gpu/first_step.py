"""Print what torch computes on real tensors to infer the shapes of AdamW on sharded parameters: first_step.txt.

torchrun --standalone --nproc_per_node=2 -m results.multi_gpu.first_step            # rates as numbers: nothing
torchrun --standalone --nproc_per_node=2 -m results.multi_gpu.first_step tensors    # rates as tensors, as once on GPUs
"""

import sys
import types

import torch
import torch._subclasses.fake_tensor as fake_tensor

import train  # noqa: E402
from engine.device import choose_device  # noqa: E402
from engine.heartbeat import init_distributed  # noqa: E402

run_fallback_kernel = fake_tensor.run_fallback_kernel


def say(mode, function, arguments, *others):
    numbers = sum(argument.numel() for argument in arguments if isinstance(argument, torch.Tensor))
    print(f"computed to learn its shapes: {function} on {numbers:,} numbers", flush=True)
    return run_fallback_kernel(mode, function, arguments, *others)


fake_tensor.run_fallback_kernel = say
words = "--structure=dense --n_layer=2 --d_model=64 --n_head=2 --block_size=32 --vocab_size=96 --micro_batch=4"
words += " --batch_tokens=256 --device=cpu --compile=False --shard=fsdp"
config = train.load_config(train.TrainConfig, words.split())
device = choose_device("cpu")
watchdog = init_distributed(device, 100)
with watchdog.paused():
    data = types.SimpleNamespace(meta={})  # the model trains on random tokens
    run = train.Trainer(config, train.TokenTask(config, device, data), device)
    print(f"{sum(p.numel() for p in run.model.parameters()):,} parameters")
    if sys.argv[1:] == ["tensors"]:
        for group in run.optimizers.param_groups:
            group["lr"] = torch.tensor(group["lr"])
    run.update(*torch.randint(96, (2, 1, 4, 32)))
watchdog.stop()
torch.distributed.destroy_process_group()
