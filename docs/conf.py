import sys
from unittest import mock

# The documentation is built without TensorFlow. autodoc's own mocks would hide the arguments of a
# class that inherits from one.
tensorflow = mock.MagicMock()
tensorflow.compat.v1.train.SessionRunHook = type("SessionRunHook", (), {"__module__": "tf.train"})
sys.modules["tensorflow"] = tensorflow
sys.modules["tensorflow.compat"] = tensorflow.compat
sys.modules["tensorflow.compat.v1"] = tensorflow.compat.v1

import tf_h5_callback  # noqa: E402

project = "tf_h5_callback"
version = release = tf_h5_callback.__version__
exclude_patterns = ["_build"]
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
default_role = "py:obj"
autodoc_member_order = "bysource"
maximum_signature_line_length = 80

html_theme = "furo"
html_title = "tf_h5_callback {}".format(version)
