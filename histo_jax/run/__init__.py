"""The folder of a run: files, lock, status, signals, progress."""
