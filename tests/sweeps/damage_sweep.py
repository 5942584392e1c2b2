"""Damages checkpoints in thousands of ways: each must be noticed or be harmless.

    python tests/sweeps/damage_sweep.py                      # everything
    python tests/sweeps/damage_sweep.py --share 0.05         # of the cases of each kind
    python tests/sweeps/damage_sweep.py --only "('few', 'flip', 4711)"

Noticed: a CheckpointError. Harmless: the names, shapes, dtypes, values, metadata, the step and all
else that can be read are those of the undamaged file. Anything in between is wrong.
"""

import argparse
import ast
import os
import random
import sys
import tempfile

import h5py
import isolation
import numpy as np

import tf_h5_callback as h5
from tf_h5_callback._compat import extension_dtype
from tf_h5_callback.file import reader as checkpoint_reader
from tf_h5_callback.file.format import Monitored
from tf_h5_callback.file.writer import write_checkpoint

PAGE = 4096
# One with large attributes, too, in structures of HDF5 that have no checksums.
FLIPS = {"few": 7000, "many": 3000, "wordy": 2000}
COLUMNS = ["noticed", "harmless", "wrong", "escaped", "memory", "crash", "hang"]


def tensors_of(kind, seed):
    """A model; another seed gives the same model with other values."""
    rng = np.random.RandomState(seed)
    tensors = {"layer_{}/kernel:0".format(i): rng.rand(2, i % 7) for i in range(1100)}
    if kind != "many":
        tensors = {
            "rnn/cell/kernel:0": rng.rand(30, 40).astype("f4"),
            "rnn/cell/recurrent:0": rng.rand(30, 40).astype("f4"),
            "large:0": rng.rand(20000),
            "global_step:0": np.array(seed, "i8"),
            "empty:0": np.zeros((0, 3)),
            "flags:0": rng.rand(50) > 0.5,
            "complex:0": rng.rand(5) + 1j,
            "a name % with/all:0": np.arange(9, dtype="u1") + seed,
        }
        bfloat16 = extension_dtype("bfloat16")
        if bfloat16 is not None:
            tensors["bfloat16:0"] = rng.rand(8, 8).astype("f4").astype(bfloat16)
    tensors["table-keys"] = np.array([b"ends in NUL\0", b"\xff%d" % seed, b""], object)
    tensors["strings"] = np.array([[b"a", b"bc"]], object)
    return tensors


class Original:
    """An undamaged file: its content, what a reader gets out of it, and where its tensors are."""

    def __init__(self, folder, kind, seed=7, tensors=None):
        note = 70000 if kind == "wordy" else 9000
        self.path = os.path.join(folder, "model.ckpt-{}.h5".format(seed))
        write_checkpoint(
            self.path,
            tensors_of(kind, seed) if tensors is None else tensors,
            global_step=seed,
            tensorflow_version="1.15.5",
            metadata={"seed": seed, "note": "x" * note},
            monitored=Monitored("loss:0", "min", 1 / seed),
        )
        with open(self.path, "rb") as f:
            self.content = f.read()
        self.read = read(self.path)
        with h5py.File(self.path, "r") as f:
            ids = [f[key].id for key in f]
            self.extents = [(i.get_offset(), i.get_storage_size()) for i in ids if i.get_offset()]
            attributes = [np.asarray(f.attrs[key]).tobytes() for key in f.attrs]
        self.regions = np.full(len(self.content), "structures", object)
        for value in attributes:
            start = self.content.find(value) if len(value) > 8 else -1
            if start >= 0:
                self.regions[start : start + len(value)] = "attributes"
        for offset, size in self.extents:
            self.regions[offset : offset + size] = "tensors"


def read(path):
    """Everything that can be read; a tensor that is refused is None."""
    with h5.load_checkpoint(path) as checkpoint:
        everything = {
            "step": checkpoint.step,
            "metadata": checkpoint.metadata,
            "tensorflow_version": checkpoint.tensorflow_version,
            "written_at": checkpoint.written_at,
            "format_version": checkpoint.format_version,
            "monitored": checkpoint.monitored,
            "names": list(checkpoint),
        }
        for name in checkpoint:
            described = checkpoint.shape(name), checkpoint.dtype(name)
            try:
                value = checkpoint[name]
            except h5.CheckpointCorruptError:
                everything[":" + name] = None
                continue
            content = value.tolist() if value.dtype == object else value.tobytes()
            everything[":" + name] = described, value.shape, value.dtype.name, content
    return everything


def judge(path, original, is_another_file):
    try:
        got = read(path)
    except h5.CheckpointError as error:
        return "noticed", str(error)
    if is_another_file and described(got) != described(original):
        return "noticed", "by GraphState.check, which compares names, shapes and dtypes"
    wrong = [key for key in set(got) | set(original) if got.get(key, 0) != original.get(key, 0)]
    if any(got.get(key, 0) is not None for key in wrong):
        return "wrong", repr(wrong)
    return ("noticed" if wrong else "harmless"), ""


def described(everything):
    return {key: value and value[:1] for key, value in everything.items() if key[0] == ":"}


# --- the damage; each takes the content, a Random and what it is told by the case


