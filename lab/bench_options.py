"""Options of lab.bench's commands. They need no torch, so mistakes are answered before it is imported."""

from dataclasses import dataclass
from typing import Literal

from configurator import ConfigError
from options import GPTConfig, TrainConfig


@dataclass
class TimingConfig:
    """Options of `step` and `image_step`, beside those of the run."""

    steps: int = 20  # timed updates, after five to warm up
    against: str = ""  # other configs in one word, ";" between them: --against="config/gpt2_dense.py --rank=2"
    parts: bool = True  # also time forward and backward passes separately
    profile: str | None = None  # folder for a table of kernels and a trace for Perfetto or chrome://tracing
    json: str | None = None  # file for the rows


@dataclass
class StepConfig(TrainConfig, TimingConfig):
    pass


@dataclass
class SampleBenchConfig(GPTConfig):
    device: str = "auto"  # cuda, cpu, mps; auto: a GPU where there is one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: 16 bits on GPUs
    context: int = 512  # tokens before the first timed one
    batches: tuple | None = None  # texts generated at the same time; None: (1, 16, 64), on a CPU (1,)
    tokens: int = 100  # timed tokens of each text
    json: str | None = None  # file for the rows

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.context <= self.block_size:
            raise ConfigError(
                f"context={self.context}, but the model reads 1 to block_size={self.block_size} tokens: give a context in between"
            )
        if self.tokens < 10:
            raise ConfigError(f"tokens={self.tokens}: make it at least 10")


@dataclass
class DataBenchConfig:
    megabytes: int = 200  # of text
    block_size: int = 128  # context of the batches
    batch_tokens: int = 65_536  # tokens a batch
    json: str | None = None  # file for the rows


@dataclass
class LayersConfig:
    layers: str | None = None  # "in-out:rank in-out:rank"; None: 14 of widths 768 to 8192, on a CPU 5 small ones
    tokens: tuple | None = None  # tokens in a batch; None: (2048, 32768, 262144), on a CPU (2048,)
    methods: tuple = ("torch", "fused", "staged", "dense", "chosen")  # of kernels.btt; torch is the plain bmm path
    device: str = "auto"  # cuda, cpu; auto: a GPU where there is one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU
    errors: bool = True  # also compare each method with float64
    json: str | None = None  # file for the rows
    png: str | None = None  # file for a picture: times, and the roofline
    draw: str | None = None  # draw the rows of this file instead of measuring


@dataclass
class MixturesConfig:
    # layers: "structure/in-out:rank of an expert/experts:top_k", separated by spaces
    layers: str | None = None  # None: six of widths 1024 to 4096, on a CPU three of width 256
    tokens: int | None = None  # in a batch; None: 32768, on a CPU 2048
    compile: bool | None = None  # torch.compile without graph breaks; None: on a GPU only
    device: str = "auto"  # cuda, cpu; auto: a GPU where there is one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU
    json: str | None = None  # file for the rows
