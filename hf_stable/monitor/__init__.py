"""What attention does while training runs, and the alarms."""
