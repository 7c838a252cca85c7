"""data.json, the data report: what was read, what it became, and what looks wrong in it."""

from __future__ import annotations

from pydantic import Field

from loratune.run.records.base import FileRecord, Part, Place, RejectedRow


class SourceRead(Part):
    """A source that was read."""

    name: str
    """File, folder or Hub dataset, as in the recipe."""
    config: str | None
    """Configuration of a Hub dataset."""
    split: str | None
    """Split of a Hub dataset."""
    weight: float
    """How many times each row is seen per epoch."""
    format: str
    """Format of the rows."""
    rows: int
    """Rows of the source."""
    sha256: dict[str, str]
    """File → fingerprint of its contents."""


class SplitOff(Part):
    """Held-out data that was split off from the training data."""

    held_out: float
    """Fraction of the training data that is held out."""
    seed: int
    """Seed of the split."""
    from_: str = Field(alias="from")
    """Data that it was taken from: `train`."""


class Histogram(Part):
    """Number of examples by length."""

    edges: tuple[int, ...]
    """Edges of the bins in tokens, one more than there are bins; a bin includes its lower edge."""
    counts: tuple[int, ...]
    """Examples per bin."""


class Lengths(Part):
    """Lengths of the examples, in tokens."""

    p50: int
    """Median, in tokens."""
    p95: int
    """95th percentile, in tokens."""
    max: int
    """Longest example, in tokens."""
    histogram: Histogram | None = None
    """Distribution of the lengths."""


class SuspiciousRow(Place):
    """A row that can be trained on but looks wrong."""

    kind: str
    """Kind of finding, such as `repeats_prompt`."""
    what: str
    """What is wrong with it, with the value."""


class UnreadField(Part):
    """A field that the rows have and nothing reads."""

    place: str
    """Where it occurs: `column`, `message key`, `call key`, `tool key` or `part key`."""
    name: str
    """Its name."""
    count: int
    """Rows, messages, calls, tools or parts that have it."""


class PairLengths(Part):
    """Lengths of the two answers of pairs, in trained tokens."""

    chosen_tokens: float
    """Mean length of the chosen answers, in tokens."""
    rejected_tokens: float
    """Mean length of the rejected answers, in tokens."""
    chosen_longer: float
    """Share of pairs whose chosen answer is the longer one, 0 to 1; pairs of equal length count half."""


class JudgedCounts(Part):
    """Good and bad answers of rows with a label, and their lengths in trained tokens."""

    good: int
    """Good answers."""
    bad: int
    """Bad answers."""
    good_tokens: float
    """Mean length of the good answers, in tokens."""
    bad_tokens: float
    """Mean length of the bad answers, in tokens."""


class SideReport(Part):
    """The training data or the held-out data."""

    sources: tuple[SourceRead | SplitOff, ...]
    """Sources, in the order of the recipe."""
    format: str
    """Formats of the rows, separated by commas."""
    rows: int
    """Rows read."""
    conversations: int
    """Examples made of them: conversations, or texts for a classifier."""
    labels: dict[str, int] | None = None
    """Classifiers only: class → number of texts."""
    pairs: PairLengths | None = None
    """Pairs of answers only: lengths of chosen and rejected answers."""
    judged: JudgedCounts | None = None
    """Answers with a label only: how many are good and bad, and their lengths."""
    turns: int
    """Messages of all conversations."""
    tokens: int
    """Tokens of all examples."""
    supervised_tokens: int
    """Tokens that are trained; for a classifier, the number of texts."""
    supervised_share: float
    """Trained tokens as a fraction of all tokens, 0 to 1."""
    length: Lengths
    """Lengths of the examples."""
    truncated: int
    """Examples truncated at `max_length`."""
    dropped: int
    """Examples left out because of their length."""
    dropped_for_length: int
    """How many of them are longer than `max_length`, if `on_long` is `drop`."""
    dropped_with_nothing_to_train_after_truncation: int
    """How many of them have no trained token after truncation."""
    verified: int | None = None
    """Text generation only: conversations whose mask was computed in two independent ways that agree."""
    straddling_tokens: int | None = None
    """Text generation only: tokens that are partly inside and partly outside a trained message."""
    answers_with_thoughts: int
    """Answers with a thinking block."""
    answers_with_thoughts_put_back: int | None = None
    """Text generation only: how many of these blocks the chat template removed and `data.thinking` restored."""
    answers_not_trained: int | None = None
    """Text generation only: answers that a row excludes from training."""
    answers_in_prompts: int | None = None
    """Text generation only: answers that are part of a prompt, which are context."""
    trained_messages: dict[str, int] | None = None
    """Text generation only: role → messages that are trained."""
    trained_messages_without_stop_token: dict[str, int] | None = None
    """Text generation only: role → trained messages that the template does not end with a stop token."""
    special_tokens_in_text: int
    """Special tokens that occur inside messages."""
    conversations_without_last_answer: int | None = None
    """Text generation only: conversations that end before an answer."""
    duplicates: int
    """Exact copies of earlier examples."""
    duplicate_rows: tuple[tuple[Place, ...], ...]
    """Groups of duplicate rows."""
    num_rejected: int
    """Rows left out because they cannot be trained on."""
    rejected: tuple[RejectedRow, ...]
    """These rows with their reasons."""
    held_out_rows: int | None = None
    """Text generation only: rows that were held out."""
    copies_of_held_out_rows: int | None = None
    """Text generation only: further copies of these, which are neither trained on nor held out."""
    unread_fields: tuple[UnreadField, ...] = ()
    """Fields of the rows that nothing reads."""
    files_left_out: tuple[str, ...] = ()
    """Files of folders that are not read, each with the reason."""
    scripts: dict[str, float]
    """Unicode script → its fraction of the letters, 0 to 1."""
    findings: tuple[SuspiciousRow, ...]
    """Rows that look wrong."""


