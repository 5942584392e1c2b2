import io

from tqdm import tqdm

from tf_h5_callback.saving.progress import Progress


def test_none():
    progress = Progress(False)
    progress.start(3)
    progress.advance(4)
    progress.saved(4)
    progress.close()


def test_a_bar_of_the_user_is_moved_and_stays_open():
    out = io.StringIO()
    with tqdm(total=100, file=out, mininterval=0) as bar:
        progress = Progress(bar)
        progress.start(40)
        progress.advance(50)
        progress.saved(50)
        progress.close()
        assert bar.n == 50
        assert not bar.disable
    assert "50/100" in out.getvalue()
    assert "checkpoint=50" in out.getvalue()


def test_our_own_bar(capsys):
    progress = Progress(True)
    progress.start(10)
    progress.advance(12)
    progress.saved(12)
    progress.start(12)  # a session made anew
    progress.close()
    err = capsys.readouterr().err
    assert "12step" in err and "checkpoint=12" in err
