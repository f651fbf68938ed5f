"""Files are whole or as they were."""

import pytest

from mlx_turboquant.atomic import replacing


def test_a_file_is_replaced_at_the_end(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with replacing(path) as file:
        assert file.name == path.name
        file.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_older_file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")

    def write():
        with replacing(path) as file:
            file.write_text("ne")
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "none" / "a.json"):
        pass
