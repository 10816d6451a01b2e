import sys

import pytest

from dit_accel.cli import common, main


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """Run a command in an empty folder: ``cli(*words)`` returns code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    # a console's own size comes first, and may have been fixed when it was made
    monkeypatch.setattr(common.out, "_width", 200)
    monkeypatch.setattr(common.out, "_height", 50)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["dit-accel", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return ended.value.code, told.out, told.err

    return run
