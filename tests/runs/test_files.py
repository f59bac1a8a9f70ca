"""Files that are whole or not there, and their hashes."""

from __future__ import annotations

from pathlib import Path

import pytest

from spin_lightning.runs.files import read_json, replacing, sha256_of, write_json
from spin_lightning.types import UserError


def test_replaced_file_is_old_or_new_and_never_half(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with replacing(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_text("old")

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert [child.name for child in path.parent.iterdir()] == ["file.txt"]


def test_a_file_where_a_folder_is_wanted_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    match = r"page\.html' cannot be written: .*rows\.jsonl' is no folder"
    with pytest.raises(UserError, match=match), replacing(tmp_path / "rows.jsonl" / "page.html"):
        pass


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    value = {"name": "Größe 日本", "numbers": [1, 0.1, 1e-7, None, True], "nested": {"a": {}}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "Größe" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "b.json") is None
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    assert read_json(tmp_path / "a.json") == value


def test_hashes_of_bytes_text_files_and_values(tmp_path: Path) -> None:
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of(b"abc") == sha256_of("abc") == sha256_of(tmp_path / "file") == abc
    assert sha256_of({"a": 1, "b": [2]}) == sha256_of({"b": [2], "a": 1}) != sha256_of({"a": 1, "b": [3]})
