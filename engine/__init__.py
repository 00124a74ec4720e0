"""What keeps a run alive: devices, processes, saving, logging."""
