"""Where the services run: one process, or Ray Serve behind HAProxy."""
