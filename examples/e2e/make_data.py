"""Write a small task in the format of E2E (Novikova et al. 2017): a restaurant as attributes, and texts about it.

    python examples/e2e/make_data.py

writes `train.csv` and `eval.csv` next to this file, the same bytes in every run. As in E2E's own files the columns are
`mr` (meaning representation) and `ref` (one text about it), and an `mr` has one row for each of its texts. All names
and sentences are made up here; nothing is taken from E2E. No `mr` of `eval.csv` is in `train.csv`.
"""

import csv
import random
from pathlib import Path

SEED = 3
NUM_TRAIN, TRAIN_REFERENCES = 80, 2
NUM_EVAL, EVAL_REFERENCES = 16, 4

NAMES = [
    f"The {color} {thing}" for color in ("Amber", "Grey", "Silver", "Green") for thing in ("Heron", "Anchor", "Lamp")
]
KINDS = ["pub", "restaurant", "coffee shop"]
FOODS = ["Thai", "Greek", "Mexican", "Korean", "Turkish"]
PRICES = ["cheap", "moderate", "high"]
AREAS = ["riverside", "city centre"]
PRICE_WORDS = {"cheap": "cheap", "moderate": "moderately priced", "high": "high-priced"}
AREA_WORDS = {"riverside": "by the river", "city centre": "in the city centre"}
CHILDREN = {
    "yes": ["Children are welcome.", "It is family friendly."],
    "no": ["It is for adults only.", "Do not bring children."],
}

OPENINGS = [
    "{name} is a {price} {kind} {area} that serves {food} food.",
    "{name} is a {price} {food} {kind} {area}.",
    "For {food} food {area}, try {name}, a {price} {kind}.",
    "There is a {price} {kind} {area} called {name}. It serves {food} food.",
]

Meaning = dict[str, str]


def meanings(generator: random.Random, number: int) -> list[Meaning]:
    """Distinct restaurants; half of them say whether children may come."""
    found: dict[str, Meaning] = {}
    while len(found) < number:
        meaning = {
            "name": generator.choice(NAMES),
            "eatType": generator.choice(KINDS),
            "food": generator.choice(FOODS),
            "priceRange": generator.choice(PRICES),
            "area": generator.choice(AREAS),
        }
        if generator.random() < 0.5:
            meaning["familyFriendly"] = generator.choice(["yes", "no"])
        found[written(meaning)] = meaning
    return list(found.values())


def written(meaning: Meaning) -> str:
    """As E2E writes it: `name[The Amber Heron], eatType[pub]`."""
    return ", ".join(f"{slot}[{value}]" for slot, value in meaning.items())


def texts(generator: random.Random, meaning: Meaning, number: int) -> list[str]:
    """Different texts that say all of it."""
    fields = {
        "name": meaning["name"],
        "kind": meaning["eatType"],
        "food": meaning["food"],
        "price": PRICE_WORDS[meaning["priceRange"]],
        "area": AREA_WORDS[meaning["area"]],
    }
    chosen = [opening.format(**fields) for opening in generator.sample(OPENINGS, number)]
    closings = CHILDREN.get(meaning.get("familyFriendly", ""), [""])
    return [f"{text} {generator.choice(closings)}".rstrip() for text in chosen]


def main() -> None:
    """Write both files."""
    generator = random.Random(SEED)
    both = meanings(generator, NUM_TRAIN + NUM_EVAL)
    for name, part, references in (
        ("train.csv", both[:NUM_TRAIN], TRAIN_REFERENCES),
        ("eval.csv", both[NUM_TRAIN:], EVAL_REFERENCES),
    ):
        with (Path(__file__).parent / name).open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["mr", "ref"])
            for meaning in part:
                writer.writerows([written(meaning), text] for text in texts(generator, meaning, references))


if __name__ == "__main__":
    main()
