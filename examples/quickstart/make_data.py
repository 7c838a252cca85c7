"""Write the quickstart task: free-form scheduling requests, each answered with one strict JSON object.

    python examples/quickstart/make_data.py

writes `train.jsonl` and `eval.jsonl` beside this file, the same bytes at every run. The words from which titles,
places and people are composed are split before anything is composed, so no word of a held-out title, place or person
occurs in training: a model that scores well has learned to copy and to classify, not to recall.

The words are common ones on purpose. SmolLM2's tokenizer writes " annex" as one token and "annex" after a quote as two
("an", "nex"); a 135M model then has to respell the word, and writes "antenna". Words that open a value are chosen from
those that it writes alike in both places; held out or not makes no difference to the choice.
"""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

SEED = 2
NUM_TRAIN = 400
NUM_EVAL = 100
HELD_OUT_FRACTION = 0.2
FOLLOW_UP_FRACTION = 0.09
# No spaces: 12 of 56 answer tokens less, and every trained token costs time.
SEPARATORS = (",", ":")


def words(text: str) -> list[str]:
    """Return the words of a text."""
    return text.split()


def phrases(text: str) -> list[str]:
    """Return the phrases of a text that separates them by bars; line ends do not count."""
    return text.replace("\n", "").split("|")


QUALIFIERS = words("""
annual weekly final draft joint internal external regional extended virtual national global public private special
short general second third winter summer online primary formal daily early""")

TOPICS = words("""
budget safety onboarding inventory contract copyright software database network backup printer website video photo
recipe menu wine harvest engine lighting translation physics biology genome nutrition rowing bridge solar satellite
forestry robot academic agency apple art audio bank bean bird blog boat brand bread brain camera card channel chart
chemical client clinical clock cloth club coal color community computer consumer cover credit crop customer data
design device diabetes doctor door dust energy english environment export factory family farm fashion fiction film
fire fish flag floor flower font food fruit fuel game gene glass gold grain graph grass gravity hair hardware hazard
health heart heat history home horse hospital image income iron journal language law legal lens license light machine
mail map marine marriage material math meat media medicine metal meter milk mobile model money movie music ocean organ
oxygen paper password patient pattern phone pipe pixel planet plant plastic policy power product protein quality radio
rail rain rice road root rose salt sand science screen sensor server shirt skin snake snow soil song soup space speech
stock storm sugar tank teacher tooth trade traffic travel tree vehicle voice waste water weather wheat wheel window
wood yard brush cookie button cursor orbit ethics surgery tidal tropical vitamin helium hydrogen""")

EVENTS = words("""
review audit visit briefing workshop interview inspection demo rehearsal tasting lesson seminar hearing checkup survey
handover walkthrough debrief tour lecture auction exam ceremony reception appraisal trial delivery pickup repair
installation fitting negotiation presentation screening consultation meetup tournament bootcamp signing
retrospective""")

PLACE_NAMES = words("""
north east upper lower central old amber heron otter badger hawthorn riverside uptown windmill castle mission union
lincoln madison monroe jefferson nelson oxford vienna geneva south west bishop pine vine lion wolf star moon sun angel
alpha delta omega arch church mill ranch orange yellow purple black white blue red brown grey green main river lake
forest stone hill ridge spring king new port anchor arrow bear urban""")

PLACE_KINDS = words("""
room hall library office museum lounge market arcade pool park shop store house tower station center college campus
court school field stage bar gate""")

PEOPLE = words("""
maria priya fatima ingrid kofi yuki dmitri elena aisha bruno clara diego emeka farah jasmine karim leila mateo nadia
olga pablo quentin samir tara ulrich walter ximena yusuf zara beatrice cyrus daphne edgar fiona gideon helga joanna
lorenzo noah ophelia pedro rachel stefan wanda xavier yolanda zoltan boris camille desmond esther felix greta jonas
katya leon martha nikhil paula ravi sofia theo wendy conrad doris""")

TEAMS = phrases("""
front desk|night shift|teachers|builders|players|writers|students|scientists|workers|owners|parents|neighbors|members|
authors|actors|clients|controllers""")

DAYS = phrases("""monday|tuesday|wednesday|thursday|friday|saturday|sunday|today|tomorrow|next monday|next wednesday|
next friday|this saturday|march 3|april 12|june 21|august 9|october 30|december 5""")

MINUTES = ("00", "10", "15", "20", "30", "45", "50")

OPENERS = phrases("""|||||please |please |hi, |hey, |hello, |can you |could you |could you please |i need you to |
ok so |quick one: |when you get a chance, |would you |""")

