"""One run: its directory, its processes, its errors, and progress output."""
