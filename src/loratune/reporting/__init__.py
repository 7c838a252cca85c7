"""What people read of a run: it reads the run directory's files, never live objects."""
