"""What a folder on disk holds, written and read."""
