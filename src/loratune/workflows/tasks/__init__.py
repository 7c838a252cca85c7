"""What a model learns: one folder a task. `recipe/tasks.py` has the table; `task.py` says what a task decides."""
