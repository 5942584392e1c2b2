import pytest

import tf_h5_callback as h5


@pytest.mark.parametrize(
    "error", [h5.CheckpointNotFoundError, h5.CheckpointCorruptError, h5.CheckpointMismatchError]
)
def test_one_tree(error):
    assert issubclass(error, h5.CheckpointError)


def test_missing_file_is_also_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint: .*nothing.h5"):
        h5.load_checkpoint(tmp_path / "nothing.h5")