# {when} is a bare date ("thursday at 3 pm"), {on_when} one with its preposition; {where} may be empty.
FORMS = {
    "book": (
        "book the {title} for {when}{where}",
        "book our {title}{where} {on_when}",
        "schedule the {title} {on_when}{where}",
        "schedule our {title}{where} for {when}",
        "set up the {title} {on_when}{where}",
        "set up another {title}{where}, {when}",
        "put the {title} on my calendar for {when}{where}",
        "add the {title} to the calendar, {when}{where}",
        "arrange the {title}{where} {on_when}",
        "plan the {title} for {when}{where}",
    ),
    "move": (
        "move the {title} to {when}{where}",
        "move our {title} to {when}{where}",
        "push the {title} to {when}{where}",
        "push the {title} back to {when}{where}",
        "shift the {title} to {when}{where}",
        "reschedule the {title} to {when}{where}",
        "reschedule our {title} for {when}{where}",
        "bump the {title} to {when}{where}",
        "bring the {title} forward to {when}{where}",
    ),
    "cancel": (
        "cancel the {title} {on_when}{where}",
        "cancel the {title}{where} planned for {when}",
        "cancel our {title}{where} {on_when}",
        "call off the {title} {on_when}{where}",
        "call off the {title}{where} {on_when}",
        "drop the {title} planned for {when}{where}",
        "scrap the {title} {on_when}{where}",
        "take the {title} {on_when}{where} off the calendar",
    ),
    "remind": (
        "remind me about the {title} {on_when}{where}",
        "remind me of the {title}{where} {on_when}",
        "remind everyone about the {title} {on_when}{where}",
        "send a reminder for the {title} {on_when}{where}",
        "set a reminder for the {title} {on_when}{where}",
        "give me a nudge about the {title} {on_when}{where}",
    ),
}
PLACE_FORMS = (" at the {}", " at the {}", " in the {}", " over at the {}")
NOTIFY_FORMS = (" and tell {}", " and let {} know", ", and inform {}", ", cc {}", ". {} should know", ". loop in {}")
URGENT_FORMS = (", it is urgent", ". this is urgent", ", asap", ". top priority", ", as soon as you can")

# What a second turn may change, and how it is said.
AMENDMENTS = {
    "day": ("make it {} instead", "sorry, {} is better", "actually, {} please", "no, {}"),
    "time": ("make that {}", "{} would be better", "sorry, i meant {}", "change the time to {}"),
    "place": ("do it at the {} instead", "change the place to the {}", "sorry, at the {}"),
    "notify": ("also tell {}", "and let {} know too", "please tell {} as well"),
}


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The words from which one split composes its titles, places and people."""

    qualifiers: list[str]
    topics: list[str]
    events: list[str]
    place_names: list[str]
    place_kinds: list[str]
    people: list[str]
    teams: list[str]

    def title(self, rng: random.Random) -> str:
        """Return two words ("roof audit") or three ("annual roof audit")."""
        title = f"{rng.choice(self.topics)} {rng.choice(self.events)}"
        return f"{rng.choice(self.qualifiers)} {title}" if rng.random() < 0.2 else title

    def place(self, rng: random.Random) -> str:
        """Return a named place ("maple room") or, more rarely, a plain one ("library")."""
        kind = rng.choice(self.place_kinds)
        return kind if rng.random() < 0.25 else f"{rng.choice(self.place_names)} {kind}"

    def people_to_notify(self, rng: random.Random) -> list[str]:
        """Return up to two different names, first names or teams."""
        count = rng.choice((0, 0, 0, 1, 1, 1, 2))
        return rng.sample(self.people + self.teams, count)


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the user wants: the fields of the answer, in the answer's order."""

    action: str
    title: str
    day: str
    time: str | None
    place: str | None
    notify: list[str]
    urgent: bool

    def answer(self) -> str:
        """Return the wish as the JSON object the model has to write."""
        return json.dumps(vars(self), separators=SEPARATORS)


def split_vocabulary(rng: random.Random) -> tuple[Vocabulary, Vocabulary]:
    """Share every word list out between training and held-out rows; no word goes to both."""
    word_lists = {
        "qualifiers": QUALIFIERS,
        "topics": TOPICS,
        "events": EVENTS,
        "place_names": PLACE_NAMES,
        "place_kinds": PLACE_KINDS,
        "people": PEOPLE,
        "teams": TEAMS,
    }
    train, held_out = {}, {}
    for name, entries in word_lists.items():
        shuffled = rng.sample(entries, len(entries))
        num_held_out = round(HELD_OUT_FRACTION * len(entries))
        held_out[name], train[name] = shuffled[:num_held_out], shuffled[num_held_out:]
    return Vocabulary(**train), Vocabulary(**held_out)


