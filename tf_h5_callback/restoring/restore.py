"""What to restore from where, and how names in a file and names in a graph belong together."""

from __future__ import annotations

from typing import Any, Callable, Iterable, List, Mapping, NamedTuple, Optional, Tuple, Union

from tf_h5_callback.file.format import PathLike

AssignmentMap = Union[
    Mapping[str, Any], Iterable[Tuple[str, Any]], Callable[[str], Optional[str]], None
]


class Pair(NamedTuple):
    """A tensor of the file and the one of the graph it belongs to; None: there is none."""

    file: Optional[str]
    graph: Optional[str]


class Restore(NamedTuple):
    """What a hook restores, for its argument ``restore``.

    Names may be given with or without the ``:0`` at the end.

    Args:
      path: a checkpoint, a folder of checkpoints, or (where TensorFlow is at hand) the prefix or
        folder of a checkpoint of ``tf.train.Saver``. None: the newest intact one of the hook's own
        folder.
      assignment_map: which tensor goes where, as in ``tf.train.init_from_checkpoint``. Only what it
        names is restored.

        - ``{"name in file": "name in graph"}``, or a variable instead of its name;
        - ``{"scope in file/": "scope in graph/"}``: all of the graph's scope, by the rest of the
          name; ``"/"`` is the root;
        - a list of such pairs, so that one tensor can go to several places;
        - a callable ``name in file -> name in graph``, or None to leave it out, for all tensors.
      strict: True: every name, shape and dtype must fit, in both directions, otherwise nothing is
        restored; False: restore what fits and log the rest as a table.
      cast: convert tensors whose dtype differs. Shapes are never changed.
      run_local_init: initialise the local variables again afterwards. Those that were initialised
        from global variables keep the values from before the restore otherwise.
    """

    path: Optional[PathLike] = None
    assignment_map: AssignmentMap = None
    strict: bool = True
    cast: bool = False
    run_local_init: bool = False

    @classmethod
    def of(cls, value: Union[bool, PathLike, Restore]) -> Optional[Restore]:
        """What a hook's argument ``restore`` means: True, False (None), a path, or one of these."""
        if isinstance(value, Restore):
            return value
        if isinstance(value, bool):
            return cls() if value else None
        return cls(value)

    def pairs(self, in_file: Iterable[str], in_graph: Iterable[str]) -> List[Pair]:
        """Who belongs to whom, in the order of names.

        Args:
          in_file: names of the tensors of the file.
          in_graph: names of the tensors of the graph. Variables in the assignment map must have
            been replaced by their names.

        Raises:
          ValueError: the assignment map joins a scope with something that is none.
        """
        file_names, graph_names = _Names(in_file), _Names(in_graph)
        if self.assignment_map is None:
            pairs = _rename(lambda name: name, file_names, graph_names)
        elif callable(self.assignment_map):
            pairs = _rename(self.assignment_map, file_names, graph_names)
        else:
            rows = map_rows(self.assignment_map)
            pairs = [pair for row in rows for pair in _row(row, file_names, graph_names)]
        return sorted(pairs, key=lambda pair: (pair.graph or pair.file or "", pair.file or ""))


def map_rows(rows: Union[Mapping[str, Any], Iterable[Tuple[str, Any]]]) -> List[Tuple[str, Any]]:
    """The rows of an assignment map that is a mapping or a list."""
    return list(rows.items() if isinstance(rows, Mapping) else rows)


class _Names:
    """Finds names with or without the number of the output."""

    def __init__(self, names: Iterable[str]):
        self.all = list(names)
        self._by_name = {_bare(name): name for name in self.all}
        self._by_name.update((name, name) for name in self.all)

    def find(self, name: str) -> Optional[str]:
        return self._by_name.get(name) or self._by_name.get(_bare(name))


def _bare(name: str) -> str:
    return name[:-2] if name.endswith(":0") else name


def _rename(
    new_name: Callable[[str], Optional[str]], in_file: _Names, in_graph: _Names
) -> List[Pair]:
    pairs = []
    for name in in_file.all:
        new = new_name(name)
        if new is not None:
            pairs.append(Pair(name, in_graph.find(new)))
    reached = {pair.graph for pair in pairs}
    return pairs + [Pair(None, name) for name in in_graph.all if name not in reached]


def _row(row: Tuple[str, str], in_file: _Names, in_graph: _Names) -> List[Pair]:
    """One row of an assignment map, with the rules of ``tf.train.init_from_checkpoint``."""
    key, value = row
    if key.endswith("/") != value.endswith("/"):
        raise ValueError(
            "the assignment map joins {!r} with {!r}: either both are scopes, with a slash at the "
            "end, or none is".format(key, value)
        )
    if not key.endswith("/"):
        return [Pair(in_file.find(key) or key, in_graph.find(value) or value)]
    file_scope, graph_scope = key.lstrip("/"), value.lstrip("/")
    found = [name for name in in_graph.all if name.startswith(graph_scope)]
    if not found:
        return [Pair(None, value)]
    names = [file_scope + name[len(graph_scope) :] for name in found]
    return [Pair(in_file.find(name) or name, new) for name, new in zip(names, found)]


def rnn_names_of_tensorflow_1_2(name: str) -> str:
    """The names that RNN cells gave their variables before TensorFlow 1.2 -> those since.

    ``weights`` became ``kernel``, ``biases`` became ``bias``. For ``Restore(assignment_map=...)``.
    Source: the checkpoint converter of ``tf.contrib.rnn`` and the post this package grew from.
    """
    scope, slash, last = name.rpartition("/")
    variable, colon, output = last.partition(":")
    slot_of = scope.rpartition("/")
    if variable in _RNN_NAMES and slash:
        return scope + slash + _RNN_NAMES[variable] + colon + output
    if slot_of[2] in _RNN_NAMES and slot_of[1]:  # an optimizer slot: .../weights/Adam:0
        return "".join(slot_of[:2]) + _RNN_NAMES[slot_of[2]] + slash + last
    return name


_RNN_NAMES = {"weights": "kernel", "biases": "bias"}

EVERYTHING = Restore()
