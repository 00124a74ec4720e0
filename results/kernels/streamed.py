# ruff: noqa: SIM102, SIM113, B023 (compile-time conditions apart from run-time ones; calls are made at once)
"""A method for BTT that kernels/btt.py lacks: z stays in L2, no copies, each core is read once. Figures: results/kernels.md.

    python -m results.kernels.streamed          # on a GPU: errors, and times beside the staged method of kernels/btt.py
    TRITON_INTERPRET=1 python -m results.kernels.streamed    # phase by phase, on the CPU: errors

A group of max(γ, φ) programs processes the tokens tile by tile. Program i computes z of block γ = i, waits for the
group, and computes y of block φ = i; it keeps both its blocks of the cores and its sums dA and dB. The z of a tile is
written and read within microseconds and stays in L2. If there are fewer blocks of one kind than programs, several
programs share the tokens of one block. Programs take numbers in the order in which they start, so no program waits for
another that cannot start.

Predicted for d = 4096, rank 1, 32,768 tokens, from bytes through L2 at 5.5 TB/s: 0.20 ms forward (1.07 GB) and 0.39 backward
(2.15 GB), 0.6 to 0.7 with barriers, where staged takes 1.02; rank 4: 0.49 and 0.98, where staged takes 2.65.
"""

import torch
import triton
import triton.language as tl

from kernels.btt import BTTSizes, btt, btt_matrix
from kernels.common import pow2
from lab.bench_layers import milliseconds