def clock_time(rng: random.Random) -> str:
    """Return a time as people write it; the answer copies it as written."""
    hour, half = rng.randint(1, 12), rng.choice(("am", "pm"))
    return rng.choice((f"{hour} {half}", f"{hour}:{rng.choice(MINUTES)} {half}", f"{hour}:{rng.choice(MINUTES)}"))


def draw_wish(rng: random.Random, vocabulary: Vocabulary) -> Wish:
    """Draw every field on its own."""
    return Wish(
        action=rng.choice(("book", "book", "move", "cancel", "remind")),
        title=vocabulary.title(rng),
        day=rng.choice(DAYS),
        time=clock_time(rng) if rng.random() < 0.6 else None,
        place=vocabulary.place(rng) if rng.random() < 0.5 else None,
        notify=vocabulary.people_to_notify(rng),
        urgent=rng.random() < 0.2,
    )


def request(rng: random.Random, wish: Wish) -> str:
    """Say a wish in one of many ways; every copied value stands in the text as it stands in the answer."""
    on_day = wish.day if wish.day.startswith(("today", "tomorrow", "next", "this")) else f"on {wish.day}"
    text = rng.choice(OPENERS) + rng.choice(FORMS[wish.action]).format(
        title=wish.title,
        when=with_time(rng, wish.day, wish.time),
        on_when=with_time(rng, on_day, wish.time),
        where="" if wish.place is None else rng.choice(PLACE_FORMS).format(wish.place),
    )
    endings = []
    if wish.notify:
        endings.append(rng.choice(NOTIFY_FORMS).format(" and ".join(map(spoken, wish.notify))))
    if wish.urgent:
        endings.append(rng.choice(URGENT_FORMS))
    rng.shuffle(endings)
    return text + "".join(endings)


def spoken(person: str) -> str:
    """Say whom to notify: a team takes an article that the answer leaves out."""
    return f"the {person}" if person in TEAMS else person


def with_time(rng: random.Random, day: str, time: str | None) -> str:
    """Join a day and a time, if there is one."""
    return day if time is None else rng.choice((f"{day} at {time}", f"{day} {time}", f"{day}, {time}"))


def amend(rng: random.Random, vocabulary: Vocabulary, wish: Wish) -> tuple[str, Wish]:
    """Return a second user turn that changes one field, and the wish after it."""
    day = rng.choice([day for day in DAYS if day != wish.day])
    time = clock_time(rng)
    place = vocabulary.place(rng)
    name = rng.choice([name for name in vocabulary.people if name not in wish.notify])
    field, value, amended = rng.choice(
        (
            ("day", day, replace(wish, day=day)),
            ("time", time, replace(wish, time=time)),
            ("place", place, replace(wish, place=place)),
            ("notify", name, replace(wish, notify=[*wish.notify, name])),
        )
    )
    return rng.choice(AMENDMENTS[field]).format(value), amended


def conversation(rng: random.Random, vocabulary: Vocabulary) -> list[dict[str, str]]:
    """Return one request with its answer, or two turns of which the second amends the first."""
    wish = draw_wish(rng, vocabulary)
    messages = [{"role": "user", "content": request(rng, wish)}, {"role": "assistant", "content": wish.answer()}]
    if rng.random() < FOLLOW_UP_FRACTION:
        text, amended = amend(rng, vocabulary, wish)
        if amended != wish:
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": amended.answer()}]
    return messages


def write_split(path: Path, rng: random.Random, vocabulary: Vocabulary, num_rows: int) -> None:
    """Write conversations with no title twice, one JSON object a line."""
    rows: dict[str, list[dict[str, str]]] = {}
    while len(rows) < num_rows:
        messages = conversation(rng, vocabulary)
        rows.setdefault(json.loads(messages[1]["content"])["title"], messages)
    lines = (json.dumps({"messages": messages}) + "\n" for messages in rows.values())
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def main(folder: Path = Path(__file__).parent) -> None:
    """Write both files into the folder."""
    rng = random.Random(SEED)
    train, held_out = split_vocabulary(rng)
    write_split(folder / "train.jsonl", rng, train, NUM_TRAIN)
    write_split(folder / "eval.jsonl", rng, held_out, NUM_EVAL)


if __name__ == "__main__":
    main()
