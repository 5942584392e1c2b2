"""What of a checkpoint fits a graph, and what to say of the rest."""

from __future__ import annotations

import logging
import re
from typing import Any, Dict, Mapping, NamedTuple, Optional, Tuple

from tf_h5_callback.errors import CheckpointMismatchError
from tf_h5_callback.restoring.restore import EVERYTHING, Restore, rnn_names_of_tensorflow_1_2

_log = logging.getLogger("tf_h5_callback")


class Spec(NamedTuple):
    """What a graph or a model wants a tensor to be.

    ``dtype`` is a name as NumPy and TensorFlow spell it. In ``shape``, None is a dimension of any
    size; a shape of None is one of any rank.
    """

    dtype: str
    shape: Optional[Tuple[Optional[int], ...]]

    def fits(self, shape: Tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can be assigned."""
        if self.shape is None:
            return True
        return len(shape) == len(self.shape) and all(
            wanted in (None, n) for wanted, n in zip(self.shape, shape)
        )

    def __str__(self) -> str:
        return "{} {}".format(self.dtype, "of any shape" if self.shape is None else self.shape)


def match(
    specs: Mapping[str, Spec],
    checkpoint: Any,
    restore: Restore = EVERYTHING,
    ignore_extra: bool = False,
) -> Dict[str, str]:
    """Finds out what of a checkpoint belongs where in a graph.

    Args:
      specs: name in the graph -> what it wants.
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
    for in_file, in_graph in restore.pairs(checkpoint, specs):
        spec = None if in_graph is None else specs.get(in_graph)
        if spec is None and ignore_extra:
            continue
        file_has = graph_has = "no such tensor"
        fits = False
        if spec is not None:
            graph_has = str(spec)
        if in_file is not None and in_file in checkpoint:
            shape, dtype = tuple(checkpoint.shape(in_file)), checkpoint.dtype(in_file)
            file_has = str(Spec(dtype, shape))
            if spec is not None and in_graph is not None:
                can_cast = restore.cast and "string" not in (dtype, spec.dtype)
                fits = spec.fits(shape) and (spec.dtype == dtype or can_cast)
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
                checkpoint.path, table, _advice(specs, checkpoint, restore)
            )
        )
    _log.warning(
        "restoring %d tensors of %s; these do not fit:\n%s", len(matches), checkpoint.path, table
    )
    return matches


def _advice(specs: Mapping[str, Spec], checkpoint: Any, restore: Restore) -> str:
    version = re.match(r"(\d+)\.(\d+)", checkpoint.tensorflow_version or "0.0")
    old = version is not None and tuple(map(int, version.groups())) < (1, 2)
    if old and restore.assignment_map is None:
        renamed = {rnn_names_of_tensorflow_1_2(name) for name in checkpoint}
        if any(name in specs for name in renamed - set(checkpoint)):
            return (
                "TensorFlow 1.2 renamed the variables of RNN cells: Restore(..., assignment_map="
                "tf_h5_callback.rnn_names_of_tensorflow_1_2) gives them their new names"
            )
    return (
        "A checkpoint fits the graph that wrote it. For another graph see tf_h5_callback.Restore; "
        "for a new run take another checkpoint_dir"
    )
