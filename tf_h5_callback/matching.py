"""What of a checkpoint fits a graph, and what to say of the rest."""

from __future__ import annotations

import logging
import re
from typing import Any, Dict, Mapping

import tensorflow.compat.v1 as tf

from tf_h5_callback.errors import CheckpointMismatchError
from tf_h5_callback.restore import EVERYTHING, Restore, rnn_names_of_tensorflow_1_2
from tf_h5_callback.setters import Item

_log = logging.getLogger("tf_h5_callback")


def match(
    items: Mapping[str, Item],
    checkpoint: Any,
    restore: Restore = EVERYTHING,
    ignore_extra: bool = False,
) -> Dict[str, str]:
    """Finds out what of a checkpoint belongs where in a graph.

    Args:
      items: name in the graph -> item.
      checkpoint: an open one.
      restore: says who belongs to whom, and whether all must fit.
      ignore_extra: tensors of the file that the graph does not have are no difference.

    Returns:
      ``{name in the graph: name in the file}`` of all that fit in name, shape and dtype.

    Raises:
      CheckpointMismatchError: with ``restore.strict``, something does not; lists it all.
    """
    matches: Dict[str, str] = {}
    differences = []
    for in_file, in_graph in restore.pairs(checkpoint, items):
        item = None if in_graph is None else items.get(in_graph)
        if item is None and ignore_extra:
            continue
        file_has = graph_has = "no such tensor"
        fits = False
        if item is not None:
            graph_has = "{} {}".format(item.dtype.name, item.shape)
        if in_file is not None and in_file in checkpoint:
            shape, dtype = tf.TensorShape(checkpoint.shape(in_file)), checkpoint.dtype(in_file)
            file_has = "{} {}".format(dtype, shape)
            if item is not None and in_graph is not None:
                same_dtype = item.dtype.name == dtype
                can_cast = restore.cast and "string" not in (dtype, item.dtype.name)
                fits = item.shape.is_compatible_with(shape) and (same_dtype or can_cast)
                if fits:
                    matches[in_graph] = in_file
        if not fits:
            names = dict.fromkeys(name for name in (in_file, in_graph) if name)
            differences.append(
                "  {}: file {}, graph {}".format(" -> ".join(names), file_has, graph_has)
            )
    if not differences:
        return matches
    table = "\n".join(differences)
    if restore.strict:
        raise CheckpointMismatchError(
            "checkpoint {} does not fit the graph; nothing was restored:\n{}\n{}".format(
                checkpoint.path, table, _advice(items, checkpoint, restore)
            )
        )
    _log.warning(
        "restoring %d tensors of %s; these do not fit:\n%s", len(matches), checkpoint.path, table
    )
    return matches


def _advice(items: Mapping[str, Item], checkpoint: Any, restore: Restore) -> str:
    version = re.match(r"(\d+)\.(\d+)", checkpoint.tensorflow_version or "0.0")
    old = version is not None and tuple(map(int, version.groups())) < (1, 2)
    if old and restore.assignment_map is None:
        renamed = {rnn_names_of_tensorflow_1_2(name) for name in checkpoint}
        if any(name in items for name in renamed - set(checkpoint)):
            return (
                "TensorFlow 1.2 renamed the variables of RNN cells: Restore(..., assignment_map="
                "tf_h5_callback.rnn_names_of_tensorflow_1_2) gives them their new names"
            )
    return (
        "A checkpoint fits the graph that wrote it. For another graph see tf_h5_callback.Restore; "
        "for a new run take another checkpoint_dir"
    )