def flip(content, corpus, bit):
    content[bit // 8] ^= 1 << bit % 8


def cut(content, corpus, size):
    del content[size:]


def garbage(content, corpus, size):
    content += (
        corpus.other.content
        if not size
        else random.Random(size).getrandbits(8 * size).to_bytes(size, "big")
    )


def zeros(content, corpus, start, size):
    content[start : start + size] = bytes(len(content[start : start + size]))


def noise(content, corpus, start, size):
    rng = random.Random(start)
    content[start : start + size] = bytes(rng.randrange(256) for _ in content[start : start + size])


def stale(content, corpus, start, size):
    """The disk kept the block of an older checkpoint that lay in the same place."""
    content[start : start + size] = corpus.older.content[start : start + size]


def misplaced(content, corpus, start, size, source):
    content[start : start + size] = content[source : source + len(content[start : start + size])]


def swapped(content, corpus, i, j):
    (a, size), (b, _) = corpus.original.extents[i], corpus.original.extents[j]
    content[a : a + size], content[b : b + size] = content[b : b + size], content[a : a + size]


def another(content, corpus, which):
    content[:] = (corpus.other, corpus.reshaped)[which].content


class Corpus:
    """The file that is damaged, and those of which the damage is made."""

    def __init__(self, folder, kind):
        self.kind = kind
        self.original = Original(folder, kind)
        assert judge(self.original.path, self.original.read, False) == ("harmless", "")
        assert None not in self.original.read.values()
        self.older = Original(folder, kind, seed=6)
        tensors = tensors_of(kind, 7)
        self.other = Original(folder, kind, 7, {"other/" + n: v for n, v in tensors.items()})
        self.reshaped = Original(
            folder, kind, 7, {n: v.reshape(1, *v.shape) for n, v in tensors.items()}
        )

    def cases(self, rng, flips):
        size = len(self.original.content)
        extents = self.original.extents
        regions = {
            region: np.flatnonzero(self.original.regions == region).tolist()
            for region in ("structures", "attributes", "tensors")
        }
        for i in range(flips):
            region = ("structures", "structures", "attributes", "tensors")[i % 4]
            yield "flip", 8 * rng.choice(regions[region]) + rng.randrange(8)
        for end in sorted({*range(0, size, PAGE), *range(max(0, size - PAGE), size)}):
            yield "cut", end
        for n in (0, 1, 2, 7, 8, 511, 512, PAGE, 100000):
            yield "garbage", n
        for block in (512, PAGE):
            for start in range(0, size, block):
                yield "zeros", start, block
                yield "stale", start, block
                yield "misplaced", start, block, rng.randrange(0, size, block)
        for _ in range(300):
            yield "noise", rng.randrange(size), rng.choice([2, 8, 64, 512])
            yield "noise", rng.choice(regions["structures"]), rng.choice([2, 8, 64])
        by_size = sorted(range(len(extents)), key=lambda i: extents[i][1])
        neighbours = zip(by_size, by_size[1:])
        pairs = [(i, j) for i, j in neighbours if extents[i][1] == extents[j][1]]
        for i, j in rng.sample(pairs, min(300, len(pairs))):
            yield "swapped", i, j
        yield "another", 0
        yield "another", 1


def make_blind(what):
    """Takes a check out of the reader, to prove that the sweep would notice."""

    class Right(int):
        def __ne__(self, other):
            return False

    if what == "tensors":
        checkpoint_reader.crc32 = lambda *data: Right()
    elif what == "attributes":
        checkpoint_reader.attributes_crc32 = lambda raw: Right()


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", type=float, default=1, help="of the cases of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=ast.literal_eval, metavar="CASE")
    parser.add_argument("--file", choices=list(FLIPS), help="by default all, one by one")
    parser.add_argument("--blind", choices=["tensors", "attributes"], help="leave out a check")
    arguments = parser.parse_args(argv)
    flips = {arguments.file: FLIPS[arguments.file]} if arguments.file else FLIPS
    make_blind(arguments.blind)
    with tempfile.TemporaryDirectory() as folder:
        corpora = {kind: Corpus(folder, kind) for kind in flips}
    rng = random.Random(arguments.seed)
    cases = [
        (kind, *case)
        for kind in flips
        for case in corpora[kind].cases(rng, flips[kind])
        if case[0] in ("another", "garbage") or rng.random() < arguments.share
    ]

    def run(case, folder):
        kind, damage, *how = case
        content = bytearray(corpora[kind].original.content)
        globals()[damage](content, corpora[kind], *how)
        path = os.path.join(folder, "model.ckpt-7.h5")
        with open(path, "wb") as f:
            f.write(content)
        return judge(path, corpora[kind].original.read, damage == "another")

    def group(outcome):
        kind, damage, *how = outcome.case
        where = " in " + corpora[kind].original.regions[how[0] // 8] if damage == "flip" else ""
        return "{}: {}{}".format(kind, damage, where)

    outcomes = list(isolation.run(run, [arguments.only] if arguments.only else cases))
    print("HDF5 {}, seed {}".format(h5py.version.hdf5_version, arguments.seed))
    print(isolation.table(outcomes, COLUMNS, group))
    return isolation.finish(outcomes)


if __name__ == "__main__":
    sys.exit(main())
