from __future__ import annotations

from pathlib import Path

from loratune.run.digest import file_sha256


def test_the_digest_is_that_of_the_standard(tmp_path: Path) -> None:
    file = tmp_path / "abc"
    file.write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert file_sha256(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
