"""What a run would cost, computed before any weights are loaded."""