class MaskReport(Part):
    """How it was decided which tokens are trained."""

    method: str
    """The two methods that were compared, in words."""
    verified: int
    """Training conversations on which both agree."""


class SharedRow(Part):
    """A held-out example that is also in the training data."""

    eval: Place
    """Held-out row."""
    train: tuple[Place, ...]
    """Training rows with the same content."""


class SharedPrompt(Part):
    """A held-out prompt that is also in the training data, with another answer."""

    eval: Place
    """Held-out row."""
    train: Place
    """Training row with the same prompt."""


class PromptReport(Part):
    """Tokens before trained answers vs. the prompt that a server would send. Empty for classifiers."""

    checked: int = 0
    """Conversations compared."""
    header_differs: int = 0
    """How many differ in the tokens that open the answer."""
    history_differs: int = 0
    """How many differ earlier, such as in the thinking of earlier answers."""
    boundary_differs: int = 0
    """How many have the same text but different tokens, because the tokenizer joins the prompt's end and
    the answer's start."""
    file: str | None = None
    """File of the first conversation that differs in text."""
    line: int | None = None
    """Its line."""
    trained: str = ""
    """Text in training, from the first difference on."""
    served: str = ""
    """Text that a server would send, from there on."""


class StreamReport(Part):
    """Data that is read while training runs."""

    rows: int
    """Training rows of an epoch."""
    sampled_rows: int
    """Rows read beforehand, on which this report is based."""
    duplicate_rows: int
    """Rows written exactly like an earlier one."""
    copies_of_held_out_rows: int
    """Rows left out because they are written exactly like a held-out one."""


class DataRecord(FileRecord):
    """`data.json`: the data report."""

    labels: tuple[str, ...] | None = None
    """Classifiers only: names of the classes, in their order."""
    train_on: str | tuple[str, ...]
    """Messages that are trained, as in `data.train_on`."""
    thinking: str
    """Treatment of thinking blocks, as in `data.thinking`."""
    max_length: int
    """Longest example, in tokens."""
    on_long: str
    """Treatment of longer examples, as in `data.on_long`."""
    mask: MaskReport
    """How it was decided which tokens are trained."""
    train: SideReport
    """Training data; of streamed data, a sample."""
    eval: SideReport | None
    """Held-out data; null if there is none."""
    overlap: tuple[SharedRow, ...]
    """Held-out examples that are also in the training data."""
    shared_prompts: tuple[SharedPrompt, ...]
    """Held-out prompts that are also in the training data, with another answer."""
    prompts: PromptReport
    """Comparison of trained and served prompts."""
    notices: tuple[str, ...]
    """What the user should know, in words."""
    streamed: StreamReport | None = None
    """Streamed data only: what the stream contains."""
