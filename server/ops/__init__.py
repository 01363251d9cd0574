"""What operators see and processes need: metrics, logs, signals, ports."""
