"""``tf-h5``: looks into checkpoints, without TensorFlow."""

from __future__ import annotations

import argparse
import os
import sys
from typing import List, Optional

from tf_h5_callback import __version__
from tf_h5_callback.errors import CheckpointError, CheckpointNotFoundError
from tf_h5_callback.file.reader import Checkpoint
from tf_h5_callback.folder.directory import DEFAULT_BASENAME
from tf_h5_callback.folder.reading import list_checkpoints, load_checkpoint, no_checkpoint_in


def main(argv: Optional[List[str]] = None) -> int:
    """Runs a command.

    Args:
      argv: the arguments, by default those of the process.

    Returns:
      The exit code: 0, or 1 where a checkpoint is missing or damaged (2 for a wrong usage).
    """
    parser = argparse.ArgumentParser(prog="tf-h5", description="Looks into HDF5 checkpoints.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.required = True

    command = commands.add_parser("list", help="list the checkpoints of a folder, oldest first")
    command.add_argument("dir", help="the folder")
    command.add_argument("--basename", default=DEFAULT_BASENAME, help="default: %(default)s")
    command.set_defaults(run=_list)

    command = commands.add_parser("show", help="show what a checkpoint holds")
    command.add_argument("path", help="a checkpoint, or a folder for its newest intact one")
    command.set_defaults(run=_show)

    command = commands.add_parser("verify", help="compare all checksums")
    command.add_argument(
        "paths", nargs="+", metavar="path", help="checkpoints, or folders for all of theirs"
    )
    command.add_argument("--basename", default=DEFAULT_BASENAME, help="default: %(default)s")
    command.set_defaults(run=_verify)

    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except CheckpointError as error:
        print("tf-h5: {}".format(error), file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, head for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _list(args: argparse.Namespace) -> int:
    for step, path in list_checkpoints(args.dir, args.basename):
        print("{:>12}  {}".format(step, path))
    return 0


def _show(args: argparse.Namespace) -> int:
    with load_checkpoint(args.path) as checkpoint:
        print("checkpoint:         {}".format(checkpoint.path))
        print("global step:        {}".format(checkpoint.step))
        print("written at:         {}".format(checkpoint.written_at))
        print("TensorFlow version: {}".format(checkpoint.tensorflow_version))
        print("metadata:           {}".format(checkpoint.metadata))
        if checkpoint.monitored is not None:
            print(
                "monitored:          {0.name} = {0.value} ({0.mode})".format(checkpoint.monitored)
            )
        if checkpoint.metrics:
            print("metrics:            {}".format(checkpoint.metrics))
        for name in checkpoint:
            shape = "x".join(map(str, checkpoint.shape(name))) or "scalar"
            print("  {:<48} {:<10} {}".format(name, checkpoint.dtype(name), shape))
        print("{} tensors, {:,} bytes".format(len(checkpoint), checkpoint.nbytes))
    return 0


def _verify(args: argparse.Namespace) -> int:
    failed = 0
    for path in args.paths:
        paths = [path]
        if os.path.isdir(path):
            paths = [checkpoint for _, checkpoint in list_checkpoints(path, args.basename)]
            if not paths:
                failed += 1
                print("MISSING  {}".format(no_checkpoint_in(path, args.basename)))
        for path in paths:
            try:
                with Checkpoint(path) as checkpoint:
                    checkpoint.verify()
                print("intact   {}".format(path))
            except CheckpointError as error:
                failed += 1
                missing = isinstance(error, CheckpointNotFoundError)
                print("{}  {}".format("MISSING" if missing else "DAMAGED", error))
    return 1 if failed else 0
