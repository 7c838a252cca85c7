"""Write a small classification task: short requests to an assistant, and what each of them is about.

    python examples/intents/make_data.py

writes `train.jsonl` and `eval.jsonl` next to this file, the same bytes in every run. A row has `text` and `label`, one
of six intents. The held-out requests use phrasings, names and things that the training requests do not, so that
remembering words is not enough. All sentences are made up here.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

SEED = 7
PER_INTENT = {"train": 60, "eval": 20}

TEMPLATES: dict[str, dict[str, list[str]]] = {
    "weather": {
        "train": [
            "will it rain in {city} {day}",
            "what is the forecast for {city} {day}",
            "how cold does it get in {city} {day}",
            "do i need an umbrella {day}",
            "is it going to snow {day} in {city}",
        ],
        "eval": [
            "should i expect a storm in {city} {day}",
            "tell me the temperature in {city} {day}",
            "is {day} going to be sunny",
        ],
    },
    "alarm": {
        "train": [
            "wake me at {time} {day}",
            "set an alarm for {time}",
            "cancel my alarm for {day}",
            "which alarms are on {day}",
            "move the {time} alarm by ten minutes",
        ],
        "eval": [
            "get me out of bed at {time} {day}",
            "turn off the alarm at {time}",
            "i have to be up by {time} {day}",
        ],
    },
    "music": {
        "train": [
            "play something by {artist}",
            "put on the new album of {artist}",
            "skip this song",
            "make the music louder in the {room}",
            "add this track by {artist} to my playlist",
        ],
        "eval": ["i want to hear {artist} in the {room}", "next song please", "shuffle the songs of {artist}"],
    },
    "lights": {
        "train": [
            "turn on the lamp in the {room}",
            "dim the lights in the {room}",
            "switch off every light {day}",
            "make the {room} brighter",
            "change the {room} light to blue",
        ],
        "eval": [
            "it is too dark in the {room}",
            "lights out in the {room} at {time}",
            "set the lamp in the {room} to half",
        ],
    },
    "travel": {
        "train": [
            "when does the next train to {city} leave",
            "book a flight to {city} for {day}",
            "how long is the drive to {city}",
            "find me a hotel in {city} for {day}",
            "is my flight to {city} late",
        ],
        "eval": [
            "i need a ticket to {city} {day}",
            "what time is the last bus to {city}",
            "reserve a room in {city} {day}",
        ],
    },
    "message": {
        "train": [
            "tell {person} that i am late",
            "send {person} a text {day}",
            "read me the last message from {person}",
            "reply to {person} with yes",
            "did {person} write to me {day}",
        ],
        "eval": [
            "let {person} know that i am on my way",
            "what did {person} say {day}",
            "write {person} that {time} is fine",
        ],
    },
}

WORDS = {
    "train": {
        "city": ["Lisbon", "Oslo", "Kyoto", "Lima", "Cairo", "Dublin", "Turin", "Quito"],
        "day": ["today", "tomorrow", "on monday", "on friday", "this weekend", "tonight"],
        "time": ["six", "half past seven", "eight thirty", "noon", "a quarter to nine"],
        "artist": ["Velvet Harbour", "Nina Olsen", "the Paper Kites Club", "Marlow Green", "Seven Rivers"],
        "room": ["kitchen", "bedroom", "hall", "living room"],
        "person": ["Amira", "my brother", "Jonas", "Doctor Patel", "Grandma", "Lucia"],
    },
    "eval": {
        "city": ["Bergen", "Osaka", "Porto", "Galway", "La Paz"],
        "day": ["on sunday", "next week", "this evening"],
        "time": ["five", "twenty past ten", "seven sharp"],
        "artist": ["the Glass Orchard", "Ivo Brandt", "Lantern Street"],
        "room": ["bathroom", "study", "garage"],
        "person": ["Mateo", "my boss", "Aunt Ruth", "Sofie"],
    },
}

POLITE = ["{}", "{}", "{}", "please {}", "{} please", "hey, {}", "can you help: {}"]


def requests(generator: random.Random, intent: str, split: str) -> Iterator[str]:
    """Distinct requests of one intent, as many as the split has of it."""
    seen: set[str] = set()
    while len(seen) < PER_INTENT[split]:
        words = {name: generator.choice(values) for name, values in WORDS[split].items()}
        text = generator.choice(POLITE).format(generator.choice(TEMPLATES[intent][split]).format(**words))
        if text not in seen:
            seen.add(text)
            yield text


def main() -> None:
    """Write both files."""
    generator = random.Random(SEED)
    for split in PER_INTENT:
        rows = [{"text": text, "label": intent} for intent in TEMPLATES for text in requests(generator, intent, split)]
        generator.shuffle(rows)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (Path(__file__).parent / f"{split}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
