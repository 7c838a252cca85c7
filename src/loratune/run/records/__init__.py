"""The records in a run directory, typed: one module per kind of file, and what `--json` prints.

base          what all records share: strict types, `schema_version`, from and to JSON
files         records on disk
data          data.json, the data report
plan          plan.json: planned, and after the run measured
lock          lock.json: everything effective
metrics       metrics.jsonl: one line per optimizer step, evaluation or event
evaluation    evaluation.json: base vs. fine-tuned
certificate   parity.json: proofs that what was exported is the trained model
preview       preview.json: the first training examples, token by token
sweep         what a sweep tries, and its result
outputs       what the verbs print with --json
schemas       verb → JSON schema

The records import nothing from the other packages, so that every package can use them.
"""