@triton.jit
def _wait_for_group(counter, target):
    """Every program of the group has come here `target` / members times."""
    tl.debug_barrier()
    seen = tl.atomic_add(counter, 1, sem="acq_rel") + 1
    while seen < target:
        seen = tl.atomic_add(counter, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _forward(
    x, A, B, y, z, counters, N, x_stride,
    G: tl.constexpr, AL: tl.constexpr, F: tl.constexpr, EL: tl.constexpr, R: tl.constexpr,
    AP: tl.constexpr, EP: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, SUB: tl.constexpr,
    MEMBERS: tl.constexpr, GROUPS: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """PHASE 0: all, in groups. 1 and 2: that one alone, with room in z for every tile."""
    pid = tl.program_id(0)
    if PHASE == 0:
        pid = tl.atomic_add(counters + GROUPS, 1)
    member, group = pid % MEMBERS, pid // MEMBERS
    TOKENS: tl.constexpr = BM * SUB
    g, g_part = member % G, member // G
    f, f_part = member % F, member // F
    G_PARTS: tl.constexpr = MEMBERS // G
    F_PARTS: tl.constexpr = MEMBERS // F
    a, e, c, k = tl.arange(0, AP), tl.arange(0, EP), tl.arange(0, CP), tl.arange(0, KP)
    column = tl.arange(0, BM)
    mask_A = (a[None, :] < AL) & (c[:, None] < R * F)
    A_g = tl.load(A + g * (AL * R * F) + a[None, :] * (R * F) + c[:, None], mask_A, 0.0)  # (r·f, a)
    mask_B = (k[:, None] < G * R) & (e[None, :] < EL)
    B_f = tl.load(B + f * (G * R * EL) + k[:, None] * EL + e[None, :], mask_B, 0.0)  # (g·r, e)
    rounds = 0
    for tile in range(group, tl.cdiv(N, TOKENS), GROUPS):
        slot = tile if PHASE > 0 else group * 2 + rounds % 2
        z_tile = z + slot.to(tl.int64) * (G * R * F * TOKENS)
        if PHASE != 2:
            if g_part < G_PARTS:
                for sub in tl.range(g_part, SUB, G_PARTS, num_stages=3):
                    n = tile * TOKENS + sub * BM + column
                    mask_x = (n[:, None] < N) & (a[None, :] < AL)
                    x_t = tl.load(x + n[:, None].to(tl.int64) * x_stride + g * AL + a[None, :], mask_x, 0.0)
                    z_t = tl.dot(A_g, x_t.T).to(z.dtype.element_ty)
                    to = z_tile + (g * (R * F) + c)[:, None] * TOKENS + (sub * BM + column)[None, :]
                    tl.store(to, z_t, (c[:, None] < R * F) & (column[None, :] < BM))
        rounds += 1
        if PHASE == 0:
            _wait_for_group(counters + group, MEMBERS * rounds)
        if PHASE != 1:
            if f_part < F_PARTS:
                for sub in tl.range(f_part, SUB, F_PARTS, num_stages=3):
                    n = tile * TOKENS + sub * BM + column
                    at = z_tile + (k * F + f)[:, None] * TOKENS + (sub * BM + column)[None, :]
                    z_f = tl.load(at, (k[:, None] < G * R) & (column[None, :] < BM), 0.0)
                    y_t = tl.dot(z_f.T, B_f).to(y.dtype.element_ty)
                    to = y + n[:, None].to(tl.int64) * (F * EL) + f * EL + e[None, :]
                    tl.store(to, y_t, (n[:, None] < N) & (e[None, :] < EL))


@triton.jit
def _backward(
    x, dy, A, B, dx, dA, dB, z, dz, counters, N, x_stride, dy_stride,
    G: tl.constexpr, AL: tl.constexpr, F: tl.constexpr, EL: tl.constexpr, R: tl.constexpr,
    AP: tl.constexpr, EP: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, SUB: tl.constexpr,
    MEMBERS: tl.constexpr, GROUPS: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """Phases: 1 z again, 2 dz and dB, 3 dx and dA. Sums go to a part for every (group, share of the tokens)."""
    pid = tl.program_id(0)
    if PHASE == 0:
        pid = tl.atomic_add(counters + GROUPS, 1)
    member, group = pid % MEMBERS, pid // MEMBERS
    TOKENS: tl.constexpr = BM * SUB
    g, g_part = member % G, member // G
    f, f_part = member % F, member // F
    G_PARTS: tl.constexpr = MEMBERS // G
    F_PARTS: tl.constexpr = MEMBERS // F
    a, e, c, k = tl.arange(0, AP), tl.arange(0, EP), tl.arange(0, CP), tl.arange(0, KP)
    column = tl.arange(0, BM)
    mask_A = (a[None, :] < AL) & (c[:, None] < R * F)
    offsets_A = g * (AL * R * F) + a[None, :] * (R * F) + c[:, None]
    A_g = tl.load(A + offsets_A, mask_A, 0.0)  # (r·f, a)
    mask_B = (k[:, None] < G * R) & (e[None, :] < EL)
    offsets_B = f * (G * R * EL) + k[:, None] * EL + e[None, :]
    B_f = tl.load(B + offsets_B, mask_B, 0.0)  # (g·r, e)
    dA_g = tl.zeros((CP, AP), tl.float32)
    dB_f = tl.zeros((KP, EP), tl.float32)
    meetings = 0
    for tile in range(group, tl.cdiv(N, TOKENS), GROUPS):
        slot = tile if PHASE > 0 else group
        base = slot.to(tl.int64) * (G * R * F * TOKENS)
        if PHASE == 0 or PHASE == 1:
            if g_part < G_PARTS:
                for sub in tl.range(g_part, SUB, G_PARTS, num_stages=3):
                    n = tile * TOKENS + sub * BM + column
                    mask_x = (n[:, None] < N) & (a[None, :] < AL)
                    x_t = tl.load(x + n[:, None].to(tl.int64) * x_stride + g * AL + a[None, :], mask_x, 0.0)
                    z_t = tl.dot(A_g, x_t.T).to(z.dtype.element_ty)
                    to = base + (g * (R * F) + c)[:, None] * TOKENS + (sub * BM + column)[None, :]
                    tl.store(z + to, z_t, (c[:, None] < R * F) & (column[None, :] < BM))
        if PHASE == 0:
            meetings += 1
            _wait_for_group(counters + group, MEMBERS * meetings)
        if PHASE == 0 or PHASE == 2:
            if f_part < F_PARTS:
                for sub in tl.range(f_part, SUB, F_PARTS, num_stages=3):
                    n = tile * TOKENS + sub * BM + column
                    mask_y = (n[:, None] < N) & (e[None, :] < EL)
                    dy_t = tl.load(dy + n[:, None].to(tl.int64) * dy_stride + f * EL + e[None, :], mask_y, 0.0)
                    at = base + (k * F + f)[:, None] * TOKENS + (sub * BM + column)[None, :]
                    mask_z = (k[:, None] < G * R) & (column[None, :] < BM)
                    z_f = tl.load(z + at, mask_z, 0.0)
                    dz_t = tl.dot(B_f, dy_t.T).to(dz.dtype.element_ty)
                    tl.store(dz + at, dz_t, mask_z)
                    dB_f = tl.dot(z_f, dy_t, dB_f)
        if PHASE == 0:
            meetings += 1
            _wait_for_group(counters + group, MEMBERS * meetings)
        if PHASE == 0 or PHASE == 3:
            if g_part < G_PARTS:
                for sub in tl.range(g_part, SUB, G_PARTS, num_stages=3):
                    n = tile * TOKENS + sub * BM + column
                    at = base + (g * (R * F) + c)[:, None] * TOKENS + (sub * BM + column)[None, :]
                    dz_g = tl.load(dz + at, (c[:, None] < R * F) & (column[None, :] < BM), 0.0)
                    mask_x = (n[:, None] < N) & (a[None, :] < AL)
                    x_t = tl.load(x + n[:, None].to(tl.int64) * x_stride + g * AL + a[None, :], mask_x, 0.0)
                    dx_t = tl.dot(dz_g.T, A_g).to(dx.dtype.element_ty)
                    tl.store(dx + n[:, None].to(tl.int64) * (G * AL) + g * AL + a[None, :], dx_t, mask_x)
                    dA_g = tl.dot(dz_g, x_t, dA_g)
    if PHASE == 0 or PHASE == 2:
        if f_part < F_PARTS:
            tl.store(dB + (group * F_PARTS + f_part) * (F * G * R * EL) + offsets_B, dB_f, mask_B)
    if PHASE == 0 or PHASE == 3:
        if g_part < G_PARTS:
            tl.store(dA + (group * G_PARTS + g_part) * (G * AL * R * F) + offsets_A, dA_g, mask_A)


class Streamed:
    """Both kernels for one layer and number of tokens. bm tokens a step, sub steps between two meetings of a group."""

    def __init__(self, x, dy, A, B, bm=64, sub=4, per_multiprocessor=2, warps=4, apart=False):
        (g, a, rf), (f, gr, e), n = A.shape, B.shape, len(x)
        self.inputs, self.apart, self.warps, self.members = (x, dy, A, B), apart, warps, max(g, f)
        count = torch.cuda.get_device_properties(0).multi_processor_count * per_multiprocessor if x.is_cuda else 8
        tiles = triton.cdiv(n, bm * sub)
        self.groups = tiles if apart else max(1, min(tiles, count // self.members))
        self.sizes = dict(
            G=g, AL=a, F=f, EL=e, R=gr // g, AP=pow2(a, 16), EP=pow2(e, 16), CP=pow2(rf, 16), KP=pow2(gr, 16),
            BM=bm, SUB=sub, MEMBERS=self.members, GROUPS=self.groups,
        )  # fmt: skip
        room = (tiles if apart else 2 * self.groups) * g * rf * bm * sub
        self.y, self.dx = torch.full_like(dy, torch.nan), torch.full_like(x, torch.nan)
        self.z, self.dz = x.new_full((room,), torch.nan), x.new_full((room,), torch.nan)
        self.dA = A.new_full((self.groups * (self.members // g), *A.shape), torch.nan, dtype=torch.float32)
        self.dB = B.new_full((self.groups * (self.members // f), *B.shape), torch.nan, dtype=torch.float32)
        self.counters = torch.zeros(self.groups + 1, dtype=torch.int32, device=x.device)

    def launch(self, kernel, phases, *arguments):
        for phase in phases if self.apart else (0,):
            self.counters.zero_()
            kernel[(self.groups * self.members,)](*arguments, **self.sizes, PHASE=phase, num_warps=self.warps)

    def forward(self):
        x, _, A, B = self.inputs
        self.launch(_forward, (1, 2), x, A, B, self.y, self.z, self.counters, len(x), x.stride(0))
        return self.y

    def backward(self):
        x, dy, A, B = self.inputs
        tensors = (x, dy, A, B, self.dx, self.dA, self.dB, self.z, self.dz, self.counters)
        self.launch(_backward, (1, 2, 3), *tensors, len(x), x.stride(0), dy.stride(0))
        return self.dx, self.dA.sum(0), self.dB.sum(0)


def example(sizes, n, device, dtype):
    g, a, f, e, r = sizes
    torch.manual_seed(0)
    A, B = torch.randn(g, a, r * f, device=device) / a**0.5, torch.randn(f, g * r, e, device=device) / (g * r) ** 0.5
    x, dy = torch.randn(n, g * a, device=device), torch.randn(n, f * e, device=device)
    return [tensor.to(dtype) for tensor in (x, dy, A, B)]


def errors(streamed):
    x, dy, A, B = (tensor.double().requires_grad_() for tensor in streamed.inputs)
    y = x @ btt_matrix(A, B).T
    exact = [y, *torch.autograd.grad(y, (x, A, B), dy.detach())]
    return [((a - b).norm() / b.norm()).item() for a, b in zip([streamed.forward(), *streamed.backward()], exact)]


def main():
    if triton.knobs.runtime.interpret:
        for sizes, n in (((8, 16, 8, 16, 2), 150), ((6, 12, 3, 20, 1), 77), ((4, 16, 9, 16, 3), 40)):
            streamed = Streamed(*example(sizes, n, "cpu", torch.float32), bm=16, sub=2, apart=True)
            print(sizes, n, " ".join(f"{error:.1e}" for error in errors(streamed)))
        return
    for width, rank in ((4096, 1), (4096, 4), (2048, 1), (1024, 1), (1024, 4)):
        side = 2 ** (width.bit_length() // 2)  # γ, or twice α
        sizes = BTTSizes(side, width // side, width // side, side, rank)
        inputs = example(sizes, 32_768, "cuda", torch.bfloat16)
        x, dy, A, B = (tensor.requires_grad_() for tensor in inputs)
        staged = milliseconds(lambda: torch.autograd.grad(btt(x, A, B, "staged"), (x, A, B), dy), x.device, 5)
        print(f"{width} rank {rank}: staged {staged:.3f} ms", flush=True)
        for bm, sub, per, warps in (
            (64, 4, 2, 4),
            (128, 2, 2, 8),
            (64, 8, 2, 4),
            (64, 4, 4, 4),
            (128, 4, 1, 8),
            (64, 4, 1, 8),
        ):
            what = f"    {bm} tokens x {sub}, {per} programs a multiprocessor, {warps} warps: "
            try:
                small = Streamed(
                    *(t.detach()[:1000] if t is x or t is dy else t.detach() for t in (x, dy, A, B)),
                    bm,
                    sub,
                    per,
                    warps,
                )
                worst = max(errors(small))
                whole = Streamed(*(tensor.detach() for tensor in (x, dy, A, B)), bm, sub, per, warps)
                times = [milliseconds(part, x.device, 5) for part in (whole.forward, whole.backward)]
                print(f"{what}{times[0]:.3f} + {times[1]:.3f} = {sum(times):.3f} ms, error {worst:.1e}", flush=True)
            except triton.runtime.errors.OutOfResources as error:
                print(what + str(error))


if __name__ == "__main__":
    main()
