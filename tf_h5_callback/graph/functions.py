"""The functions of the blog post this package grew from, for a session without hooks."""

from __future__ import annotations

from typing import Any, Mapping, Optional

import tensorflow.compat.v1 as tf

from tf_h5_callback.file.format import PathLike
from tf_h5_callback.file.reader import Checkpoint
from tf_h5_callback.file.writer import write_checkpoint
from tf_h5_callback.graph.setters import (
    Item,
    Setters,
    VarList,
    assign,
    items_of,
    select,
    variable_setter,
)
from tf_h5_callback.graph.snapshot import assemble, fetches
from tf_h5_callback.restoring import matching


def create_setters(var_list: VarList = None) -> Setters:
    """Creates, for each variable, a placeholder and the operation that assigns it.

    The idea is that of the post this package grew from. Nodes are made at most once for a graph;
    call this before the graph is finalised.

    Args:
      var_list: None for all global variables; or a list, a dict ``{name in file: variable}``, or a
        callable ``variable -> bool``.

    Returns:
      ``{name: (assign_op, placeholder)}``. The name is the variable's (``"rnn/kernel:0"``), or the
      key of the dict; the placeholder is named like the variable with ``_setter`` behind it
      (``"rnn/kernel_setter"``) and has its dtype and shape. The parts of a partitioned variable
      share one setter for the full tensor.

    Raises:
      ValueError: two variables would have one name.
      TypeError: something in ``var_list`` is not a variable.
      RuntimeError: the graph is finalised and does not have the setters yet.
    """
    graph = tf.get_default_graph()
    variables, _ = select(graph, var_list)
    return {
        item.name: variable_setter(graph, item, members) for item, members in items_of(variables)
    }


def save_variables(
    session: Any,
    path: PathLike,
    var_list: VarList = None,
    metadata: Optional[Mapping[str, Any]] = None,
) -> None:
    """Saves the variables of a session to one file, atomically. Adds no nodes to the graph.

    Args:
      session: a ``tf.Session``.
      path: the file; one that exists is replaced.
      var_list: see `create_setters`.
      metadata: anything JSON can hold, stored in the file. The versions of the format and of
        TensorFlow and the global step, where the graph has one, are stored always.

    Raises:
      CheckpointError: the file could not be written.
      ValueError, TypeError: see `create_setters`; TypeError also for metadata that is not JSON.
    """
    variables, _ = select(session.graph, var_list)
    items = [item for item, _ in items_of(variables)]
    step = tf.train.get_global_step(session.graph)
    values, step_value = session.run((fetches(items), [] if step is None else step))
    write_checkpoint(
        path,
        assemble(items, values),
        global_step=None if step is None else int(step_value),
        tensorflow_version=tf.VERSION,
        metadata=metadata,
    )


def restore_variables(session: Any, path: PathLike, setters: Optional[Setters] = None) -> None:
    """Restores the variables of a session from one file.

    The file and the setters must name the same tensors; nothing is assigned otherwise.

    Args:
      session: a ``tf.Session``.
      path: a file of `save_variables`, of `H5CheckpointHook`, or of the loop in the post.
      setters: from `create_setters`; by default those of all global variables.

    Raises:
      CheckpointNotFoundError, CheckpointCorruptError: the file is missing or damaged.
      CheckpointMismatchError: it does not fit; lists every name, shape and dtype that differs.
    """
    if setters is None:
        with session.graph.as_default():
            setters = create_setters()
    specs = {
        name: Item(name, placeholder.dtype, placeholder.shape, []).spec
        for name, (_, placeholder) in setters.items()
    }
    with Checkpoint(path) as checkpoint:
        matching.match(specs, checkpoint)
        assign(session, setters, checkpoint.read_all())
