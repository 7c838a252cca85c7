"""plan.json: what is planned before the weights load and, after the run, what was measured."""

from __future__ import annotations

from pydantic import ConfigDict

from loratune.run.records.base import FileRecord, Part


class MatrixParameters(Part):
    """An adapted matrix."""

    name: str
    """Full name of the module."""
    d_in: int
    """Input features."""
    d_out: int
    """Output features."""
    trainable: int
    """Parameters that the adapter adds."""


class FullyTrainedParameters(Part):
    """A module that is trained in full in addition to the adapter (PEFT's `modules_to_save`)."""

    name: str
    """Full name of the module."""
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of its tensors."""
    trainable: int
    """Number of its parameters."""


class Parameters(Part):
    """Exact parameter counts."""

    trainable: int
    """Trained parameters."""
    total: int
    """Parameters of base and adapter together, as PEFT counts them."""
    share: float
    """Trained parameters as a fraction of all, 0 to 1."""
    adapter_bytes: int
    """Size of the saved adapter, in bytes."""
    targets: str
    """Adapted modules, in words."""
    per_module: tuple[MatrixParameters, ...]
    """Every adapted matrix."""
    whole: tuple[FullyTrainedParameters, ...]
    """Modules that are trained in full."""


class Preset(Part):
    """A preset of `lora.targets` and what it would take."""

    targets: str
    """Adapted modules in words, or why the preset does not apply to the model."""
    trainable: int | None
    """Trained parameters; null if it does not apply to the model."""
    share: float | None
    """Trained parameters as a fraction of all, 0 to 1."""
    adapter_bytes: int | None
    """Size of the saved adapter, in bytes."""
    peak_bytes: int | None
    """Peak memory, in bytes; null if it does not fit on the machine."""
    train_seconds: float | None
    """Training time, in seconds."""


class PlannedInterval(Part):
    """Bounds of a planned number, from measured runs."""

    low: float
    """Lower bound."""
    high: float
    """Upper bound."""
    source: str
    """Which runs were measured, and how many of them lie within the bounds, in words."""


class Memory(Part):
    """Planned memory by component, in bytes."""

    peak_bytes: int
    """Peak: the largest of loading, training and evaluation."""
    interval: PlannedInterval | None = None
    """Bounds of the peak, in bytes; null if no run has been measured, as on a GPU."""
    weights_bytes: int
    """Frozen base weights."""
    adapter_bytes: int
    """The adapter's weights and gradients, and copies in the base's data type."""
    optimizer_bytes: int
    """Optimizer state."""
    activation_bytes: int
    """Activations saved for the backward pass."""
    activation_bytes_without_recomputation: int
    """The same without gradient checkpointing."""
    activation_bytes_with_recomputation: int
    """The same with gradient checkpointing of every layer."""
    backward_bytes: int
    """Gradients of one layer in the backward pass."""
    loss_bytes: int
    """Logits of one chunk and their working copies."""
    evaluation_bytes: int
    """Held-out loss or answers, whichever takes more; replaces activations, layer gradients and logits."""
    loading_bytes: int
    """Needed in addition to the weights while they load."""
    variant_bytes: int
    """Needed by `lora.variant` while it trains, and by modules that are trained in full."""
    allocator_bytes: int
    """Fragmentation of the allocator."""
    process_bytes: int
    """The process before any weight is loaded."""
    token_budget: int
    """Size of a micro-batch, in tokens."""
    generation_tokens: int
    """Largest batch of answers, prompts included, that takes no more memory than training, in tokens."""
    num_recomputed: int
    """Layers with gradient checkpointing."""


class Clock(Part):
    """Planned time."""

    train_seconds: float
    """All optimizer steps including compilation, without evaluation, in seconds."""
    compile_seconds: float
    """Compilation, in seconds; part of `train_seconds`."""
    evaluate_seconds: float
    """Held-out losses and answers, during and after training, in seconds."""
    total_seconds: float
    """From loading to the end, in seconds."""
    interval: PlannedInterval | None = None
    """Bounds of `total_seconds` on an otherwise idle machine; null if no run has been measured."""
    flops: float
    """Floating-point operations of all steps."""
    flops_per_second: float
    """Rate of a matrix product on this machine."""
    source: str
    """What the seconds were computed from, in words."""
    tokens_per_second: float
    """Training speed, in tokens per second."""
    num_steps: int
    """Optimizer steps."""
    is_upper_bound: bool
    """Whether early stopping may end the run sooner."""


class Probe(Part):
    """Real steps on the run's longest batch (`--probe`)."""

    num_tokens: int
    """Tokens of the step."""
    first_step_seconds: float
    """First step, which compiles and warms up, in seconds."""
    step_seconds: float
    """Fastest step after it, in seconds."""
    peak_bytes: int
    """Peak memory of the process, in bytes."""
    tokens_per_second: float
    """Speed of a step after the first, in tokens per second."""


class SourceShare(Part):
    """A source's share of an epoch."""

    name: str
    """The source."""
    weight: float
    """How many times each of its rows is seen per epoch."""
    num_examples: int
    """Examples."""
    num_tokens: int
    """Tokens."""
    num_supervised_tokens: int
    """Trained tokens."""


class PlannedData(Part):
    """An epoch of training data. A task may add entries of its own."""

    model_config = ConfigDict(extra="allow")

    num_examples: int
    """Training examples."""
    num_tokens: int
    """Tokens of all training examples."""
    num_supervised_tokens: int
    """Trained tokens."""
    shared_fraction: float = 0.0
    """Fraction of the tokens that do not go through the model, because equal prefixes of a step do so
    only once (`train.share_prefixes`); 0 if that is off."""
    num_eval_examples: int
    """Held-out examples."""
    is_estimate: bool
    """Whether tokens are extrapolated from a sample, as for streamed data."""
    sources: tuple[SourceShare, ...]
    """The mixture."""
    num_classes: int | None = None
    """Classifiers only: number of classes."""


