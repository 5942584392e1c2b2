"""TensorFlow's graph mode: the hooks, the state of a graph, the functions for a bare session."""
