"""The kernels whose block sizes were swept for results/kernels.md, in the form that was timed (rows: sweep.json).

fwd and grads are the fused method with blocks of any size (kernels/btt.py takes whole cores only), t1 to t4 the staged method.
A row gives (BM, GB, FB, warps, stages) for fwd and grads, (BM, warps, parts, stages) for t1 to t4, and programs per multiprocessor.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(
    base,
    block,
    n,
    k,
    sb,
    sn,
    sk,
    BLOCKS: tl.constexpr,
    K: tl.constexpr,
    N,
    BB: tl.constexpr,
    KP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """(BB, BM, KP) tile of x (n, block, k)"""
    p = base + n[None, :, None].to(tl.int64) * sn + block[:, None, None] * sb + k[None, None, :] * sk
    if WHOLE and BLOCKS % BB == 0 and K == KP:
        return tl.load(p)
    mask = (n[None, :, None] < N) & (block[:, None, None] < BLOCKS) & (k[None, None, :] < K)
    return tl.load(p, mask, 0.0)


@triton.jit
def load_second(
    B,
    g0,
    f0,
    sf,
    sg,
    sr,
    se,
    G: tl.constexpr,
    EL: tl.constexpr,
    F: tl.constexpr,
    R: tl.constexpr,
    GB: tl.constexpr,
    EP: tl.constexpr,
    FB: tl.constexpr,
    RP: tl.constexpr,
):
    """(FB, GB*RP, EP) tile of B[f, g, r, e]; rows are (g r)."""
    f = f0 + tl.arange(0, FB)
    c = tl.arange(0, GB * RP)
    g = g0 + c // RP
    r = c % RP
    e = tl.arange(0, EP)
    p = B + f[:, None, None] * sf + (g * sg + r * sr)[None, :, None] + e[None, None, :] * se
    if G % GB == 0 and EL == EP and F % FB == 0 and R == RP:
        return tl.load(p)
    return tl.load(p, (f[:, None, None] < F) & ((g < G) & (r < R))[None, :, None] & (e[None, None, :] < EL), 0.0)


@triton.jit
def load_firstT(
    A,
    g0,
    f0,
    sg,
    sa,
    sr,
    sf,
    G: tl.constexpr,
    AL: tl.constexpr,
    F: tl.constexpr,
    R: tl.constexpr,
    GB: tl.constexpr,
    AP: tl.constexpr,
    FB: tl.constexpr,
    RP: tl.constexpr,
):
    """(GB, RP*FB, AP) tile of A[g, a, r, f]; rows are (r f)."""
    g = g0 + tl.arange(0, GB)
    a = tl.arange(0, AP)
    c = tl.arange(0, RP * FB)
    r = c // FB
    f = f0 + c % FB
    p = A + g[:, None, None] * sg + a[None, None, :] * sa + r[None, :, None] * sr + f[None, :, None] * sf
    if G % GB == 0 and AL == AP and F % FB == 0 and R == RP:
        return tl.load(p)
    return tl.load(p, (g[:, None, None] < G) & (a[None, None, :] < AL) & ((r < R) & (f < F))[None, :, None], 0.0)


@triton.jit
def fwd(
    x,
    A,
    B,
    y,
    N,
    sxn,
    syn,
    sAg,
    sAa,
    sAr,
    sAf,
    sBf,
    sBg,
    sBr,
    sBe,
    G: tl.constexpr,
    AL: tl.constexpr,
    F: tl.constexpr,
    EL: tl.constexpr,
    R: tl.constexpr,
    AP: tl.constexpr,
    EP: tl.constexpr,
    RP: tl.constexpr,
    BM: tl.constexpr,
    GB: tl.constexpr,
    FB: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    FBLOCKS: tl.constexpr = (F + FB - 1) // FB
    tiles = tl.cdiv(N, BM) * FBLOCKS
    k = tl.arange(0, AP)
    e = tl.arange(0, EP)
    RESIDENT: tl.constexpr = GB >= G and FB >= F
    if RESIDENT:
        At = load_firstT(A, 0, 0, sAg, sAa, sAr, sAf, G, AL, F, R, GB, AP, FB, RP)
        Bt = load_second(B, 0, 0, sBf, sBg, sBr, sBe, G, EL, F, R, GB, EP, FB, RP)
        for t in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
            n = t * BM + tl.arange(0, BM)
            xt = load_tile(x, tl.arange(0, GB), n, k, AL, sxn, 1, G, AL, N, GB, AP, WHOLE)
            z = tl.dot(At, xt.permute(0, 2, 1)).to(xt.dtype)  # (GB, RP*FB, BM)
            z = z.reshape(GB, RP, FB, BM).permute(2, 0, 1, 3).reshape(FB, GB * RP, BM)
            acc = tl.dot(z.permute(0, 2, 1), Bt)
            f = tl.arange(0, FB)
            p = y + n[None, :, None].to(tl.int64) * syn + f[:, None, None] * EL + e[None, None, :]
            tl.store(
                p, acc.to(y.dtype.element_ty), (n[None, :, None] < N) & (f[:, None, None] < F) & (e[None, None, :] < EL)
            )
    else:
        for t in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=1):
            f0 = (t % FBLOCKS) * FB
            n = (t // FBLOCKS) * BM + tl.arange(0, BM)
            acc = tl.zeros((FB, BM, EP), tl.float32)
            for g0 in tl.range(0, G, GB, num_stages=STAGES):
                xt = load_tile(x, g0 + tl.arange(0, GB), n, k, AL, sxn, 1, G, AL, N, GB, AP, WHOLE)
                At = load_firstT(A, g0, f0, sAg, sAa, sAr, sAf, G, AL, F, R, GB, AP, FB, RP)
                z = tl.dot(At, xt.permute(0, 2, 1)).to(xt.dtype)
                z = z.reshape(GB, RP, FB, BM).permute(2, 0, 1, 3).reshape(FB, GB * RP, BM)
                Bt = load_second(B, g0, f0, sBf, sBg, sBr, sBe, G, EL, F, R, GB, EP, FB, RP)
                acc = tl.dot(z.permute(0, 2, 1), Bt, acc)
            f = f0 + tl.arange(0, FB)
            p = y + n[None, :, None].to(tl.int64) * syn + f[:, None, None] * EL + e[None, None, :]
            tl.store(
                p, acc.to(y.dtype.element_ty), (n[None, :, None] < N) & (f[:, None, None] < F) & (e[None, None, :] < EL)
            )


@triton.jit
def grads(
    x,
    dy,
    A,
    B,
    dA,
    dB,
    dx,
    N,
    sxn,
    sdyn,
    sdxn,
    sAg,
    sAa,
    sAr,
    sAf,
    sBf,
    sBg,
    sBr,
    sBe,
    G: tl.constexpr,
    AL: tl.constexpr,
    F: tl.constexpr,
    EL: tl.constexpr,
    R: tl.constexpr,
    AP: tl.constexpr,
    EP: tl.constexpr,
    RP: tl.constexpr,
    BM: tl.constexpr,
    GB: tl.constexpr,
    FB: tl.constexpr,
    SPLITS: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    FBLOCKS: tl.constexpr = (F + FB - 1) // FB
    GBLOCKS: tl.constexpr = (G + GB - 1) // GB
    pid = tl.program_id(0)
    block = pid % (FBLOCKS * GBLOCKS)
    split = pid // (FBLOCKS * GBLOCKS)
    g0 = (block // FBLOCKS) * GB
    f0 = (block % FBLOCKS) * FB
    g = g0 + tl.arange(0, GB)
    f = f0 + tl.arange(0, FB)
    k = tl.arange(0, AP)
    e = tl.arange(0, EP)
    At = load_firstT(A, g0, f0, sAg, sAa, sAr, sAf, G, AL, F, R, GB, AP, FB, RP)
    Bt = load_second(B, g0, f0, sBf, sBg, sBr, sBe, G, EL, F, R, GB, EP, FB, RP)
    accA = tl.zeros((GB, RP * FB, AP), tl.float32)
    accB = tl.zeros((FB, GB * RP, EP), tl.float32)
    for t in tl.range(split, tl.cdiv(N, BM), SPLITS, num_stages=STAGES):
        n = t * BM + tl.arange(0, BM)
        xt = load_tile(x, g, n, k, AL, sxn, 1, G, AL, N, GB, AP, WHOLE)
        dyt = load_tile(dy, f, n, e, EL, sdyn, 1, F, EL, N, FB, EP, WHOLE)
        z = tl.dot(At, xt.permute(0, 2, 1)).to(xt.dtype)  # (GB, RP*FB, BM)
        z = z.reshape(GB, RP, FB, BM).permute(2, 0, 1, 3).reshape(FB, GB * RP, BM)
        accB = tl.dot(z, dyt, accB)
        dz = tl.dot(Bt, dyt.permute(0, 2, 1)).to(xt.dtype)  # (FB, GB*RP, BM)
        dz = dz.reshape(FB, GB, RP, BM).permute(1, 2, 0, 3).reshape(GB, RP * FB, BM)
        accA = tl.dot(dz, xt, accA)
        if FBLOCKS == 1:
            dxt = tl.dot(dz.permute(0, 2, 1), At)
            p = dx + n[None, :, None].to(tl.int64) * sdxn + g[:, None, None] * AL + k[None, None, :]
            tl.store(
                p,
                dxt.to(dx.dtype.element_ty),
                (n[None, :, None] < N) & (g[:, None, None] < G) & (k[None, None, :] < AL),
            )
    c = tl.arange(0, RP * FB)
    col = (c // FB) * F + f0 + c % FB
    p = dA + split * (G * AL * R * F) + (g[:, None, None] * AL + k[None, None, :]) * (R * F) + col[None, :, None]
    tl.store(
        p, accA, (g[:, None, None] < G) & (k[None, None, :] < AL) & ((c // FB < R) & (f0 + c % FB < F))[None, :, None]
    )
    c = tl.arange(0, GB * RP)
    row = (g0 + c // RP) * R + c % RP
    p = dB + split * (G * EL * R * F) + (f[:, None, None] * (G * R) + row[None, :, None]) * EL + e[None, None, :]
    tl.store(
        p, accB, (f[:, None, None] < F) & ((g0 + c // RP < G) & (c % RP < R))[None, :, None] & (e[None, None, :] < EL)
    )


# two stages with z transposed in memory: zT[g, c, n] with c = (r f); and seen from the other side zT[(g r), f, n]


@triton.jit
def t1(
    x,
    A,
    z,
    N,
    NP,
    sxn,
    G: tl.constexpr,
    AL: tl.constexpr,
    RF: tl.constexpr,
    AP: tl.constexpr,
    CB: tl.constexpr,
    BM: tl.constexpr,
    S,
    STAGES: tl.constexpr,
):
    """zT_g (RF, n) = A_g^T x_g^T"""
    CBLOCKS: tl.constexpr = (RF + CB - 1) // CB
    pid = tl.program_id(0)
    g = pid % G
    c = (pid // G) % CBLOCKS * CB + tl.arange(0, CB)
    split = pid // (G * CBLOCKS)
    k = tl.arange(0, AP)
    At = tl.load(A + g * (AL * RF) + k[:, None] * RF + c[None, :], (k[:, None] < AL) & (c[None, :] < RF), 0.0)
    for t in tl.range(split, tl.cdiv(N, BM), S, num_stages=STAGES):
        n = t * BM + tl.arange(0, BM)
        xt = tl.load(x + n[:, None].to(tl.int64) * sxn + g * AL + k[None, :], (n[:, None] < N) & (k[None, :] < AL), 0.0)
        zt = tl.dot(At.T, xt.T).to(z.dtype.element_ty)  # (CB, BM)
        tl.store(z + (g * RF + c)[:, None].to(tl.int64) * NP + n[None, :], zt, (c[:, None] < RF) & (n[None, :] < N))


@triton.jit
def t2(
    z,
    B,
    y,
    N,
    NP,
    syn,
    F: tl.constexpr,
    EL: tl.constexpr,
    GR: tl.constexpr,
    EP: tl.constexpr,
    KP: tl.constexpr,
    BM: tl.constexpr,
    S,
    STAGES: tl.constexpr,
):
    """y_f (n, E) = zT_f^T B_f"""
    pid = tl.program_id(0)
    f = pid % F
    split = pid // F
    k = tl.arange(0, KP)
    e = tl.arange(0, EP)
    Bt = tl.load(B + f * (GR * EL) + k[:, None] * EL + e[None, :], (k[:, None] < GR) & (e[None, :] < EL), 0.0)
    for t in tl.range(split, tl.cdiv(N, BM), S, num_stages=STAGES):
        n = t * BM + tl.arange(0, BM)
        zt = tl.load(z + (k * F + f)[:, None].to(tl.int64) * NP + n[None, :], (k[:, None] < GR) & (n[None, :] < N), 0.0)
        yt = tl.dot(zt.T, Bt)
        tl.store(
            y + n[:, None].to(tl.int64) * syn + f * EL + e[None, :],
            yt.to(y.dtype.element_ty),
            (n[:, None] < N) & (e[None, :] < EL),
        )


@triton.jit
def t3(
    z,
    dy,
    B,
    dz,
    dB,
    N,
    NP,
    sdyn,
    first,
    F: tl.constexpr,
    EL: tl.constexpr,
    GR: tl.constexpr,
    EP: tl.constexpr,
    KP: tl.constexpr,
    BM: tl.constexpr,
    S,
    STAGES: tl.constexpr,
):
    """dzT_f (GR, n) = B_f dy_f^T;  dB_f += zT_f dy_f"""
    pid = tl.program_id(0)
    f = pid % F
    split = pid // F
    k = tl.arange(0, KP)
    e = tl.arange(0, EP)
    maskB = (k[:, None] < GR) & (e[None, :] < EL)
    Bt = tl.load(B + f * (GR * EL) + k[:, None] * EL + e[None, :], maskB, 0.0)
    acc = tl.zeros((KP, EP), tl.float32)
    for t in tl.range(split, tl.cdiv(N, BM), S, num_stages=STAGES):
        n = t * BM + tl.arange(0, BM)
        dyt = tl.load(
            dy + n[:, None].to(tl.int64) * sdyn + f * EL + e[None, :], (n[:, None] < N) & (e[None, :] < EL), 0.0
        )
        at = (k * F + f)[:, None].to(tl.int64) * NP + n[None, :]
        zmask = (k[:, None] < GR) & (n[None, :] < N)
        zt = tl.load(z + at, zmask, 0.0)
        dzt = tl.dot(Bt, dyt.T)
        tl.store(dz + at, dzt.to(dz.dtype.element_ty), zmask)
        acc = tl.dot(zt, dyt, acc)
    p = dB + (split * F + f) * (GR * EL) + k[:, None] * EL + e[None, :]
    if first == 0:
        acc += tl.load(p, maskB, 0.0)
    tl.store(p, acc, maskB)


@triton.jit
def t4(
    dz,
    x,
    A,
    dx,
    dA,
    N,
    NP,
    sxn,
    sdxn,
    first,
    G: tl.constexpr,
    AL: tl.constexpr,
    RF: tl.constexpr,
    AP: tl.constexpr,
    CP: tl.constexpr,
    BM: tl.constexpr,
    S,
    STAGES: tl.constexpr,
):
    """dx_g (n, a) = dzT_g^T A_g^T;  dA_g^T (RF, a) += dzT_g x_g"""
    pid = tl.program_id(0)
    g = pid % G
    split = pid // G
    k = tl.arange(0, AP)
    c = tl.arange(0, CP)
    maskA = (k[None, :] < AL) & (c[:, None] < RF)
    At = tl.load(A + g * (AL * RF) + k[None, :] * RF + c[:, None], maskA, 0.0)  # (RF, a)
    acc = tl.zeros((CP, AP), tl.float32)
    for t in tl.range(split, tl.cdiv(N, BM), S, num_stages=STAGES):
        n = t * BM + tl.arange(0, BM)
        dzt = tl.load(
            dz + (g * RF + c)[:, None].to(tl.int64) * NP + n[None, :], (c[:, None] < RF) & (n[None, :] < N), 0.0
        )
        mask = (n[:, None] < N) & (k[None, :] < AL)
        xt = tl.load(x + n[:, None].to(tl.int64) * sxn + g * AL + k[None, :], mask, 0.0)
        dxt = tl.dot(dzt.T, At)
        tl.store(dx + n[:, None].to(tl.int64) * sdxn + g * AL + k[None, :], dxt.to(dx.dtype.element_ty), mask)
        acc = tl.dot(dzt, xt, acc)
    p = dA + (split * G + g) * (AL * RF) + k[None, :] * RF + c[:, None]
    if first == 0:
        acc += tl.load(p, maskA, 0.0)
    tl.store(p, acc, maskA)
