"""What each command does, one file a command. The same functions are the Python API."""
