"""Mutates valid files and reads them: only CheckpointErrors may come out.

    python tests/sweeps/fuzz.py --cases 100000 --seed 0
    python tests/sweeps/fuzz.py --cases 1 --seed 4711      # one case again

Two kinds of files are mutated: ours, whose structures have checksums, which are repaired after half
of the mutations; and files of other programs, without checksums, which lead deep into libhdf5.
"""

import argparse
import os
import random
import re
import struct
import sys
import tempfile

import h5py
import isolation
import numpy as np

import tf_h5_callback as h5
from tf_h5_callback.file.writer import write_checkpoint


def lookup3(data, initial=0):
    """The checksum of HDF5's structures: hashlittle() of Bob Jenkins, lookup3.c, public domain."""
    mask = 0xFFFFFFFF

    def rot(x, k):
        return (x << k | x >> (32 - k)) & mask

    a = b = c = (0xDEADBEEF + len(data) + initial) & mask
    if not data:
        return c
    words = struct.unpack("<{}I".format(-(-len(data) // 12) * 3), data + bytes(-len(data) % 12))
    for i in range(0, len(words) - 3, 3):
        a, b, c = (a + words[i]) & mask, (b + words[i + 1]) & mask, (c + words[i + 2]) & mask
        for k, m, n in ((4, 6, 8), (16, 19, 4)):
            a = ((a - c) & mask) ^ rot(c, k)
            c = (c + b) & mask
            b = ((b - a) & mask) ^ rot(a, m)
            a = (a + c) & mask
            c = ((c - b) & mask) ^ rot(b, n)
            b = (b + a) & mask
    a, b, c = (a + words[-3]) & mask, (b + words[-2]) & mask, (c + words[-1]) & mask
    c = ((c ^ b) - rot(b, 14)) & mask
    a = ((a ^ c) - rot(c, 11)) & mask
    b = ((b ^ a) - rot(a, 25)) & mask
    c = ((c ^ b) - rot(b, 16)) & mask
    a = ((a ^ c) - rot(c, 4)) & mask
    b = ((b ^ a) - rot(a, 14)) & mask
    return ((c ^ b) - rot(b, 24)) & mask


class Block:
    """A structure with a checksum, from ``start`` to ``end``; the checksum is at ``place``."""

    def __init__(self, start, end, place):
        self.start, self.end, self.place = start, end, place

    def checksum(self, content):
        if self.place + 4 == self.end:
            return lookup3(bytes(content[self.start : self.place]))
        body = bytearray(content[self.start : self.end])  # direct blocks of heaps
        body[self.place - self.start : self.place - self.start + 4] = bytes(4)
        return lookup3(bytes(body))

    def is_valid(self, content):
        return self.stored(content) == self.checksum(content)

    def stored(self, content):
        return int.from_bytes(content[self.place : self.place + 4], "little")

    def repair(self, content):
        content[self.place : self.place + 4] = self.checksum(content).to_bytes(4, "little")


def checksummed_blocks(content):
    """All structures with a checksum: every possible size is tried until the sum is right."""
    blocks = []
    for match in re.finditer(
        rb"\x89HDF\r\n\x1a\n[\x02\x03]|OHDR|OCHK|FRHP|FHDB|FHIB|BTHD|BTIN|BTLF", content
    ):
        start = match.start()
        for end, place in _candidates(content, start, match.group()):
            block = Block(start, end, place)
            if end <= len(content) and block.is_valid(content):
                blocks.append(block)
                break
    return blocks


def _candidates(content, start, signature):
    if signature[0] == 0x89:
        yield start + 48, start + 44
    elif signature == b"OHDR":
        flags = content[start + 5]
        width = 1 << (flags & 3)
        place = start + 6 + 16 * bool(flags & 32) + 4 * bool(flags & 16)
        place += width + int.from_bytes(content[place : place + width], "little")
        yield place + 4, place
    elif signature == b"OCHK":
        # Where the message says that leads here: address, length.
        for match in re.finditer(re.escape(struct.pack("<Q", start)), content):
            length = int.from_bytes(content[match.end() : match.end() + 8], "little")
            if 8 <= length <= 1 << 16:
                yield start + length, start + length - 4
    elif signature == b"FHDB":
        for size in (1 << n for n in range(9, 17)):
            for width in range(1, 9):
                yield start + size, start + 13 + width
    else:
        for place in range(start + 6, min(start + 5000, len(content) - 4)):
            # lookup3 depends on the length: only a place whose 4 bytes look random is tried.
            if signature in (b"BTIN", b"BTLF", b"FHIB") and (place - start) > 600:
                if content[place + 4 : place + 8].count(0) < 4:
                    continue
            yield place + 4, place


# --- the files that are mutated


def write_ours(path, tensors, metadata=None):
    write_checkpoint(path, tensors, global_step=7, tensorflow_version="1.15.5", metadata=metadata)


def write_loop(path, tensors, libver):
    """The loop of the blog post."""
    with h5py.File(path, "w", libver=libver) as f:
        for name, value in tensors.items():
            f.create_dataset(name.replace("/", " "), data=value)
        f.attrs["tensorflow_version"] = np.bytes_("1.8.0")
        f.attrs["global_step"] = 7


def write_everything(path, libver):
    """What a checkpoint does not have: groups, links, chunks, filters, types of all kinds."""
    with h5py.File(path, "w", libver=libver) as f:
        f["text"] = "variable"
        f.create_dataset(
            "texts", data=[b"a", b"", b"ccc" * 9], dtype=h5py.special_dtype(vlen=bytes)
        )
        f.create_group("group")["w"] = np.arange(3)
        f["soft"] = h5py.SoftLink("/group/w")
        f["external"] = h5py.ExternalLink("elsewhere.h5", "/w")
        f.create_dataset("chunked", data=np.arange(9), chunks=(3,), compression="gzip")
        f.create_dataset("fletcher", data=np.arange(9), chunks=(3,), fletcher32=True, shuffle=True)
        f.create_dataset("compound", data=np.zeros(2, [("a", "i4"), ("b", "f8", 2), ("c", "S3")]))
        f.create_dataset("ragged", (2,), h5py.special_dtype(vlen=np.dtype("i4")))
        f["type"] = np.dtype([("r", "f4"), ("i", "f4")])
        f.create_dataset("shared", (3,), f["type"])
        f["reference"] = f["text"].ref
        f["nothing"] = h5py.Empty("f4")
        f["opaque"] = np.zeros(2, "V7")
        compact = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        compact.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple((3,))
        h5py.h5d.create(f.id, b"compact", h5py.h5t.STD_I32LE, space, compact)
        f.attrs["tensorflow_version"] = "1.8.0"
        f.attrs["metadata"] = np.arange(100)
        f.attrs["global_step"] = 7
        f["text"].attrs["big"] = np.zeros(1000)


def corpus(folder):
    """name -> content"""
    few = {
        "rnn/cell/kernel:0": np.arange(6, dtype="f4").reshape(2, 3),
        "b:0": np.array([1 + 2j], "c8"),
        "flag:0": np.array(True),
        "empty:0": np.zeros((0, 3)),
        "a b": np.arange(3),
    }
    strings = {"table-keys": np.array([b"ends in NUL\0", b"x"], object)}
    many = {"layer_{}/kernel:0".format(i): np.array(i, "i2") for i in range(60)}
    loops = {**few, "note": np.array(b"x" * 7)}
    makers = {
        "ours few": lambda path: write_ours(path, {**few, **strings}),
        "ours none": lambda path: write_ours(path, {}, {"a": [1]}),
        "ours many": lambda path: write_ours(path, {**many, **strings}, {"note": "x" * 9000}),
        "loop few": lambda path: write_loop(path, loops, "earliest"),
        "loop many": lambda path: write_loop(path, many, "earliest"),
        "loop latest": lambda path: write_loop(path, loops, "latest"),
        "others earliest": lambda path: write_everything(path, "earliest"),
        "others latest": lambda path: write_everything(path, "latest"),
    }
    contents = {}
    for name, make in makers.items():
        path = os.path.join(folder, name)
        make(path)
        with open(path, "rb") as f:
            contents[name] = f.read()
    return contents


# --- mutating

INTERESTING = [0, 1, 2, 3, 4, 7, 8, 0x7F, 0x80, 0xFE, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000]
INTERESTING += [1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 48, (1 << 63) - 1]
INTERESTING += [1 << 63, (1 << 64) - 1, (1 << 64) - 8]


def mutate(content, places, rng):
    """Changes 1 to 6 places of a bytearray, mostly of its structures."""
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        if not content:
            return
        at = min(rng.choice(places), len(content) - 1)
        action = rng.randrange(12)
        if action < 3:
            content[at] ^= 1 << rng.randrange(8)
        elif action < 5:
            content[at] = rng.choice([0, 1, 2, 3, 4, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif action < 9:
            # A size or an address: an extreme one, one nearby, or the place of something else.
            width = rng.choice([1, 2, 4, 8, 8])
            old = int.from_bytes(content[at : at + width], "little")
            value = rng.choice(
                [
                    rng.choice(INTERESTING),
                    old + rng.choice([-8, -1, 1, 8]),
                    rng.choice(places),
                    rng.choice(places) & ~7,
                    at,
                    len(content),
                    old << 1,
                ]
            )
            place = at & ~(width - 1) if rng.random() < 0.5 else at
            content[place : place + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
            del content[max(len(content), 0) :]
        elif action == 9:
            size, source = rng.choice([1, 4, 8, 16, 24, 40, 128]), rng.choice(places)
            chunk = content[source : source + size]
            content[at : at + len(chunk)] = chunk
        elif action == 10:
            size = rng.choice([1, 2, 8, 64])
            if rng.random() < 0.5:
                del content[at : at + size]
            else:
                content[at:at] = bytes(rng.randrange(256) for _ in range(size))
        else:
            size = rng.choice([1, 2, 4, 8, 32, 256])
            content[at : at + size] = bytes([rng.choice([0, 0xFF])]) * len(content[at : at + size])
    if rng.random() < 0.02:
        del content[rng.randrange(len(content) + 1) :]


class Mutator:
    """Makes the content of a case from its seed."""

    def __init__(self, contents):
        self.contents = contents
        self.blocks = {name: checksummed_blocks(content) for name, content in contents.items()}
        self.places = {name: self._places(name) for name in contents}

    def _places(self, name):
        """Where to mutate: anything, but data and the zeros of unused space seldom."""
        content = self.contents[name]
        inside = [i for block in self.blocks[name] for i in range(block.start, block.end)]
        used = [i for i, byte in enumerate(content) if byte or any(content[max(0, i - 8) : i + 8])]
        return (inside + used) or list(range(len(content)))

    def choose(self, rng):
        """The file, and whether its checksums are to be forged."""
        name = rng.choice(sorted(self.contents))
        return name, bool(self.blocks[name]) and rng.random() < 0.8

    def __call__(self, seed):
        rng = random.Random(seed)
        name, forge = self.choose(rng)
        original = self.contents[name]
        content = bytearray(original)
        mutate(content, self.places[name], rng)
        for block in self.blocks[name] if forge and len(content) == len(original) else ():
            if content[block.start : block.end] != original[block.start : block.end]:
                block.repair(content)
        return bytes(content)

    def group(self, seed):
        name, forge = self.choose(random.Random(seed))
        return name + ", forged" * forge


IS_HARDENED = tuple(map(int, h5py.version.hdf5_version.split(".")[:2])) >= (1, 14)


def is_known(group):
    """Crashes, and hundreds of MB, that we cannot prevent: see docs/reliability.rst."""
    return group.endswith("forged") or not IS_HARDENED


def read_everything(path):
    """All that a caller can do with a checkpoint; returns the names of what was read."""
    read, refused = [], None
    with h5.load_checkpoint(path) as checkpoint:
        repr(checkpoint), checkpoint.nbytes, checkpoint.step, checkpoint.metadata
        for name in checkpoint:
            shape, _ = checkpoint.shape(name), checkpoint.dtype(name)
            try:
                assert checkpoint[name].shape == shape, name
            except h5.CheckpointError as error:
                refused = error
            else:
                read.append(name)
    if refused is not None:
        raise refused
    return read


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=100000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", metavar="FILE", help="write the first case to a file and stop")
    parser.add_argument("--only", default="", help="a part of the name of the files to mutate")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        contents = corpus(folder)
        for name in contents:
            if name.startswith(("ours", "loop")):
                read_everything(os.path.join(folder, name))
    mutator = Mutator({k: v for k, v in contents.items() if arguments.only in k})
    if arguments.keep:
        with open(arguments.keep, "wb") as f:
            f.write(mutator(arguments.seed))
        return 0

    def case(seed, folder):
        path = os.path.join(folder, "model.ckpt-7.h5")
        content = mutator(seed)
        with open(path, "wb") as f:
            f.write(content)
        try:
            read_everything(path)
        except h5.CheckpointError as error:
            if isinstance(error.__cause__, MemoryError):
                return "escaped", "MemoryError: " + str(error)
            return "refused", str(error)
        return "read", ""

    seeds = range(arguments.seed, arguments.seed + arguments.cases)
    # Each kind in children of its own: libhdf5 may survive a forged file with its memory damaged.
    forged = [seed for seed in seeds if mutator.group(seed).endswith("forged")]
    plain = sorted(set(seeds) - set(forged))
    outcomes = [*isolation.run(case, plain), *isolation.run(case, forged)]
    known = [
        outcome
        for outcome in outcomes
        if outcome.kind in ("crash", "hang", "memory") and is_known(mutator.group(outcome.case))
    ]
    outcomes = [o._replace(kind="libhdf5") if o in known else o for o in outcomes]
    print("HDF5 {}, seeds {} to {}".format(h5py.version.hdf5_version, seeds[0], seeds[-1]))
    columns = ["refused", "read", "escaped", "memory", "hang", "crash", "libhdf5"]
    print(isolation.table(outcomes, columns, lambda outcome: mutator.group(outcome.case)))
    print("in libhdf5:", " ".join(str(o.case) for o in known[:20]), "..." * (len(known) > 20))
    if len(known) > max(3, arguments.cases * (0.003 if IS_HARDENED else 0.05)):
        print("libhdf5 fails more often than it did: a check before it may have been lost")
        return 1
    return isolation.finish(outcomes)


if __name__ == "__main__":
    sys.exit(main())