class ChoiceRecord(Part):
    """A setting that was `auto`, or that was checked against the machine."""

    value: str
    """Value that is used."""
    reason: str
    """Reason for an automatic choice; empty if the user chose the value."""


class AdviceGiven(Part):
    """A piece of advice."""

    about: str
    """Setting, or other subject."""
    text: str
    """What to do."""
    reason: str
    """Why."""
    source: str
    """Publication or measurement behind the reason; empty if it is arithmetic."""


class PlannedPacking(Part):
    """Whether the examples of a micro-batch share one forward pass, as far as the model's structure shows."""

    packed: bool
    """Whether they do."""
    why_unpacked: str
    """Why not; empty if they do."""


class Packing(PlannedPacking):
    """Whether the examples of a micro-batch shared one forward pass."""

    why_unpacked: str
    """Why not all of them did; empty if they did."""
    slow_attention: str
    """Why packed attention did not run in the device's fastest kernel; empty if it did."""


class PlannedDevice(Part):
    """The device that the plan is for (`--device`)."""

    name: str
    """Name."""
    memory_bytes: int
    """Memory, in bytes."""
    bf16_flops_per_second: float
    """Published peak rate of bfloat16 matrix products."""
    source: str
    """Where the numbers were published."""
    is_estimate: bool
    """True: nothing was measured on it."""


class LinkUsed(Part):
    """A link between devices."""

    name: str
    """Name, as for `--interconnect`."""
    scope: str
    """What it joins: `devices` of a node, or `nodes`."""
    bytes_per_second: float
    """Published peak of one port in one direction."""
    shared: bool
    """Whether the devices of a node share one port."""
    hop_seconds: float
    """Latency from one rank to the next, in seconds."""
    source: str
    """Where the bandwidth was published."""


class ScalingStep(Part):
    """The run on a number of devices."""

    devices: int
    """Devices."""
    nodes: int
    """Nodes."""
    strategy: str
    """`ddp`, or `fsdp` if not everything fits on one device."""
    peak_bytes: int
    """Peak memory per device, in bytes."""
    token_budget: int
    """Size of a micro-batch, in tokens."""
    rank_tokens: float
    """Mean tokens per rank and step."""
    balance: float
    """Mean tokens per rank over those of the slowest rank, 0 to 1."""
    idle: float
    """Fraction of devices without work in a step, 0 to 1."""
    communication_seconds: float
    """Communication per step that no computation hides, in seconds."""
    step_seconds: float
    """Optimizer step without compilation, in seconds."""
    tokens_per_second: float
    """Training speed, in tokens per second."""
    efficiency: float
    """Seconds on one device over devices × seconds here, 0 to 1."""
    train_seconds: float
    """Training time, in seconds."""
    total_seconds: float
    """From loading to the end, in seconds."""
    cost: float | None = None
    """Cost of the run in the currency of `--price-per-hour`."""


class ScalingPlan(Part):
    """The run on more and more devices (`--devices`)."""

    device: str
    """Name of the device."""
    devices: int
    """Devices of the cluster."""
    nodes: int
    """Nodes of the cluster."""
    interconnect: tuple[LinkUsed, ...]
    """Links that are used."""
    rows: tuple[ScalingStep, ...]
    """From the fewest devices on which the run fits to all of them."""
    too_few: tuple[int, ...]
    """Numbers of devices on which the run does not fit."""
    hiding_tokens: float
    """Micro-batch size, in tokens, from which on FSDP's gathers hide behind computation."""
    batch_size: int
    """Examples per optimizer step: the most devices that a step can feed."""
    simulated_steps: int
    """Steps that were simulated."""
    is_epoch: bool
    """Whether these are a complete epoch."""
    assumptions: tuple[str, ...]
    """Assumptions behind the numbers, in words."""
    is_estimate: bool
    """True: nothing was measured."""


class SoFar(Part):
    """What an interrupted run has used so far."""

    peak_bytes: int
    """Peak memory, in bytes."""
    total_seconds: float
    """From loading to the interruption, over all starts, in seconds."""


class Measured(SoFar):
    """What the run used."""

    train_seconds: float
    """All optimizer steps, without evaluation and saving, in seconds."""
    tokens_per_second: float
    """Training speed, in tokens per second."""
    evaluate_seconds: float
    """Held-out losses and answers, during and after training, in seconds."""
    packing: Packing | None = None
    """Whether examples shared forward passes."""


class PlanRecord(FileRecord):
    """`plan.json`: what is planned and, after the run, what was measured."""

    parameters: Parameters
    """Exact parameter counts."""
    presets: dict[str, Preset]
    """Preset of `lora.targets` → what it would take."""
    memory: Memory
    """Planned memory."""
    time: Clock
    """Planned time."""
    probe: Probe | None
    """Real steps that the time is based on; null without `--probe`."""
    data: PlannedData
    """Training data per epoch."""
    choices: dict[str, ChoiceRecord]
    """Setting → automatic choice."""
    packing: PlannedPacking | None = None
    """Whether examples share forward passes."""
    warnings: tuple[str, ...]
    """What the user should read before starting."""
    advice: tuple[AdviceGiven, ...]
    """What an expert would change."""
    num_processes: int
    """Processes of the run."""
    device: PlannedDevice | None
    """Named device that the plan is for; null for this machine."""
    scaling: ScalingPlan | None
    """The run on several devices; null if the plan is for one."""
    so_far: SoFar | None = None
    """Interrupted runs only: resources used so far."""
    measured: Measured | None = None
    """Finished runs only: resources used."""
