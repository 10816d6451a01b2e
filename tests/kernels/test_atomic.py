"""What is written whole or not at all."""

import pytest

from dit_accel.kernels.atomic import replace_with, write_text


def test_what_fails_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "before\n")

    def broken(part):
        part.write_text("half of")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        replace_with(path, broken)
    assert path.read_text() == "before\n"
    assert list(tmp_path.iterdir()) == [path]
    write_text(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()


def test_a_folder_takes_the_place_of_a_file_and_of_a_folder(tmp_path):
    path = tmp_path / "a"
    path.write_text("a file")
    for name in ("one", "two"):

        def write(part, name=name):
            part.mkdir()
            (part / name).touch()

        replace_with(path, write)
        assert [one.name for one in path.iterdir()] == [name]
    assert list(tmp_path.iterdir()) == [path]
