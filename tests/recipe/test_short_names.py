from loratune.recipe.short_names import short_names


def test_names_are_as_short_as_they_can_be_told_apart() -> None:
    assert short_names(["data/a/train.jsonl", "data/b/train.jsonl", "owner/set"]) == {
        "data/a/train.jsonl": "a/train.jsonl",
        "data/b/train.jsonl": "b/train.jsonl",
        "owner/set": "set",
    }
    assert short_names(["x/", "y/x"]) == {"x/": "x", "y/x": "y/x"}
    assert short_names([]) == {}
