"""``python -m tf_h5_callback``: the same as ``tf-h5``."""

import sys

from tf_h5_callback.tools.cli import main

sys.exit(main())
