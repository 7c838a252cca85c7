"""What Ray's controller hears from the workers, one line a report: named to Ray by RAY_TRAIN_CALLBACKS."""

from __future__ import annotations

import json
import os
from typing import Any

from ray.train.v2._internal.execution.callback import ReportCallback  # Ray takes no public class from that variable


class Listener(ReportCallback):
    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        with open(os.environ["RAY_HEARD"], "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
