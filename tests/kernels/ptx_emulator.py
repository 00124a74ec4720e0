"""Runs the PTX of a compiled kernel on a CPU, all threads of a block in lockstep: Gluon kernels have no interpreter.

It also detects races (two warps access a word of shared memory between the same two barriers, and one of them writes) and
counts bank conflicts. Limits: all threads of a block must take the same branches, as they do in kernels that loop over
tiles; a cp.async copy takes effect at the wait that covers it; instructions that these kernels do not use raise an error.
"""

import re

import numpy as np

TYPES = {
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f32": np.float32, "pred": bool,
}  # fmt: skip
SHARED_MEMORY = 232_448  # bytes of a Hopper block


def bf16_bits(x):
    """float32 -> bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_float(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f16_bits(x):
    return np.ascontiguousarray(x, np.float32).astype(np.float16).view(np.uint16)


def f16_float(bits):
    return np.ascontiguousarray(bits.astype(np.uint16)).view(np.float16).astype(np.float32)


FORMATS = {"bf16": (bf16_bits, bf16_float), "f16": (f16_bits, f16_float)}


class Memory:
    """Global memory. An address is an offset into it."""

    def __init__(self, size=1 << 26):
        self.bytes, self.end = np.zeros(size, np.uint8), 512

    def put(self, array):
        """Stores an array -> its address, a multiple of 512."""
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        at = self.end
        assert at + raw.size <= self.bytes.size, "the memory is full"
        self.bytes[at : at + raw.size] = raw
        self.end = (at + raw.size + 511) // 512 * 512
        return at

    def get(self, at, dtype, shape):
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.bytes[at : at + count].view(dtype).reshape(shape).copy()


def parse(ptx):
    """-> lines of code, and {label: index of the next line}"""
    lines, labels = [], {}
    body = re.sub(r"//[^\n]*", "", ptx[ptx.index("{", ptx.index(".entry")) :])
    for line in (line.strip().rstrip(";").strip() for line in body.splitlines()):
        label = re.match(r"^(\$?[\w$]+):$", line)
        if label:
            labels[label[1]] = len(lines)
        elif line and not line.startswith((".", "'", '"')) and line not in "{}()":
            lines.append(line)
    return lines, labels


def run_grid(ptx, memory, params, warps, blocks):
    """Runs `blocks` blocks one after the other -> a Block each. params: numbers; a pointer is an address of `memory`."""
    program = parse(ptx)
    return [Block(program, memory, params, 32 * warps, block, blocks).run() for block in range(blocks)]


class Block:
    """One block of threads. A register is an array with one element for each thread."""

    def __init__(self, program, memory, params, threads, block, blocks):
        self.lines, self.labels = program
        self.memory, self.params, self.threads = memory, params, threads
        self.special = {
            "%tid.x": np.arange(threads), "%laneid": np.arange(threads) % 32,
            "%ctaid.x": np.full(threads, block), "%nctaid.x": np.full(threads, blocks),
        }  # fmt: skip
        self.registers = {}
        self.warp = np.arange(threads) // 32
        self.shared = np.full(SHARED_MEMORY, 0xFF, np.uint8)  # NaNs
        # For each 16-bit word of shared memory: number of barriers before its last write and read, and their warp (-2: several).
        self.written, self.written_by, self.read, self.read_by = (np.full(SHARED_MEMORY // 2, -1) for _ in range(4))
        self.barriers = 0
        self.copies, self.groups = [], []  # cp.async copies that are not committed, and committed groups
        self.races = []
        self.wavefronts, self.without_conflicts = {}, {}  # {instruction: count}, from the first matrix product on
        self.products = 0

    def run(self):
        at = 0
        while self.lines[at] != "ret":
            label = self.step(self.lines[at])
            at = self.labels[label] if label else at + 1
        return self

    def step(self, line):
        """Executes one line -> the label to jump to, or None."""
        self.line, active = line, None
        predicate = re.match(r"@(!?)(%p\d+)\s+(.*)", line)
        if predicate:
            active = self.registers[predicate[2]].astype(bool) ^ bool(predicate[1])
            line = predicate[3]
        name, _, rest = re.sub(r"\s+", " ", line).partition(" ")
        if name.startswith("bra"):
            assert active is None or active.all() or not active.any(), f"threads part ways: {line}"
            return rest.strip() if active is None or active.all() else None
        parts = name.split(".")
        execute = getattr(self, f"op_{parts[0]}", None)
        if execute is None:
            raise LookupError(f"the emulator does not know {line}")
        execute(parts, [arg.strip() for arg in re.split(r",(?![^{]*\})(?![^\[]*\])", rest)], active)

    # -- registers

    def get(self, name, dtype=np.uint32):
        """Values of a register or constant. A register of the same size as dtype is reinterpreted, not converted."""
        if name in self.special:
            return self.special[name].astype(dtype)
        if name.startswith("%"):
            value = self.registers[name]
            return value.view(dtype) if value.dtype.itemsize == np.dtype(dtype).itemsize else value.astype(dtype)
        if name.startswith("0f"):
            return np.full(self.threads, int(name[2:], 16), np.uint32).view(dtype)
        if name in ("global_smem", "true"):
            return np.full(self.threads, name == "true").astype(dtype)
        return np.full(self.threads, int(name, 0) & (2**64 - 1), np.uint64).astype(dtype)

    def put(self, name, value, active=None):
        if active is not None and not active.all():
            value = np.where(active, value, self.registers.get(name, np.zeros_like(value)))
        self.registers[name] = value

    def address(self, text):
        name, offset = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+))?\s*\]", text).groups()
        base = self.get(name, np.uint64) if name.startswith("%") else np.zeros(self.threads, np.uint64)
        return base.astype(np.int64) + int(offset or "0", 0)

    @staticmethod
    def names(text):
        return [name.strip() for name in text.strip("{} ").split(",")]

    # -- shared memory

    def touch(self, at, size, warp, write, lands_later=False):
        """Records accesses of `size` bytes at addresses `at`, and detects races."""
        for offset in range(0, size, 2):
            word = (at + offset) // 2
            race = (self.written[word] == self.barriers) & (self.written_by[word] != warp)
            if write:
                race |= (self.read[word] == self.barriers) & (self.read_by[word] != warp)
            if race.any():
                self.races.append(self.line)
            if write and not lands_later:
                self.written[word], self.written_by[word] = self.barriers, warp
            elif not write:
                several = (self.read[word] == self.barriers) & (self.read_by[word] != warp)
                self.read[word], self.read_by[word] = self.barriers, np.where(several, -2, warp)

    def count_conflicts(self, kind, at, size):
        """Counts the wavefronts of accesses of `size` bytes at addresses `at`, in thread order. One serves 128 bytes at most."""
        if not self.products:
            return  # cores are loaded once per launch
        for request in at.reshape(-1, max(1, 128 // max(size, 4))):
            words = np.unique((request[:, None] + np.arange(0, max(size, 4), 4)) // 4)
            self.wavefronts[kind] = self.wavefronts.get(kind, 0) + np.bincount(words % 32).max()
            self.without_conflicts[kind] = self.without_conflicts.get(kind, 0) + 1

    def conflicts(self):
        """{instruction: wavefronts, as a multiple of those without bank conflicts}, from the first matrix product on"""
        return {kind: count / self.without_conflicts[kind] for kind, count in self.wavefronts.items()}

    # -- arithmetic

    def elementwise(self, parts, args, active, function):
        dtype = TYPES[parts[-1]]
        with np.errstate(over="ignore"):
            self.put(args[0], function(*(self.get(arg, dtype) for arg in args[1:])).astype(dtype), active)

    def op_add(self, parts, args, active):
        self.elementwise(parts, args, active, lambda x, y: x + y)

    def op_sub(self, parts, args, active):
        self.elementwise(parts, args, active, lambda x, y: x - y)

    def op_and(self, parts, args, active):
        self.elementwise(parts, args, active, lambda x, y: x & y)

    def op_or(self, parts, args, active):
        self.elementwise(parts, args, active, lambda x, y: x | y)

    def op_xor(self, parts, args, active):
        self.elementwise(parts, args, active, lambda x, y: x ^ y)

    def op_not(self, parts, args, active):
        self.elementwise(parts, args, active, lambda x: ~x)

    def op_neg(self, parts, args, active):
        self.elementwise(parts, args, active, lambda x: -x)

    def op_min(self, parts, args, active):
        self.elementwise(parts, args, active, np.minimum)

    def op_max(self, parts, args, active):
        self.elementwise(parts, args, active, np.maximum)

    def op_fma(self, parts, args, active):
        self.elementwise(parts, args, active, lambda x, y, z: x * y + z)

    def op_tanh(self, parts, args, active):
        self.elementwise(parts, args, active, np.tanh)

    def op_shl(self, parts, args, active):
        dtype = TYPES[parts[-1]]
        self.put(args[0], (self.get(args[1], dtype) << self.get(args[2]).astype(dtype)).astype(dtype), active)

    def op_shr(self, parts, args, active):
        dtype = TYPES[parts[-1]]
        self.put(args[0], (self.get(args[1], dtype) >> self.get(args[2]).astype(dtype)).astype(dtype), active)

    def op_mul(self, parts, args, active):
        self.op_mad(parts, [*args, "0"], active)

    def op_mad(self, parts, args, active):
        dtype = TYPES[parts[-1]]
        wide = dtype if parts[1] not in ("wide", "hi") else np.int64 if parts[-1][0] == "s" else np.uint64
        assert parts[1] != "hi" or dtype().itemsize == 4, self.line
        with np.errstate(over="ignore"):
            product = self.get(args[1], dtype).astype(wide) * self.get(args[2], dtype).astype(wide)
            if parts[1] == "hi":
                product, wide = (product >> wide(32)).astype(dtype), dtype
            self.put(args[0], (product + self.get(args[3], wide)).astype(wide), active)

    def op_bfe(self, parts, args, active):
        dtype = TYPES[parts[-1]]
        start, length = int(args[2], 0), int(args[3], 0)
        bits = 8 * np.dtype(dtype).itemsize
        value = self.get(args[1], dtype) << dtype(bits - start - length)
        self.put(args[0], (value >> dtype(bits - length)).astype(dtype), active)

    def op_setp(self, parts, args, active):
        compare = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal}
        dtype = TYPES[parts[-1]]
        function = {**compare, "ne": np.not_equal}[parts[1]]
        self.put(args[0], function(self.get(args[1], dtype), self.get(args[2], dtype)), active)

    def op_selp(self, parts, args, active):
        dtype = TYPES[parts[-1]]
        chosen = self.registers[args[3]].astype(bool)
        self.put(args[0], np.where(chosen, self.get(args[1], dtype), self.get(args[2], dtype)), active)

    # -- moves and conversions

    def op_mov(self, parts, args, active):
        to, value = args
        if value.startswith("{"):  # two halves into a word
            low, high = (self.get(name, np.uint16).astype(np.uint32) for name in self.names(value))
            self.put(to, low | (high << 16), active)
        elif to.startswith("{"):
            word = self.get(value)
            for name, half in zip(self.names(to), (word & 0xFFFF, word >> 16)):
                if name != "_":
                    self.put(name, half.astype(np.uint16), active)
        else:
            self.put(to, self.get(value, TYPES[parts[-1]]), active)

    def op_cvt(self, parts, args, active):
        to, source = parts[-2:]
        if to in ("bf16x2", "f16x2"):
            bits = FORMATS[to[:-2]][0]
            high, low = (bits(self.get(arg, np.float32)).astype(np.uint32) for arg in args[1:])
            self.put(args[0], (high << 16) | low, active)
        elif to in FORMATS:
            self.put(args[0], FORMATS[to][0](self.get(args[1], np.float32)), active)
        elif source in FORMATS:
            self.put(args[0], FORMATS[source][1](self.get(args[1], np.uint16)), active)
        else:
            self.put(args[0], self.get(args[1], TYPES[source]).astype(TYPES[to]), active)

    def op_shfl(self, parts, args, active):
        assert parts[1:3] == ["sync", "idx"]
        value, lane = self.get(args[1]).reshape(-1, 32), (self.get(args[2]) & 31).astype(int).reshape(-1, 32)
        self.put(args[0], np.take_along_axis(value, lane, 1).reshape(-1), active)

    # -- memory

    def op_bar(self, parts, args, active):
        self.barriers += 1

    def op_ld(self, parts, args, active):
        dtype = TYPES[parts[-1]]
        if parts[1] == "param":
            value = self.params[int(re.search(r"param_(\d+)", args[1])[1])]
            return self.put(args[0], np.full(self.threads, value).astype(dtype))
        self.access(parts, args[0], self.address(args[1]), active, write=False)

    def op_st(self, parts, args, active):
        self.access(parts, args[1], self.address(args[0]), active, write=True)

    def access(self, parts, registers, at, active, write):
        dtype, names = TYPES[parts[-1]], self.names(registers)
        size, memory = np.dtype(dtype).itemsize, self.memory.bytes
        on = np.ones(self.threads, bool) if active is None else active
        assert not (at[on] % (size * len(names))).any(), f"not aligned: {self.line}"
        if parts[1] == "shared":
            memory = self.shared
            self.touch(at[on], size * len(names), self.warp[on], write)
            if on.all():
                self.count_conflicts(".".join(parts[:2]), at, size * len(names))
        for i, name in enumerate(names):
            index = np.where(on, (at + i * size) // size, 0)
            if write:
                memory.view(dtype)[index[on]] = self.get(name, dtype)[on]
            else:
                self.put(name, memory.view(dtype)[index], active)

    def op_cp(self, parts, args, active):
        if "commit_group" in parts:
            self.groups.append(self.copies)
            self.copies = []
        elif "wait_group" in parts:
            while len(self.groups) > int(args[0], 0):
                for at, data, warp in self.groups.pop(0):
                    self.shared.reshape(-1, 16)[at // 16] = data
                    for word in range(0, 16, 2):
                        self.written[(at + word) // 2], self.written_by[(at + word) // 2] = self.barriers, warp
        else:
            assert int(args[2], 0) == 16, f"copies of 16 bytes only: {self.line}"
            on = np.ones(self.threads, bool) if active is None else active
            size = self.get(args[3], np.int32)[on] if len(args) > 3 else np.full(on.sum(), 16)
            at, source = self.address(args[0])[on], np.where(size > 0, self.address(args[1])[on], 0)
            assert not (source % 16).any() and not (at % 16).any(), f"not aligned: {self.line}"
            self.touch(at, 16, self.warp[on], True, lands_later=True)
            if on.all():
                self.count_conflicts("cp.async", at, 16)
            data = np.where(size[:, None] > 0, self.memory.bytes.reshape(-1, 16)[source // 16], np.uint8(0))
            self.copies.append((at, data, self.warp[on]))

    def matrices(self, args, parts, kind, write):
        """For ldmatrix and stmatrix: each register's name, and the indices (warps, 8, 8) of the 16-bit words of its matrix."""
        names, at = self.names(args[1 if write else 0]), self.address(args[0 if write else 1]).reshape(-1, 32)
        for i, name in enumerate(names):
            rows = at[:, 8 * i : 8 * i + 8]
            self.count_conflicts(kind, rows.reshape(-1), 16)
            self.touch(rows.reshape(-1), 16, np.repeat(np.arange(self.threads // 32), 8), write)
            yield name, rows[:, :, None] // 2 + np.arange(8)

    def op_ldmatrix(self, parts, args, active):
        for name, words in self.matrices(args, parts, "ldmatrix", write=False):
            matrix = self.shared.view(np.uint16)[words]
            matrix = matrix.transpose(0, 2, 1) if "trans" in parts else matrix
            pairs = matrix.reshape(-1, 2).astype(np.uint32)
            self.put(name, pairs[:, 0] | (pairs[:, 1] << 16))

    def op_stmatrix(self, parts, args, active):
        for name, words in self.matrices(args, parts, "stmatrix", write=True):
            value = self.get(name)
            matrix = np.stack([value & 0xFFFF, value >> 16], -1).astype(np.uint16).reshape(-1, 8, 8)
            self.shared.view(np.uint16)[words] = matrix.transpose(0, 2, 1) if "trans" in parts else matrix

    def op_mma(self, parts, args, active):
        assert "m16n8k16" in parts, self.line
        self.products += 1
        to_float = FORMATS[parts[-2]][1]
        to, a, b, c = (self.names(arg) for arg in args)
        warps, group, quad = self.threads // 32, np.arange(32) // 4, np.arange(32) % 4
        left, right = np.zeros((warps, 16, 16), np.float32), np.zeros((warps, 16, 8), np.float32)
        for i, name in enumerate(a):
            word, row, column = self.get(name).reshape(warps, 32), group + 8 * (i % 2), 2 * quad + 8 * (i // 2)
            left[:, row, column], left[:, row, column + 1] = to_float(word & 0xFFFF), to_float(word >> 16)
        for i, name in enumerate(b):
            word, row = self.get(name).reshape(warps, 32), 2 * quad + 8 * i
            right[:, row, group], right[:, row + 1, group] = to_float(word & 0xFFFF), to_float(word >> 16)
        product = left @ right
        for i, name in enumerate(to):
            mine = product[:, group + 8 * (i // 2), 2 * quad + i % 2].reshape(-1)
            self.put(name, self.get(c[i], np.float32) + mine)
