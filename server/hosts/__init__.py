"""What runs the services: one process, or Ray Serve behind HAProxy."""
