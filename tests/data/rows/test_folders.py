"""Which files of a folder are read, and that every other one is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratune.data.rows.folders import data_suffix, select_files
from loratune.data.rows.sources import SUFFIXES, files_left_out, hash_files, read_rows
from loratune.recipe.recipe import Source
from loratune.run.errors import DataError

ROW = '{"prompt": "a", "completion": "b"}\n'


def select(folder: Path, *names: str, split: str | None = None) -> tuple[list[str], list[str]]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(ROW)
    found = select_files(folder, split, SUFFIXES)
    return [str(file.relative_to(folder)) for file in found.files], found.left_out


@pytest.mark.parametrize(
    ("names", "read", "left_out"),
    [
        # the Hub's layouts
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], [0], ["split test"]),
        (["train.jsonl", "validation.jsonl", "test.jsonl"], [0], ["split test", "split validation"]),
        (["train/a.jsonl", "dev/a.jsonl", "eval/a.jsonl"], [0], ["split validation", "split test"]),
        (["train_1.csv", "train_0.csv", "val.csv"], [1, 0], ["split validation"]),
        # names that are more than the split's
        (["train.jsonl", "train_rejected.jsonl", "test.jsonl"], [0], ["split test", "its name is not train alone"]),
        (["chat-train.jsonl", "chat-test.jsonl"], [0], ["its name is not test alone"]),
        (["a.jsonl", "b.jsonl", "b-test.jsonl"], [0, 1], ["its name is not test alone"]),
        (["latest.jsonl", "contest.jsonl"], [1, 0], []),
        # no splits, and what is not data
        (["a.jsonl", "c.jsonl.gz", "b.txt"], [0, 1], ["not a data file"]),
        (["b.txt", "a.txt", "README.md"], [1, 0], []),
        (["a.json", "dataset_infos.json", "LICENSE", ".gitattributes", "x.png"], [0], ["not a data file"]),
    ],
)
def test_training_takes_the_training_files_and_names_the_others(
    tmp_path: Path, names: list[str], read: list[int], left_out: list[str]
) -> None:
    files, others = select(tmp_path, *names)

    assert files == [names[n] for n in read]
    assert [other.partition("(")[2].rstrip(")") for other in others] == left_out


@pytest.mark.parametrize(
    ("split", "file"), [("test", "test.jsonl"), ("dev", "validation.jsonl"), ("extra", "extra.jsonl")]
)
def test_other_files_are_read_if_asked_for(tmp_path: Path, split: str, file: str) -> None:
    files, _ = select(tmp_path, "train.jsonl", "test.jsonl", "validation.jsonl", "extra.jsonl", split=split)
    assert files == [file]


@pytest.mark.parametrize(
    ("names", "split", "words"),
    [
        (["test.jsonl", "validation.jsonl"], None, "it has the splits test, validation"),
        (["train.jsonl"], "test", "it has the splits train"),
        (["train_sft-00000-of-00001.parquet", "train_gen-00000-of-00001.parquet"], "train_dpo", "train_gen, train_sft"),
        (["en-00000-of-00001.parquet", "de-00000-of-00001.parquet"], None, "split: de"),
        (["a.png"], None, "supported types are"),
    ],
)
def test_a_folder_without_the_split_says_what_it_has(
    tmp_path: Path, names: list[str], split: str | None, words: str
) -> None:
    with pytest.raises(DataError) as caught:
        select(tmp_path, *names, split=split)
    assert words in caught.value.fix


def test_files_left_out_have_the_name_of_their_folder(tmp_path: Path) -> None:
    select(tmp_path, "train.jsonl", "test.jsonl")
    assert files_left_out(Source(name=str(tmp_path))) == [f"{tmp_path}/test.jsonl (split test)"]
    assert files_left_out(Source(name=str(tmp_path / "train.jsonl"))) == []
    assert len(read_rows(Source(name=str(tmp_path)))) == 1


def test_the_suffix_of_a_compressed_file_is_that_of_its_contents() -> None:
    assert [data_suffix(Path(name)) for name in ("a.JSONL.gz", "a.csv.zst", "a.b.json", "a", "a.gz")] == [
        ".jsonl", ".csv", ".json", "", "",
    ]  # fmt: skip


def test_a_dataset_saved_to_disk_is_read_as_one(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_list([{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(5)])
    chosen = table.select([4, 1])  # stored as the whole table and two indices
    chosen.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=chosen, test=table).save_to_disk(str(tmp_path / "two"))

    for source in (Source(name=str(tmp_path / "one")), Source(name=str(tmp_path / "two"))):
        assert [row.value["prompt"] for row in read_rows(source)] == ["q4", "q1"]
        assert [*hash_files(source)] == [source.name]
    assert len(read_rows(Source(name=str(tmp_path / "two"), split="test"))) == 5
    with pytest.raises(DataError, match="no split dev in this dataset; it has train, test"):
        read_rows(Source(name=str(tmp_path / "two"), split="dev"))
    with pytest.raises(DataError, match="this dataset has none"):
        read_rows(Source(name=str(tmp_path / "one"), split="dev"))
