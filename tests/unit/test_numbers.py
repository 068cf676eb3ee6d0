"""The numbers of clips: none twice, whoever takes them meanwhile."""

import pytest

from reeltune.core.files import CannotWriteError
from reeltune.sampling.numbers import free_numbers


@pytest.mark.parametrize(
    ("there", "first"),
    [
        ([], 0),
        (["0.mp4", "2.mp4"], 3),
        (["4.json"], 5),  # whose clip was deleted
        (["3-7.png", "8.txt"], 9),
        ([".5.taken"], 6),  # of another process, or a killed one
        (["a.mp4", "1a.mp4", "9", "²3.mp4"], 0),
    ],
)
def test_numbers_begin_above_those_of_all_files(there, first, tmp_path):
    for name in there:
        (tmp_path / name).touch()
    with free_numbers(tmp_path, 3) as taken:
        assert list(taken) == [first, first + 1, first + 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(there)


def test_two_processes_take_others(tmp_path):
    folder = tmp_path / "new/samples"
    with free_numbers(folder, 2) as one, free_numbers(folder, 3) as other:
        (folder / f"{one[0]}.mp4").touch()
        assert [*one, *other] == [0, 1, 2, 3, 4]
    with pytest.raises(KeyboardInterrupt), free_numbers(folder, 2) as third:
        assert list(third) == [1, 2]
        raise KeyboardInterrupt
    assert [path.name for path in folder.iterdir()] == ["0.mp4"]


def test_a_number_that_another_process_marks_meanwhile_is_left_to_it(tmp_path):
    """Between looking and marking: what was marked already is given back, and it is looked again."""
    looked = []

    class Blind(type(tmp_path)):
        def iterdir(self):
            looked.append(1)
            return iter(()) if len(looked) == 1 else super().iterdir()

    folder = Blind(tmp_path)
    (tmp_path / ".1.taken").touch()
    with free_numbers(folder, 2) as taken:
        assert list(taken) == [2, 3] and len(looked) == 2
        assert not (tmp_path / ".0.taken").exists() and (tmp_path / ".1.taken").exists()


def test_a_file_in_the_folders_place_is_told_at_once(tmp_path):
    (tmp_path / "samples").touch()
    with pytest.raises(CannotWriteError, match="samples"), free_numbers(tmp_path / "samples", 1):
        pass
