"""Files are whole or not there."""

import pytest

from reeltune.core.files import whole_file


def test_a_file_is_whole_before_it_is_seen(tmp_path):
    path = tmp_path / "new" / "page.txt"
    with whole_file(path) as file:
        file.write("é\n")
        assert not path.exists()
    assert path.read_bytes() == b"\xc3\xa9\n"
    assert [file.name for file in path.parent.iterdir()] == ["page.txt"]


@pytest.mark.parametrize(("mode", "half"), [("w", "half"), ("wb", b"half")])
def test_a_failed_write_leaves_the_old_file(mode, half, tmp_path):
    path = tmp_path / "index"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"), whole_file(path, mode) as file:
        file.write(half)
        raise OSError("disk full")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["index"]
